"""A base station in virtual time: real stages, engines and rows; devices and links are modelled.

The loop, the decisions and the latency model are those of a live run. Experts run in this process, and their replies
arrive when the emulated device on its link would have answered (`runtime/emulation.py`); a stage takes what is declared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wdmoe.bs.airtime import pooled_root
from wdmoe.bs.config import StationConfig, VirtualConfig
from wdmoe.bs.dispatch import Shipment
from wdmoe.bs.hub import Hub
from wdmoe.bs.kept import keep_modelled
from wdmoe.bs.microbatch import Result
from wdmoe.bs.pipeline import Dispatched, Held, Outcome, Pipeline
from wdmoe.bs.sensitivity import read_sensitivity
from wdmoe.bs.stages import Stages
from wdmoe.bs.station import Station, bs_folder, held_experts, introduced, introduced_kept
from wdmoe.bs.tracing import STAGES, Trace
from wdmoe.profiles.device_profile import DeviceProfile
from wdmoe.profiles.link_profile import LinkProfile
from wdmoe.profiles.modelled import ExpertShape, hardware_names
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
Times = npt.NDArray[np.float64]


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
class Transmitter:
    """What the base station decides when a microbatch sends in a block: who is sent to first, and shares of the band.

    With several microbatches in flight and a band that is divided anew for each block, each has an equal part of it
    to divide: what two of them send at the same time never takes more than there is.
    """

    devices: dict[str, VirtualDevice]
    links: dict[str, LinkProfile]
    row_bytes: float  # as charged
    in_flight: int
    per_block: bool

    def dispatch(self, shipments: Sequence[Shipment]) -> Sequence[int]:
        """Set the shares of the devices that are asked; return the order of sending: the longest tail first.

        That is Jackson's rule, as `airtime.send_order` has it; only on a shared channel does the order matter.
        """
        asked = [n for n, shipment in enumerate(shipments) if shipment.device in self.devices]
        names = [shipments[n].device for n in asked]
        rows = np.array([len(shipments[n].rows) for n in asked])
        fixed_ms = np.array(
            [
                self.links[name].round_trip_ms
                + sum(map(self.devices[name].profile.call_ms, shipments[n].request.counts))
                for n, name in zip(asked, names, strict=True)
            ]
        )
        if self.per_block and asked:
            air_ms = rows * np.array([self.links[name].row_ms(self.row_bytes) for name in names])
            for name, share in zip(names, finish_together(air_ms * self.in_flight, fixed_ms), strict=True):
                self.devices[name].air.emulator.share = float(share) / self.in_flight
        tail_ms = fixed_ms + rows * np.array([self.links[name].up_ms(self.row_bytes) for name in names])
        others = [n for n in range(len(shipments)) if n not in asked]
        return [*(asked[n] for n in np.argsort(-tail_ms, kind="stable")), *others]


def finish_together(air_ms: Times, fixed_ms: Times) -> Times:
    """Divide a band so that all devices finish at one time T: share = air / (T - fixed).

    Args:
        air_ms: [n], of each device with all the bandwidth; more than 0.
        fixed_ms: [n], what it takes besides.

    Returns:
        [n] shares that sum to 1.
    """
    shares: Times = air_ms / (pooled_root(air_ms.tolist(), fixed_ms.tolist()) - fixed_ms)
    shares /= shares.sum()
    return shares


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
    transmitter = Transmitter(
        {device.name: device for device in devices},
        {device.name: profile for device, profile in zip(devices, virtual.profiles, strict=True)},
        2.0 * (virtual.cost_shape.d_model if virtual.cost_shape is not None else manifest.model.d_model),
        config.in_flight if config.in_flight != "auto" else 1,  # it matters only with bandwidth for each block
        virtual.bandwidth == "per-block",
    )
    pipeline = Pipeline(
        hub,
        stages,
        manifest,
        make_worker,
        config.wire,
        held,
        config.when_lost == "skip",
        trace,
        medium="shared" if virtual.channel == "shared" else "pooled" if virtual.bandwidth == "per-block" else "own",
        on_dispatch=transmitter.dispatch,
    )
    pipeline.sensitivity = read_sensitivity(folder, manifest)
    with ExitStack() as stack:
        if trace is not None and config.trace is not None:
            stack.callback(trace.write, config.trace)  # also of a run that fails
        stack.callback(hub.close, "the base station is done")
        stack.callback(pipeline.close)
        yield Station(config, folder, manifest, hub, pipeline, virtual, kept)


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
