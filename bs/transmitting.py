"""Who gets which share of the band in a live run, and how requests leave on it.

The shares are those of virtual time. On an emulated link the device's emulator takes the share that the request tells.
On a real one both senders pace: the base station holds its rows until the share would have carried them, and tells the
device at what rate to let its reply go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from wdmoe.bs.airtime import Asked, Medium, few_finish_ms
from wdmoe.bs.allocation import finish_together
from wdmoe.bs.chunking import Turn, pieces_of_block, split_options, worth_asking
from wdmoe.bs.dispatch import Shipment
from wdmoe.bs.hub import Device, Hub
from wdmoe.bs.latency import LatencyTracker
from wdmoe.profiles.link_profile import LinkProfile, link_names, modelled_link
from wdmoe.runtime.messages import LEAST_MBPS, LEAST_SHARE, MOST_MBPS, ExpertRequest

Division = Literal["uniform", "per-block"] | Mapping[str, float]  # or the share of each device, by name


@dataclass(frozen=True, slots=True)
class LiveBand:
    """What the base station was told of its links, and how it divides their band."""

    division: Division | None = None  # None: nothing is divided
    links: Mapping[str, LinkProfile] = field(default_factory=dict)  # by device, where the operator says what they carry
    row_bytes: float = 0.0  # of a row as it travels

    def admit(self, devices: Iterable[Device]) -> None:
        """Tell what is known to the latency models of those that are connected now; to be called when that changes."""
        devices = list(devices)
        for device in devices:
            if (link := self.links.get(device.name)) is not None:
                device.latency.state_air(link.down_ms(self.row_bytes), link.up_ms(self.row_bytes))
            if self.division == "uniform":
                device.latency.set_share(1 / len(devices), lasting=True)
            elif isinstance(self.division, Mapping):
                # Nobody said what a stranger gets: the least.
                share = self.division.get(device.name, min(self.division.values()))
                device.latency.set_share(share, lasting=True)

    def rateless(self, devices: Iterable[Device]) -> list[str]:
        """Name those whose share cannot be applied, as the rates of their links are not known."""
        return [] if self.division is None else sorted(d.name for d in devices if not all(d.latency.row_air_ms))


@dataclass(slots=True)
class Transmitter:
    """Decides how the requests of a block leave: their order, their shares of the band, and in how many pieces."""

    hub: Hub
    band: LiveBand = field(default_factory=LiveBand)
    given: Medium | None = (
        None  # what the links are; None: a shared channel if an emulated device says so, else own ones
    )
    splits: bool = True
    learns: bool = False  # whether also by what requests tell of links; between processes of one machine that is noise
    in_flight: int = 1  # microbatches at most, in this run
    medium: Medium = "own"  # what the links are now
    _duplex: set[str] = field(default_factory=set)  # devices whose links carry both ways at a time, as far as is known

    def look_again(self) -> None:
        """Take note of the devices that are connected now; to be called when that changes."""
        emulated = [device.latency.profile.emulated for device in self.hub.devices.values()]
        shared = any(what is not None and what.shared for what in emulated)
        self.medium = self.given or ("shared" if shared else "own")
        self._duplex = {name for name, device in self.hub.devices.items() if self._is_duplex(device)}
        self.band.admit(self.hub.devices.values())

    def dispatch(self, shipments: Sequence[Shipment], alone: bool) -> Sequence[Turn]:
        """Divide a pooled band; say in which order to send and in how many pieces.

        What the base station runs itself comes last. On a shared channel the order is that of `airtime.few_finish_ms`.

        Args:
            shipments: of one microbatch in one block.
            alone: whether no other microbatch is on its way, which would fill the gaps that pieces fill.
        """
        splits = self.splits and alone and worth_asking([len(shipment.rows) for shipment in shipments])
        if self.medium == "own" and not splits:
            return [Turn(n) for n in range(len(shipments))]
        devices = self.hub.devices
        there = [n for n, shipment in enumerate(shipments) if shipment.device in devices]
        latencies = [devices[shipments[n].device].latency for n in there]
        requests = [shipments[n].request for n in there]
        asked = [latency.asked_ms(r.counts, r.rows) for latency, r in zip(latencies, requests, strict=True)]
        if self.medium == "pooled":
            for latency, share in zip(latencies, shares_of_block(asked, self.in_flight), strict=True):
                latency.set_share(share, lasting=False)
        order = list(range(len(there))) if self.medium == "own" else few_finish_ms(asked, "shared")[1]
        pieces = [1] * len(order)
        if splits:
            options = [self._options(requests[turn], latencies[turn]) for turn in order]
            duplex = [shipments[there[turn]].device in self._duplex for turn in order]
            pieces = pieces_of_block(options, self.medium, duplex)
        turns = [Turn(there[turn], n) for turn, n in zip(order, pieces, strict=True)]
        return [*turns, *(Turn(n) for n in range(len(shipments)) if n not in there)]

    def _is_duplex(self, device: Device) -> bool:
        emulated = device.latency.profile.emulated
        link = self.band.links.get(device.name)
        if link is None and emulated is not None and emulated.link in link_names():  # a radio channel never is
            link = modelled_link(emulated.link)
        return link is not None and not link.half_duplex

    def _options(self, request: ExpertRequest, latency: LatencyTracker) -> list[Asked]:
        if latency.air_from == "nobody" or (latency.air_from == "requests" and not self.learns):
            return [latency.asked_on_share_ms(request.counts, request.rows)]
        return split_options(request.counts, request.rows, latency.asked_on_share_ms)


def shares_of_block(asked: Sequence[Asked], in_flight: int) -> list[float]:
    """Divide a band for one block of one of the microbatches in flight, so that all who are asked finish together.

    Each microbatch has an equal part to divide: what two of them send at the same time never takes more than there is.
    While the rate of somebody's link is not known, all get the same.
    """
    air_ms = [in_flight * (send + reply) for send, _, _, reply in asked]
    if not all(air_ms):
        return [1 / (in_flight * len(asked))] * len(asked)
    fixed_ms = [2 * way + compute for _, way, compute, _ in asked]
    shares, _ = finish_together(air_ms, fixed_ms)
    return [share / in_flight for share in shares]


@dataclass(frozen=True, slots=True)
class Sending:
    """How a request leaves."""

    request: ExpertRequest  # told what its reply needs to know
    leaves_s: float
    longer_ms: float = 0.0  # what the share adds to it and its reply on the air
    reported_ms: float = 0.0  # of that, what the reply will report as waiting


def sending(request: ExpertRequest, row_bytes: float, device: Device, now_s: float) -> Sending:
    """Put a request on its device's share of the band.

    Args:
        request: as it stands.
        row_bytes: of a row of it as it travels.
        device: whose pace is kept, if its link is a real one.
        now_s: when it could leave.
    """
    latency = device.latency
    share = max(LEAST_SHARE, latency.share)
    down_ms, up_ms = (request.rows * ms for ms in latency.row_air_ms)
    if share == 1 or not down_ms or not up_ms:
        return Sending(request, now_s)
    longer_ms = (down_ms + up_ms) * (1 / share - 1)
    if _is_emulated(latency):
        return Sending(msgspec.structs.replace(request, share=share), now_s, longer_ms, longer_ms)
    up_mbps = min(MOST_MBPS, max(LEAST_MBPS, 8e-3 * request.rows * row_bytes / up_ms))
    told = msgspec.structs.replace(request, share=share, up_mbps=up_mbps)
    leaves_s = device.pace.leave_s(now_s, down_ms / 1e3, share)
    return Sending(told, leaves_s, longer_ms, up_ms * (1 / share - 1))


def _is_emulated(latency: LatencyTracker) -> bool:
    """Say whether the device's emulator takes the share: not where the operator states what a real link carries."""
    emulated = latency.profile.emulated
    return emulated is not None and emulated.link is not None and latency.air_from != "operator"
