"""A base station in virtual time: real stages, engines and rows; devices and links are modelled.

The loop, the decisions and the latency model are those of a live run. Experts run in this process, and their replies
arrive when the emulated device on its link would have answered (`runtime/emulation.py`); a stage takes what is declared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from wdmoe.bs.airtime import Asked, Curve, LatencyModel, Load, Medium, Times, latency_model, makespan
from wdmoe.bs.allocation import USUAL_TOKENS, per_block, static_of_use
from wdmoe.bs.chunking import Turn, pieces_of_block, split_options, worth_asking
from wdmoe.bs.config import StationConfig, VirtualConfig
from wdmoe.bs.dispatch import Shipment
from wdmoe.bs.flights import Dispatched, Held, Outcome
from wdmoe.bs.hub import Hub
from wdmoe.bs.kept import keep_modelled, usage
from wdmoe.bs.latency import DeviceLatency
from wdmoe.bs.microbatch import Result
from wdmoe.bs.pipeline import Pipeline
from wdmoe.bs.routing import Ints
from wdmoe.bs.sensitivity import read_sensitivity
from wdmoe.bs.stages import Stages
from wdmoe.bs.station import Station, bs_folder, held_experts, introduced, introduced_kept
from wdmoe.bs.tracing import STAGES, Trace
from wdmoe.profiles.device_profile import DeviceProfile, interpolate
from wdmoe.profiles.link_profile import LinkProfile
from wdmoe.profiles.modelled import PRECISIONS, ExpertShape, hardware_names, modelled_profile
from wdmoe.runtime.channels import OwnChannel
from wdmoe.runtime.clock import VirtualClock
from wdmoe.runtime.emulation import Air, EmulationOptions, emulated_profile, make_air
from wdmoe.runtime.engines import ExpertEngine, load_engine
from wdmoe.runtime.expert_sums import weighted_sums
from wdmoe.runtime.manifest import MANIFEST_NAME, BsManifest, DeviceManifest, read_manifest, verify_files
from wdmoe.runtime.messages import (
    PROTOCOL_VERSION,
    ExpertReply,
    ExpertRequest,
    Goodbye,
    Hello,
    Message,
    Ping,
    Pong,
    decode,
    encode,
    pack_rows,
    unpack_rows,
)
from wdmoe.runtime.virtual_time import Frames, TimedPeer, VirtualLink, VirtualWorker
from wdmoe.runtime.worker import Worker

Say = Callable[[str], None]


@dataclass(slots=True)
class VirtualDevice:
    """A device folder whose experts run here and now; its answers arrive when an emulated device's would."""

    name: str
    manifest: DeviceManifest
    engine: ExpertEngine
    profile: DeviceProfile
    air: Air
    _at_once: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Introduce itself."""
        blocks: list[list[int]] = [[] for _ in range(self.manifest.model.n_blocks)]
        for entry in self.manifest.experts:
            blocks[entry.block].append(entry.expert)
        experts = tuple(map(tuple, blocks))
        hello = Hello(PROTOCOL_VERSION, self.name, "virtual", self.manifest.bundle_id, experts, self.profile)
        self._at_once.append(Message(hello))

    def take(self, frames: Frames, now_s: float) -> None:
        """Take a message that was sent now; see `TimedPeer`."""
        message = decode(frames, self.manifest.model.d_model)
        match message.header:
            case Ping(nonce=nonce):
                self._at_once += self.air.hold([Message(Pong(nonce))], now_s)
            case ExpertRequest() as request:
                assert message.rows is not None
                sums = weighted_sums(self.engine, request, unpack_rows(message.rows))
                packed, wire = pack_rows(sums, request.wire)
                self.air.start(request, frames, now_s)
                self.air.finish(Message(ExpertReply(request.request_id, len(packed), wire, 0, 0), packed), now_s)
            case Goodbye():
                self._at_once.append(Message(Goodbye("heard")))

    def next_s(self) -> float:
        """When something of its arrives next; see `TimedPeer`."""
        return float("-inf") if self._at_once else self.air.next_s

    def due(self, now_s: float) -> Iterable[Frames]:
        """Take what has arrived by now; see `TimedPeer`."""
        messages, self._at_once = [*self._at_once, *self.air.due(now_s)], []
        return [encode(message) for message in messages]


@dataclass(frozen=True, slots=True)
class VirtualTransmitter:
    """What the base station decides when a microbatch sends in a block: who is sent to first, shares of the band, pieces.

    With several microbatches in flight and a band that is divided anew for each block, each has an equal part of it
    to divide: what two of them send at the same time never takes more than there is.
    """

    devices: Sequence[VirtualDevice]
    curves: Sequence[Curve]  # of each device; always the same objects, see `airtime.latency_model`
    links: Sequence[LinkProfile]  # of each device
    row_bytes: float  # as charged
    in_flight: int
    medium: Medium
    splits: bool  # whether requests may go in pieces

    def dispatch(self, shipments: Sequence[Shipment], alone: bool) -> Sequence[Turn]:
        """Set the shares of the devices that are asked; return the order of sending: the longest tail first.

        The order matters only on a shared channel; see `transmitting.Transmitter`.
        """
        number = {device.name: k for k, device in enumerate(self.devices)}
        asked = {number[shipment.device]: n for n, shipment in enumerate(shipments) if shipment.device in number}
        calls = [(k, count) for k, n in asked.items() for count in shipments[n].request.counts]
        if not calls:
            return [Turn(n) for n in range(len(shipments))]
        rows = np.zeros(len(number), np.int64)
        rows[list(asked)] = [len(shipments[n].rows) for n in asked.values()]
        load = Load(rows, *(np.array(part, np.int64) for part in zip(*calls, strict=True)))
        model = _modelled(self.curves, self.links, self.row_bytes, int(load.tokens.max()))
        if self.medium == "pooled":
            part = model.with_rates(self.in_flight * model.down_ms, self.in_flight * model.up_ms)
            shares, _ = per_block(load, part)
            for k in asked:
                self.devices[k].air.emulator.share = float(shares[k]) / self.in_flight
        order = makespan(load, model).order
        assert order is not None
        loaded = order.tolist()
        pieces = [1] * len(loaded)
        if self.splits and alone and worth_asking([int(rows[k]) for k in loaded]):
            options = []
            for k in loaded:
                request = shipments[asked[k]].request
                options.append(split_options(request.counts, request.rows, partial(self._asked_ms, k, model)))
            duplex = [not self.links[k].half_duplex for k in loaded]
            pieces = pieces_of_block(options, self.medium, duplex)
        turns = [Turn(asked[k], n) for k, n in zip(loaded, pieces, strict=True)]
        return [*turns, *(Turn(n) for n in range(len(shipments)) if n not in asked.values())]

    def _asked_ms(self, k: int, model: LatencyModel, counts: Sequence[int], rows: int) -> Asked:
        """Predict a request to device k on its share of the band; see `airtime.Asked`."""
        share = self.devices[k].air.emulator.share
        compute_ms = sum(interpolate(self.curves[k], count) for count in counts)
        down_ms, way_ms, up_ms = (float(each[k]) for each in (model.down_ms, model.way_ms, model.up_ms))
        return rows * down_ms / share, way_ms, compute_ms, rows * up_ms / share


def static_shares(virtual: VirtualConfig, manifest: BsManifest, counts: Ints | None) -> Times:
    """Divide the band once for all blocks, by what microbatches of a usual size ask of the devices under exact: [K].

    Args:
        virtual: devices and links.
        manifest: says who holds which expert.
        counts: how often each expert is used, [n_blocks, n_experts]; None: alike.

    Raises:
        WdmoeError: SciPy is missing.
    """
    spec = manifest.model
    shape = virtual.cost_shape or ExpertShape(spec.d_model, spec.d_ff)
    precision = virtual.cost_precision or (manifest.precision if manifest.precision in PRECISIONS else "fp16")
    curves = [modelled_profile(name, precision, shape).curve() for name in virtual.devices]
    model = _modelled(curves, virtual.profiles, 2.0 * shape.d_model, USUAL_TOKENS)
    owner = np.array([[holders[0] for holders in block] for block in manifest.placement])
    return static_of_use(model, owner, spec.top_k, counts)


def _modelled(curves: Sequence[Curve], links: Sequence[LinkProfile], row_bytes: float, up_to: int) -> LatencyModel:
    """Put devices on their links, each with the whole band; see `latency_model`."""
    devices = [DeviceLatency(curve, link.round_trip_ms) for curve, link in zip(curves, links, strict=True)]
    down_ms = np.array([link.down_ms(row_bytes) for link in links])
    up_ms = np.array([link.up_ms(row_bytes) for link in links])
    return latency_model(devices, up_to).with_rates(down_ms, up_ms, "shared")


@contextmanager
def open_virtual_station(
    config: StationConfig,
    virtual: VirtualConfig,
    say: Say,
    tap: Callable[[VirtualDevice], TimedPeer] = lambda device: device,
) -> Iterator[Station]:
    """Load the base station's folder and every device folder beside it into this process.

    Args:
        config: of the base station.
        virtual: devices and links.
        say: told what is loaded.
        tap: puts something between the base station and a device that has written its hello: it may listen, change
            what passes, or make the device another than its profile says.

    Raises:
        WdmoeError: the bundle is damaged or has no device folders, or a slice does not fit its emulated device.
        ValueError: there are not as many devices as device folders, or options contradict each other.
    """
    if config.in_flight == "auto" and virtual.bandwidth == "per-block":
        raise ValueError("--bandwidth per-block divides the band among the microbatches; give --in-flight a number")
    folder = bs_folder(config.bundle)
    manifest = read_manifest(folder, BsManifest)
    verify_files(folder, manifest)
    if virtual.bandwidth == "static" and len(virtual.devices) == manifest.n_devices:
        counts, told_by = usage(manifest, config.bs_counts)
        shares = static_shares(virtual, manifest, counts)
        virtual = replace(virtual, bandwidth=",".join(f"{share:.4f}" for share in shares))
        say(f"static shares of the band {virtual.bandwidth}, by {'equal use' if counts is None else told_by}")
    clock = VirtualClock()
    devices = _load_devices(folder.parent, virtual, config.threads, say)
    link = VirtualLink({device.name.encode(): tap(device) for device in devices}, clock)
    hub = Hub(link, manifest, clock)
    hub.wait_for_devices(config.wait_s)
    say(f"in virtual time, a stage takes {virtual.stage_ms:g} ms; {introduced(hub)}")

    def cost_s(outcome: Outcome | None) -> float:
        # The shared expert, and what the base station holds for a loss, are a part of what is declared.
        if outcome is not None and isinstance(outcome[1], Held):
            return (outcome[1].predicted_ms or 0.0) / 1e3
        return virtual.stage_ms / 1e3 if outcome is not None and isinstance(outcome[1], Dispatched | Result) else 0.0

    trace = Trace(modelled=True) if config.trace is not None else None

    def note_job(outcome: Outcome | None, began_s: float, ended_s: float) -> None:
        if trace is not None and outcome is not None:
            trace.add(STAGES, _job_words(outcome), began_s, ended_s)

    def make_worker(wake: Callable[[], None]) -> Worker[Outcome]:
        return VirtualWorker(clock, cost_s, link.wake_at, note_job)

    medium = _medium_of(virtual)
    transmitter = VirtualTransmitter(
        devices,
        [device.profile.curve() for device in devices],
        virtual.profiles,
        2.0 * (virtual.cost_shape.d_model if virtual.cost_shape is not None else manifest.model.d_model),
        config.in_flight if config.in_flight != "auto" else 1,  # it matters only with bandwidth for each block
        medium,
        config.split == "auto",
    )
    stages = Stages(folder, manifest, config.threads)
    kept = None
    if config.bs_experts != "none":
        kept = keep_modelled(
            config.bs_experts,
            folder,
            manifest,
            config.threads,
            config.bs_counts,
            virtual.bs_machine,
            virtual.cost_shape,
        )
        say(introduced_kept(kept))
    held = held_experts(config, folder, manifest, kept)
    pipeline = Pipeline(
        hub,
        stages,
        manifest,
        make_worker,
        config.wire,
        held,
        config.when_lost == "skip",
        trace,
        medium=medium,
        on_dispatch=transmitter.dispatch,
    )
    pipeline.sensitivity = read_sensitivity(folder, manifest)
    with ExitStack() as stack:
        if trace is not None and config.trace is not None:
            stack.callback(trace.write, config.trace)  # also of a run that fails
        stack.callback(hub.close, "the base station is done")
        stack.callback(pipeline.close)
        yield Station(config, folder, manifest, hub, pipeline, virtual, kept)


def _medium_of(virtual: VirtualConfig) -> Medium:
    if virtual.channel == "shared":  # wires are nobody else's
        return "shared" if any(link.half_duplex for link in virtual.profiles) else "own"
    return "pooled" if virtual.bandwidth == "per-block" else "own"


def _job_words(outcome: Outcome) -> str:
    """Say what the worker did, as the live pipeline does on a timeline."""
    flight, done = outcome
    if isinstance(done, Held):
        return f"own experts of block {done.request.block}"
    assert flight is not None
    what = "head" if isinstance(done, Result) else f"stage {flight.block}"
    return f"{what} of {flight.microbatch.name}"


def in_this_process(bundle: Path) -> VirtualConfig:
    """Return what runs the device folders of a bundle where only answers matter: the time of it means nothing."""
    folders = _device_folders(bs_folder(bundle).parent)
    fastest = hardware_names()[0]
    return VirtualConfig((fastest,) * len(folders), ("ethernet-1g",), cost_shape=ExpertShape(1, 1), stage_ms=0.0)


def _device_folders(bundle: Path) -> list[Path]:
    found = [path for path in bundle.glob("device-*") if (path / MANIFEST_NAME).exists()]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def _load_devices(bundle: Path, virtual: VirtualConfig, threads: int, say: Say) -> list[VirtualDevice]:
    folders = _device_folders(bundle)
    if len(folders) != len(virtual.devices):
        raise ValueError(
            f"{bundle} has {len(folders)} device folders, --devices names {len(virtual.devices)}; name one for each, or "
            "make a bundle of another placement with wdmoe-export place"
        )
    channel = OwnChannel() if virtual.channel == "shared" else None
    shares = virtual.shares or (1.0,) * len(folders)
    devices: list[VirtualDevice] = []
    for folder, hardware, link, share in zip(folders, virtual.devices, virtual.profiles, shares, strict=True):
        manifest = read_manifest(folder, DeviceManifest)
        verify_files(folder, manifest)
        engine = load_engine(virtual.engine, folder, manifest.experts, threads)
        options = EmulationOptions(
            hardware, link.name, virtual.seed, virtual.cost_shape, virtual.cost_precision, channel is not None, share
        )
        profile = emulated_profile(options, manifest, "in virtual time", f"{engine.name} {engine.version}", engine.name)
        say(f"{folder.name}: {len(manifest.experts)} experts run here by {engine.name}")
        air = make_air(profile, folder.name, channel)
        air.send_when_ready = True
        devices.append(VirtualDevice(folder.name, manifest, engine, profile, air))
    return devices
