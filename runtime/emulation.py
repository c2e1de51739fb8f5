"""An emulated device: when that device on that link would have answered. Plain values, no clock of its own.

`Emulator` decides, `Air` holds what was decided until its time; whoever serves asks it what is due.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random

import msgspec

from wdmoe.profiles.device_profile import DeviceProfile, Emulated
from wdmoe.profiles.link_profile import LinkProfile, modelled_link
from wdmoe.profiles.modelled import MEMORY_SHARE, PRECISIONS, ExpertShape, memory_bytes, modelled_profile
from wdmoe.runtime.channels import Channel, OwnChannel
from wdmoe.runtime.departures import Departures
from wdmoe.runtime.errors import WdmoeError
from wdmoe.runtime.manifest import DeviceManifest
from wdmoe.runtime.messages import ExpertReply, ExpertRequest, Frame, Message, Pong, encode

_FP16_BYTES = 2
_WARN_UP_TO = 256  # tokens of a call


@dataclass(frozen=True, slots=True)
class EmulationOptions:
    """What a device is to pretend to be."""

    device: str  # of `hardware_names()`
    link: str | None = None  # of `link_names()`; None: the real link, as it is
    seed: int = 0
    cost_shape: ExpertShape | None = None  # what is charged for; None: the shape of the slice
    cost_precision: str | None = None  # None: that of the slice
    shared: bool = False  # whether a half-duplex link's channel is shared with other devices
    share: float = 1.0  # of the link's bandwidth that is this device's own


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request that this machine has answered; times in seconds of one clock."""

    arrived_s: float
    done_s: float  # when the real work ended
    down_bytes: float  # of the request, as charged
    up_bytes: float  # of the reply, as charged
    service_ms: float  # that the emulated device computes
    real_round_trip_ms: float = 0.0  # of the real link now: the emulated one stands in its place and does not add it
    sent_s: float | None = None  # when its request has the way down, as `receive` said; None: not asked for so far
    share: float | None = (
        None  # of the link's bandwidth that it gets, as its request says; None: as the emulator has it
    )


@dataclass(frozen=True, slots=True)
class Release:
    """When a reply leaves, and what it reports."""

    at_s: float
    queue_us: int  # waiting behind other requests, for the radio or for the processor
    compute_us: int


@dataclass(frozen=True, slots=True)
class Computed:
    """A request whose answer an emulated device has, and has not sent."""

    exchange: Exchange
    started_s: float
    ended_s: float
    waited_s: float  # for the radio and for the processor


class Emulator:
    """Decides when replies leave: the request comes down the link, waits its turn, is computed, and goes up the link.

    Requests are decided in the order in which they came. Half the round trip is spent on each way; the jitter is added
    at the end and keeps nobody else waiting, but no reply overtakes another: TCP would not let it.
    """

    def __init__(self, link: LinkProfile | None, seed: str, channel: Channel | None = None, share: float = 1.0) -> None:
        """Start idle.

        Args:
            link: None charges nothing for it.
            seed: the same one draws the same jitter for the same requests, however many pings came between.
            channel: that a half-duplex link shares with others; None: it has its own.
            share: of the link's bandwidth that requests get from now on; where it is set to less later, what bytes
                take longer counts as waiting for the radio.
        """
        self.share = self._usual_share = share
        self._link = link
        half_duplex = link is not None and link.half_duplex
        self._down: Channel = channel if channel is not None and half_duplex else OwnChannel()
        self._up: Channel = self._down if half_duplex else OwnChannel()
        self._jitter, self._ping_jitter = Random(f"{seed}/requests"), Random(f"{seed}/pings")
        self._free_s = float("-inf")  # when the processor is
        self._last_s = float("-inf")  # when the last reply leaves

    def release(self, exchange: Exchange) -> Release:
        """Decide when the reply leaves: never before the real work is done."""
        return self.answer(self.compute(exchange), exchange.arrived_s)

    def receive(self, arrived_s: float, down_bytes: float, share: float | None = None) -> float:
        """Take the way down for a request that comes now; return when it begins to."""
        return self._down.reserve(arrived_s, arrived_s, self._down_s(down_bytes, share or self.share))

    def compute(self, exchange: Exchange) -> Computed:
        """Decide when the answer is there: the first half of `release`."""
        share = exchange.share or self.share
        down_s = self._down_s(exchange.down_bytes, share)
        way_s = self._round_trip_s(exchange.real_round_trip_ms) / 2
        sent_s = exchange.sent_s
        if sent_s is None:
            sent_s = self.receive(exchange.arrived_s, exchange.down_bytes, share)
        received_s = sent_s + down_s + way_s
        started_s = max(received_s, self._free_s)
        self._free_s = max(started_s + exchange.service_ms / 1e3, exchange.done_s)
        waited_s = (sent_s - exchange.arrived_s) + (started_s - received_s) + self._longer_s(down_s, share)
        return Computed(exchange, started_s, self._free_s, waited_s)

    def answer(self, computed: Computed, now_s: float) -> Release:
        """Decide when the reply is back: the second half of `release`.

        Args:
            computed: in the order in which they were computed.
            now_s: nothing will be asked of the link for an earlier moment.
        """
        link, exchange = self._link, computed.exchange
        share = exchange.share or self.share
        up_s = link.up_ms(exchange.up_bytes) / share / 1e3 if link is not None else 0.0
        way_s = self._round_trip_s(exchange.real_round_trip_ms) / 2
        sent_s = self._up.reserve(now_s, computed.ended_s, up_s)
        self._last_s = max(self._last_s, sent_s + up_s + way_s + self._draw_s(self._jitter))
        waited_s = computed.waited_s + (sent_s - computed.ended_s) + self._longer_s(up_s, share)
        return Release(self._last_s, round(1e6 * waited_s), round(1e6 * (computed.ended_s - computed.started_s)))

    def pong_delay_s(self, real_round_trip_ms: float = 0.0) -> float:
        """Draw how long a ping and its answer are on the link; they wait for nobody."""
        return self._round_trip_s(real_round_trip_ms) + self._draw_s(self._ping_jitter)

    def _down_s(self, down_bytes: float, share: float) -> float:
        return self._link.down_ms(down_bytes) / share / 1e3 if self._link is not None else 0.0

    def _longer_s(self, on_air_s: float, share: float) -> float:
        return max(0.0, on_air_s * (1 - share / self._usual_share))

    def _round_trip_s(self, real_ms: float) -> float:
        return max(0.0, self._link.round_trip_ms - real_ms) / 1e3 if self._link is not None else 0.0

    def _draw_s(self, generator: Random) -> float:
        mean_ms = self._link.jitter_ms if self._link is not None else 0.0
        return generator.expovariate(1.0) * mean_ms / 1e3


