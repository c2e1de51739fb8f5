"""How long one microbatch will take, from profiles alone: base station, air and devices, block by block.

    block = stage(n) + max(experts, shared expert)              the shared expert runs while the devices work
    experts, every device with a channel of its own:            max over devices of exchange(down, up) + compute
    experts, one channel for all:                               requests leave one after another, longest work first;
                                                                replies in the order in which they are ready
    compute = sum over the experts that are asked, of call(rows of that expert)
    bytes   = rows of the device x d_model x bytes of a number (+ 8 a row and expert on the way down), and a header

The routing is drawn: each row takes `top_k` different experts, all alike in likelihood, and times are means over draws (seed
fixed). A real router prefers some experts, which makes the slowest device slower. Formulas: docs/export.md; the two channels are
those of `device/emulation.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.profiles.base_station import BaseStation
from wdmoe.profiles.device_profile import DeviceProfile, interpolate
from wdmoe.profiles.link_profile import LinkProfile

_DRAWS = 32
_SEED = 20251124
_HEADER_BYTES = 150  # of a message, its frames included
_PAIR_BYTES = 8  # index and weight of a row and expert


@dataclass(frozen=True, slots=True)
class StationWork:
    """What the base station computes, as numbers of weights."""

    stages: tuple[int, ...]  # of each block; the embedding is looked up, not multiplied
    shared: int  # of a block's shared expert; 0: none
    head: int
    kv_dim: int  # width of the keys of a token
    query_dim: int  # width of its queries


@dataclass(frozen=True, slots=True)
class RoutedWork:
    """What the devices compute."""

    n_experts: int
    top_k: int
    d_model: int
    value_bytes: int = 2  # of a number on the wire


@dataclass(frozen=True, slots=True)
class Site:
    """One device and its link."""

    profile: DeviceProfile
    link: LinkProfile


@dataclass(frozen=True, slots=True)
class PassTime:
    """One microbatch through the model, alone in the system; modelled."""

    rows: int
    bs_ms: float  # on the way from first to last: what the base station computes while nobody else works
    air_ms: float  # transfers and round trips
    device_ms: float  # the device of each block that is waited for
    # With many microbatches in flight, what each takes of a resource that works for one at a time:
    bs_busy_ms: float
    air_busy_ms: float
    device_busy_ms: float  # of the device that is busy longest

    @property
    def total_ms(self) -> float:
        """From first to last."""
        return self.bs_ms + self.air_ms + self.device_ms

    @property
    def bottleneck(self) -> str:
        """What most of the time is spent with."""
        parts = {"BS compute": self.bs_ms, "air": self.air_ms, "device compute": self.device_ms}
        return max(parts, key=lambda name: parts[name])

    @property
    def busiest(self) -> str:
        """What bounds the rate with many microbatches in flight."""
        parts = {"BS compute": self.bs_busy_ms, "air": self.air_busy_ms, "device compute": self.device_busy_ms}
        return max(parts, key=lambda name: parts[name])

    @property
    def at_best_per_s(self) -> float:
        """Microbatches a second if the busiest resource is never idle: an upper bound."""
        return 1000 / max(self.bs_busy_ms, self.air_busy_ms, self.device_busy_ms)


@dataclass(frozen=True, slots=True)
class Transfer:
    """The part of one device in one block."""

    down_ms: float
    compute_ms: float
    up_ms: float
    lag_ms: float  # round trip, and the median of what jitter adds
    half_duplex: bool


def pass_time(
    rows: int,
    head_rows: int,
    context: int,
    station: BaseStation,
    work: StationWork,
    routed: RoutedWork,
    sites: Sequence[Site],
    placement: Sequence[Sequence[int]],
    shared_channel: bool,
) -> PassTime:
    """Predict one microbatch.

    Args:
        rows: tokens of it.
        head_rows: of them, those whose next token is asked for.
        context: tokens that each of them sees, itself included.
        station: the base station.
        work: of it.
        routed: of the devices.
        sites: the devices.
        placement: [block][expert] -> number of its device.
        shared_channel: whether all devices share one channel, or each has its own.
    """
    rng = np.random.default_rng(_SEED)
    drawn = np.argsort(rng.random((_DRAWS, rows, routed.n_experts)), axis=2)[:, :, : routed.top_k]
    known: dict[tuple[int, ...], tuple[float, float, float, list[float]]] = {}  # many blocks are placed alike
    bs_ms = air_ms = device_ms = air_busy_ms = 0.0
    device_busy_ms = np.zeros(len(sites))
    attention_flops = 4.0 * rows * context * work.query_dim
    shared_ms = station.graph_ms(work.shared, rows) if work.shared else 0.0
    for weights, places in zip(work.stages, placement, strict=True):
        key = tuple(places)
        if key not in known:
            known[key] = _mean_block(drawn, routed, sites, np.array(key), shared_channel)
        experts_ms, compute_ms, busy_ms, computes_ms = known[key]
        bs_ms += station.graph_ms(weights, rows, attention_flops, 8.0 * context * work.kv_dim)
        bs_ms += max(0.0, shared_ms - experts_ms)
        air_ms += experts_ms - compute_ms
        device_ms += compute_ms
        air_busy_ms += busy_ms
        device_busy_ms += computes_ms
    head_ms = station.graph_ms(work.head, head_rows)
    hidden_ms = sum(min(shared_ms, known[tuple(places)][0]) for places in placement)
    bs_ms += head_ms
    return PassTime(
        rows, bs_ms, air_ms, device_ms, bs_ms + hidden_ms, air_busy_ms, float(device_busy_ms.max())
    )  # fmt: skip


def block_end(transfers: Sequence[Transfer], shared_channel: bool) -> tuple[float, float]:
    """Return when the last reply of a block is there, and how long its device computed, both in ms."""
    if not shared_channel:
        ends = [(t.down_ms + t.compute_ms + t.up_ms + t.lag_ms, t.compute_ms) for t in transfers]
        return max(ends, default=(0.0, 0.0))
    sent_ms = 0.0
    ready: list[tuple[float, Transfer]] = []
    for transfer in sorted(transfers, key=lambda t: -t.compute_ms):
        sent_ms += transfer.down_ms
        ready.append((sent_ms + transfer.compute_ms + transfer.lag_ms, transfer))
    free_ms = {True: sent_ms, False: 0.0}  # where both directions share the channel, replies wait for the last request
    last = (0.0, 0.0)
    for at_ms, transfer in sorted(ready, key=lambda one: one[0]):
        end_ms = max(free_ms[transfer.half_duplex], at_ms) + transfer.up_ms
        free_ms[transfer.half_duplex] = end_ms
        last = max(last, (end_ms, transfer.compute_ms))
    return last


def _mean_block(
    drawn: npt.NDArray[np.int64],
    routed: RoutedWork,
    sites: Sequence[Site],
    places: npt.NDArray[np.int64],
    shared_channel: bool,
) -> tuple[float, float, float, list[float]]:
    """Return means over the draws: end of the block, compute of its last device, busy air, compute of every device."""
    end_ms = compute_ms = busy_ms = 0.0
    computes_ms = [0.0] * len(sites)
    for chosen in drawn:  # [rows, k]
        transfers = _transfers(chosen, routed, sites, places)
        end, compute = block_end(list(transfers.values()), shared_channel)
        end_ms, compute_ms = end_ms + end / len(drawn), compute_ms + compute / len(drawn)
        busy_ms += _busy_ms(list(transfers.values()), shared_channel) / len(drawn)
        for device, transfer in transfers.items():
            computes_ms[device] += transfer.compute_ms / len(drawn)
    return end_ms, compute_ms, busy_ms, computes_ms


def _transfers(
    chosen: npt.NDArray[np.int64], routed: RoutedWork, sites: Sequence[Site], places: npt.NDArray[np.int64]
) -> dict[int, Transfer]:
    """Work out what each device is asked in one draw; those that are not asked are left out."""
    counts = np.bincount(chosen.reshape(-1), minlength=routed.n_experts)
    devices = places[chosen]
    found: dict[int, Transfer] = {}
    for device in np.unique(devices).tolist():
        site = sites[device]
        asked = counts[(places == device) & (counts > 0)].tolist()
        curve = site.profile.curve()
        row_bytes = int((devices == device).any(axis=1).sum()) * routed.d_model * routed.value_bytes
        found[device] = Transfer(
            site.link.down_ms(row_bytes + _PAIR_BYTES * sum(asked) + _HEADER_BYTES),
            sum(interpolate(curve, tokens) for tokens in asked),
            site.link.up_ms(row_bytes + _HEADER_BYTES),
            site.link.exchange_ms(0, 0),
            site.link.half_duplex,
        )
    return found


def _busy_ms(transfers: Sequence[Transfer], shared_channel: bool) -> float:
    """Return how long the busiest channel is occupied."""
    each = [(t.down_ms + t.up_ms, 0.0) if t.half_duplex else (t.down_ms, t.up_ms) for t in transfers]
    if shared_channel:
        return max(sum(first for first, _ in each), sum(second for _, second in each))
    return max(max(pair) for pair in each)