@dataclass(slots=True)
class Air:
    """Holds replies and pongs until an emulated device would have sent them."""

    emulator: Emulator
    profile: DeviceProfile  # of the emulated device
    row_scale: float = 1.0  # bytes of a charged row over those of a real one
    real_round_trip_ms: Callable[[], float] = lambda: 0.0  # of the real link now, where it is known
    send_when_ready: bool = False  # ask for the way up no sooner, as where time is virtual and `due` called at `next_s`
    real_best_ms: Callable[[], float] = lambda: 0.0  # and at its best: of many pings a base station takes the smallest
    _started: deque[tuple[float, float, float, float, float | None]] = field(
        default_factory=deque
    )  # arrival, way down taken, bytes, service, share
    _held: Departures[Message] = field(default_factory=Departures)
    _ready: deque[tuple[Computed, Message]] = field(default_factory=deque)  # ascending in when they end

    def hold(self, answers: Iterable[Message], now_s: float) -> list[Message]:
        """Hold pongs back for their round trip; return what goes at once."""
        at_once: list[Message] = []
        for answer in answers:
            if isinstance(answer.header, Pong):
                self._held.hold(answer, now_s + self.emulator.pong_delay_s(self.real_best_ms()))
            else:
                at_once.append(answer)
        return at_once

    def start(self, request: ExpertRequest, frames: Sequence[Frame], arrived_s: float) -> None:
        """Note a request that is being worked on; they end in the order in which they start."""
        service_ms = sum(map(self.profile.call_ms, request.counts))
        down_bytes = self._charged_bytes(frames)
        share = request.share if request.up_mbps is None else None  # otherwise it is of the real link, see `Outlet`
        sent_s = self.emulator.receive(arrived_s, down_bytes, share)
        self._started.append((arrived_s, sent_s, down_bytes, service_ms, share))

    def finish(self, answer: Message, done_s: float) -> None:
        """Hold the answer of the oldest request that was started, and let it report the emulated times."""
        arrived_s, sent_s, down_bytes, service_ms, share = self._started.popleft()
        up_bytes = self._charged_bytes(encode(answer))
        computed = self.emulator.compute(
            Exchange(arrived_s, done_s, down_bytes, up_bytes, service_ms, self.real_round_trip_ms(), sent_s, share)
        )
        if self.send_when_ready:
            self._ready.append((computed, answer))
        else:
            self._send(computed, answer, arrived_s)

    def _send(self, computed: Computed, answer: Message, now_s: float) -> None:
        release = self.emulator.answer(computed, now_s)
        if isinstance(answer.header, ExpertReply):
            header = msgspec.structs.replace(answer.header, queue_us=release.queue_us, compute_us=release.compute_us)
            answer = Message(header, answer.rows)
        self._held.hold(answer, release.at_s)

    def due(self, now_s: float) -> list[Message]:
        """Take what leaves now."""
        messages: list[Message] = []
        while self._ready and self._ready[0][0].ended_s <= now_s:
            computed, answer = self._ready.popleft()
            self._send(computed, answer, computed.ended_s)
        messages += self._held.due(now_s)
        return messages

    @property
    def next_s(self) -> float:
        """When something is due next; infinity if nothing is held."""
        ready_s = self._ready[0][0].ended_s if self._ready else float("inf")
        return min(ready_s, self._held.next_s)

    def wait_s(self, now_s: float, at_most_s: float) -> float:
        """Return how long to sleep: until shortly before something is due, and not at all from then on."""
        return self._held.wait_s(now_s, at_most_s)

    def _charged_bytes(self, frames: Sequence[Frame]) -> float:
        return len(frames[0]) + self.row_scale * sum(map(len, frames[1:]))


def check_memory(options: EmulationOptions, manifest: DeviceManifest) -> tuple[ExpertShape, str]:
    """Return the shape and precision that experts are charged as, if so many of them fit into the emulated device.

    Raises:
        WdmoeError: the slice would not fit into the memory of that device.
    """
    model = manifest.model
    shape = options.cost_shape or ExpertShape(model.d_model, model.d_ff)
    precision = options.cost_precision or (manifest.precision if manifest.precision in PRECISIONS else "fp16")
    needed, usable = len(manifest.experts) * shape.weight_bytes(precision), MEMORY_SHARE * memory_bytes(options.device)
    if needed > usable:
        raise WdmoeError(
            f"{options.device} cannot hold this slice: {len(manifest.experts)} experts of {shape.d_model}x{shape.d_ff} "
            f"in {precision} take {needed / 1e9:.1f} GB, experts may take {usable / 1e9:.1f} of its "
            f"{memory_bytes(options.device) / 1e9:g} GB; emulate a larger device, place fewer experts on each "
            "(wdmoe-export --experts-per-device), or give --cost-precision int4 or another --cost-shape"
        )
    return shape, precision


def emulated_profile(
    options: EmulationOptions, manifest: DeviceManifest, host: str, software: str, engine: str
) -> DeviceProfile:
    """Return the profile that an emulated device sends in its hello: costs of one device, experts of this slice.

    Args:
        options: what to pretend to be.
        manifest: of the slice.
        host: the machine that stands in for it.
        software: of the engine that really runs.
        engine: its name.

    Raises:
        WdmoeError: the slice would not fit into the memory of that device.
    """
    model = manifest.model
    shape, precision = check_memory(options, manifest)
    modelled = modelled_profile(options.device, precision, shape)
    link = modelled_link(options.link) if options.link is not None else None
    row_bytes = shape.d_model * _FP16_BYTES
    return msgspec.structs.replace(
        modelled,
        device=f"{modelled.device} (emulated {host})",
        software=software,
        engine=engine,
        precision=manifest.precision,
        d_model=model.d_model,
        d_ff=model.d_ff,
        origin="emulated",
        sources=(),
        emulated=Emulated(
            options.device,
            link.name if link is not None else None,
            options.seed,
            shape.d_model,
            shape.d_ff,
            precision,
            shared=link is not None and link.half_duplex and options.shared,
            share=options.share,
        ),
        row_link_ms=link.row_ms(row_bytes) / options.share if link is not None else 0.0,
        row_up_ms=link.up_ms(row_bytes) / options.share if link is not None else None,
    )


def make_air(profile: DeviceProfile, name: str, channel: Channel | None = None) -> Air:
    """Make what holds the replies of an emulated device.

    Args:
        profile: of `emulated_profile`.
        name: of the device; with the seed it decides the jitter, so that two devices do not draw the same.
        channel: that a half-duplex link shares with other devices; None: it has its own.
    """
    emulated = profile.emulated
    assert emulated is not None
    link = modelled_link(emulated.link) if emulated.link is not None else None
    emulator = Emulator(link, f"{emulated.seed}/{name}", channel, emulated.share)
    return Air(emulator, profile, emulated.d_model / profile.d_model)


def warn_if_slower(measured: DeviceProfile, emulated: DeviceProfile, say: Callable[[str], None]) -> None:
    """Say where this machine is slower than what it emulates: there it cannot keep up."""
    slower = [n for n, ms in measured.curve() if n <= _WARN_UP_TO and ms > emulated.call_ms(n)]
    if slower:
        counts = ", ".join(map(str, slower))
        say(
            f"this machine is slower than what it emulates at {counts} tokens a call: there replies are late and report "
            "the real time; charge a larger expert with --cost-shape, or emulate a slower device"
        )
