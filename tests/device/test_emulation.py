"""What an emulated device decides, in virtual time; and that the serving loop keeps to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from inprocess import make_service

from wdmoe.bs.latency import LatencyTracker
from wdmoe.device.loopback import LoopbackMeter
from wdmoe.device.service import DeviceService
from wdmoe.device.serving import serve
from wdmoe.profiles.device_profile import DeviceProfile, Point
from wdmoe.profiles.link_profile import LinkProfile, link_names, modelled_link
from wdmoe.profiles.modelled import ExpertShape, modelled_profile
from wdmoe.runtime.channels import SharedChannel
from wdmoe.runtime.clock import VirtualClock
from wdmoe.runtime.emulation import (
    Air,
    EmulationOptions,
    Emulator,
    Exchange,
    emulated_profile,
    make_air,
    warn_if_slower,
)
from wdmoe.runtime.errors import WdmoeError
from wdmoe.runtime.links import BS, Parcel
from wdmoe.runtime.messages import (
    PROTOCOL_VERSION,
    ErrorReport,
    ExpertReply,
    ExpertRequest,
    Goodbye,
    Message,
    Ping,
    Pong,
    Welcome,
    decode,
    encode,
)
from wdmoe.runtime.stopping import StopFlag
from wdmoe.runtime.worker import InlineWorker

MIXTRAL = ExpertShape(4096, 14336)


def wire(half_duplex: bool = True, jitter_ms: float = 0.0) -> LinkProfile:
    """A kilobyte takes a millisecond, either way, and half a round trip is a millisecond too."""
    return LinkProfile("wire", "", 8.0, 8.0, 2.0, jitter_ms, half_duplex, ())


def exchange(arrived_ms: float, down_kb: float, up_kb: float, service_ms: float, real_ms: float = 0.1) -> Exchange:
    return Exchange(arrived_ms / 1e3, (arrived_ms + real_ms) / 1e3, 1e3 * down_kb, 1e3 * up_kb, service_ms)


def decided(emulator: Emulator, *exchanges: Exchange) -> list[tuple[object, float, float]]:
    releases = [emulator.release(e) for e in exchanges]
    return [(pytest.approx(1e3 * r.at_s), r.queue_us / 1e3, r.compute_us / 1e3) for r in releases]


def test_a_request_comes_down_is_computed_and_goes_up() -> None:
    assert decided(Emulator(wire(), "s"), exchange(100, 3, 2, 10)) == [(100 + 3 + 1 + 10 + 2 + 1, 0, 10)]


def test_without_a_link_only_the_computing_is_charged() -> None:
    assert decided(Emulator(None, "s"), exchange(100, 3, 2, 10)) == [(110, 0, 10)]


def test_the_real_link_is_a_part_of_the_emulated_one() -> None:
    def times(real_ms: float) -> list[tuple[object, float, float]]:
        return decided(Emulator(wire(), "s"), replace(exchange(100, 3, 2, 10), real_round_trip_ms=real_ms))

    assert times(0.5) == [(100 + 3 + 1 + 10 + 2 + 1 - 0.5, 0, 10)]
    assert times(9.0) == [(100 + 3 + 10 + 2, 0, 10)]
    assert Emulator(wire(), "s").pong_delay_s(0.5) == pytest.approx(1.5e-3)


def test_the_processor_takes_one_request_after_another_and_says_how_long_each_waited() -> None:
    got = decided(Emulator(wire(), "s"), exchange(0, 1, 1, 10), exchange(0, 1, 1, 10))
    # The second is sent from 1 to 2, received at 3, computed from 12 to 22.
    assert got == [(14, 0, 10), (24, 1 + 9, 10)]


def test_on_a_half_duplex_link_what_comes_waits_for_what_goes() -> None:
    first, second = exchange(0, 1, 8, 2), exchange(5, 3, 1, 2)
    assert decided(Emulator(wire(half_duplex=True), "s"), first, second)[1] == (12 + 3 + 1 + 2 + 1 + 1, 7, 2)
    assert decided(Emulator(wire(half_duplex=False), "s"), first, second)[1] == (12 + 1 + 1, 1, 2)


def test_a_short_request_goes_down_in_a_gap_of_the_channel() -> None:
    got = decided(Emulator(wire(), "s"), exchange(0, 1, 1, 20), exchange(5, 2, 1, 1))
    assert got[1] == (24 + 1 + 1 - 1, 14, 1)  # received at 8, waits for the processor until 22, up behind the first


def test_it_is_never_faster_than_the_real_work() -> None:
    assert decided(Emulator(wire(), "s"), exchange(0, 1, 1, 10, real_ms=50)) == [(52, 0, 48)]


def test_no_reply_overtakes_another() -> None:
    emulator = Emulator(wire(jitter_ms=20.0), "s")
    times = [emulator.release(exchange(5 * n, 1, 1, 1)).at_s for n in range(200)]
    assert times == sorted(times)


def test_jitter_has_its_mean_and_comes_from_the_seed_alone() -> None:
    def times(seed: str, pings: int = 0) -> list[float]:
        emulator = Emulator(wire(jitter_ms=2.0), seed)
        delays = []
        for n in range(2000):
            for _ in range(pings):
                emulator.pong_delay_s()
            delays.append(1e3 * emulator.release(exchange(100 * n, 1, 1, 1)).at_s - 100 * n - 5)
        return delays

    drawn = times("7/device-0")
    assert np.mean(drawn) == pytest.approx(2.0, rel=0.1) and min(drawn) >= 0
    assert times("7/device-0", pings=3) == drawn
    assert times("7/device-1") != drawn


def test_devices_on_one_channel_wait_for_each_other_and_on_a_cable_they_do_not(tmp_path: Path) -> None:
    def second(half_duplex: bool) -> tuple[object, float, float]:
        path = tmp_path / f"channel-{half_duplex}"
        one, other = (Emulator(wire(half_duplex), name, SharedChannel(path)) for name in "ab")
        one.release(exchange(0, 4, 1, 10))
        return decided(other, exchange(1, 2, 1, 10))[0]

    assert second(True) == (4 + 2 + 1 + 10 + 1 + 1, 3, 10)
    assert second(False) == (1 + 2 + 1 + 10 + 1 + 1, 0, 10)


def test_the_way_down_is_taken_when_a_request_comes_not_when_it_is_computed(tmp_path: Path) -> None:
    one, other = (Emulator(wire(True), name, SharedChannel(tmp_path / "channel")) for name in "ab")
    first, second = exchange(0, 4, 1, 10), exchange(0, 2, 1, 10)
    sent_s = [emulator.receive(0.0, e.down_bytes) for emulator, e in ((one, first), (other, second))]
    assert sent_s == pytest.approx([0.0, 4e-3])
    assert decided(other, replace(second, sent_s=sent_s[1]))[0] == (4 + 2 + 1 + 10 + 1 + 1, 4, 10)
    assert decided(one, replace(first, sent_s=sent_s[0]))[0][1:] == (0, 10)


@pytest.fixture
def service(bundle: Path) -> DeviceService:
    return make_service(bundle / "device-1", VirtualClock())


def pretended(options: EmulationOptions, service: DeviceService) -> DeviceProfile:
    measured = service.profile
    return emulated_profile(options, service.manifest, f"on {measured.device}", measured.software, measured.engine)


def emulating(service: DeviceService, options: EmulationOptions) -> Air:
    service.profile = pretended(options, service)
    return make_air(service.profile, service.name)


def request(service: DeviceService, request_id: int, rows: int) -> Message:
    index, weights = np.arange(rows, dtype="<u4").tobytes(), np.ones(rows, "<f4").tobytes()
    header = ExpertRequest(request_id, 0, rows, "fp16", (2,), (rows,), index, weights)
    return Message(header, np.ones((rows, service.manifest.model.d_model), "<f2"))


def test_an_emulated_device_says_so_and_keeps_the_shape_of_its_slice(service: DeviceService) -> None:
    options = EmulationOptions("orin-nano-8gb", "wifi-5ghz", 7, MIXTRAL, "int4")
    profile, modelled = (
        pretended(options, service),
        modelled_profile("orin-nano-8gb", "int4", MIXTRAL),
    )
    assert profile.origin == "emulated" and "emulated on" in profile.device
    assert str(profile.emulated) == "emulated orin-nano-8gb over wifi-5ghz-mid, charged as 4096x14336 int4"
    assert (profile.d_model, profile.d_ff) == (service.manifest.model.d_model, service.manifest.model.d_ff)
    assert profile.emulated is not None and not profile.emulated.shared
    shared = pretended(replace(options, shared=True), service)
    assert "over shared wifi-5ghz-mid" in str(shared.emulated)
    assert profile.points == modelled.points and profile.row_link_ms == pytest.approx(2 * 8192 * 8e-3 / 234)


def test_a_slice_that_would_not_fit_is_refused_with_the_sums(service: DeviceService) -> None:
    options = EmulationOptions("orin-nano-8gb", cost_shape=ExpertShape(16384, 53248), cost_precision="fp16")
    with pytest.raises(
        WdmoeError, match=r"4 experts of 16384x53248 in fp16 take 20\.9 GB, experts may take 6\.4 of its 8"
    ):
        pretended(options, service)


def test_a_machine_that_is_slower_than_what_it_emulates_says_where(service: DeviceService) -> None:
    said: list[str] = []
    slow = msgspec.structs.replace(service.profile, points=(Point(1, 0.1, 0.1), Point(64, 500.0, 500.0)))
    warn_if_slower(slow, modelled_profile("agx-orin-64gb", "fp16", MIXTRAL), said.append)
    assert len(said) == 1 and "at 64 tokens a call" in said[0]


class Script:
    """The other end of a link in virtual time: says what it is to say when it is to, and notes when answers came."""

    def __init__(self, clock: VirtualClock, said: list[tuple[float, Message]], d_model: int, until_s: float) -> None:
        self.stop = StopFlag()
        self.heard: list[tuple[float, Message]] = []
        self._clock, self._said, self._d_model, self._until_s = clock, said, d_model, until_s

    def exchange(self, outgoing: Iterable[Parcel], timeout_s: float) -> list[Parcel]:
        now_s = self._clock.now_s()
        self.heard += [(now_s, decode([bytes(f) for f in parcel.frames], self._d_model)) for parcel in outgoing]
        next_s = self._said[0][0] if self._said else float("inf")
        if next_s > now_s:  # a real exchange takes a few microseconds
            self._clock.advance(max(1e-5, min(timeout_s, next_s - now_s)))
        if self._clock.now_s() >= self._until_s:
            self.stop.set()
        return [Parcel(BS, encode(self._said.pop(0)[1]))] if next_s <= self._clock.now_s() else []

    def wake(self) -> None: ...

    def redial(self) -> None: ...

    def close(self) -> None: ...


def heard(service: DeviceService, air: Air | None, said: list[tuple[float, Message]]) -> dict[object, float]:
    """Serve a script; return when each answer left, by its id or nonce."""
    clock = service.clock
    assert isinstance(clock, VirtualClock)
    script = Script(clock, [(0.0, Message(Welcome(PROTOCOL_VERSION, 1.0))), *said], service.manifest.model.d_model, 5.0)
    serve(service, script, InlineWorker(lambda: None), script.stop, lambda _: None, air)
    times: dict[object, float] = {}
    for at_s, message in script.heard:
        match message.header:
            case ExpertReply(request_id=request_id) as reply:
                times[request_id] = at_s
                times[f"{request_id} queue"], times[f"{request_id} compute"] = (
                    reply.queue_us / 1e6,
                    reply.compute_us / 1e6,
                )
            case Pong(nonce=nonce):
                times[f"ping {nonce}"] = at_s
            case ErrorReport(request_id=request_id):
                times[f"error {request_id}"] = at_s
    return times


def test_the_loop_holds_replies_until_their_time_and_pings_do_not_wait_behind_them(service: DeviceService) -> None:
    options = EmulationOptions("orin-nano-8gb", "wifi-5ghz-far", 7, MIXTRAL, "fp16")
    air, twin = emulating(service, options), Emulator(modelled_link("wifi-5ghz-far"), f"7/{service.name}")
    messages = [request(service, 1, 3), request(service, 2, 64)]
    said = [(1.0, messages[0]), (1.001, messages[1]), (1.002, Message(Ping(9)))]
    times = heard(service, air, said)
    for number, (arrived_s, message) in enumerate(said[:2], start=1):
        header, rows = encode(message)
        n_rows = len(rows) // (2 * service.manifest.model.d_model)
        reply_header = len(encode(Message(ExpertReply(number, n_rows, "fp16", 10, 10)))[0])
        row_bytes = n_rows * 2 * 4096
        service_ms = service.profile.call_ms(n_rows)
        expected = twin.release(
            Exchange(arrived_s, arrived_s, len(header) + row_bytes, reply_header + row_bytes, service_ms)
        )
        assert times[number] == pytest.approx(expected.at_s, abs=2e-5)
        assert times[f"{number} compute"] == pytest.approx(service_ms / 1e3, abs=1e-6)
        assert times[f"{number} queue"] == pytest.approx(expected.queue_us / 1e6, abs=2e-5)
    assert 1.007 <= times["ping 9"] < times[2]


def test_what_is_refused_is_refused_at_once_and_without_emulation_nothing_is_held(service: DeviceService) -> None:
    header = request(service, 1, 1).header
    assert isinstance(header, ExpertRequest)
    stranger = Message(
        msgspec.structs.replace(header, experts=(0,)), np.ones((1, service.manifest.model.d_model), "<f2")
    )
    said = [(1.0, stranger), (2.0, request(service, 2, 1)), (3.0, Message(Ping(9)))]
    plain = heard(service, None, list(said))
    assert plain["error 1"] == 1.0 and plain[2] == 2.0 and plain["ping 9"] == 3.0


@pytest.mark.parametrize("link", [None, *link_names()])
def test_the_base_stations_prediction_is_what_the_emulated_device_does(
    service: DeviceService, link: str | None
) -> None:
    air = emulating(service, EmulationOptions("agx-orin-64gb", link, 0, MIXTRAL, "fp16"))
    tracker = LatencyTracker(service.profile)
    rng = np.random.default_rng(0)
    for _ in range(30):
        tracker.observe_round_trip(1e3 * air.emulator.pong_delay_s() + 0.01)
    for counts, rows, took_ms in _took_ms(air, service, rng):
        tracker.observe_request(counts, took_ms, rows)
    assert tracker.model().correction == pytest.approx(1.0, abs=0.12)


def _took_ms(air: Air, service: DeviceService, rng: np.random.Generator) -> list[tuple[tuple[int, ...], int, float]]:
    """Let requests through one at a time: counts, rows and time without queueing of each."""
    taken = []
    for number in range(100, 140):
        arrived_s, rows = 10.0 * number, int(rng.integers(1, 200))
        message = request(service, number, rows)
        assert isinstance(message.header, ExpertRequest)
        air.start(message.header, encode(message), arrived_s)
        air.finish(Message(ExpertReply(number, rows, "fp16", 0, 0), message.rows), arrived_s)
        left_s = arrived_s + air.wait_s(arrived_s, float("inf")) + 1e-3  # it wakes a millisecond before
        assert not air.due(left_s - 1e-6)
        due = air.due(left_s + 1e-6)
        assert isinstance(due[0].header, ExpertReply)
        taken.append((message.header.counts, rows, 1e3 * (left_s - arrived_s) - due[0].header.queue_us / 1e3))
    return taken


def test_the_loopback_of_this_machine_takes_between_ten_microseconds_and_a_second() -> None:
    meter = LoopbackMeter()
    measured_ms = meter.round_trip_ms
    meter.close()
    assert 0.01 < measured_ms < 1000


def told(message: Message, share: float, up_mbps: float | None) -> Message:
    return Message(msgspec.structs.replace(message.header, share=share, up_mbps=up_mbps), message.rows)


def test_replies_leave_at_the_rate_that_their_requests_tell_and_pings_at_once(service: DeviceService) -> None:
    row_bytes, mbps, share = 2 * service.manifest.model.d_model, 0.1, 0.25
    alone_s = 8 * row_bytes * 8e-6 / mbps
    said = [(1.0, told(request(service, 1, 8), share, mbps)), (1.001, told(request(service, 2, 8), share, mbps))]
    said += [(1.002, Message(Ping(9))), (4.0, request(service, 3, 8))]
    times = heard(service, None, said)
    assert times[1] == pytest.approx(1.0 + 3 * alone_s, abs=1e-3)  # there once the share would have carried it
    assert times[2] == pytest.approx(1.0 + 7 * alone_s, abs=1e-3)
    assert times["1 queue"] == pytest.approx(3 * alone_s, abs=1e-3)  # what it waited is none of the device's slowness
    assert times["ping 9"] == pytest.approx(1.002, abs=1e-3) and times[3] == pytest.approx(4.0, abs=1e-3)


def test_what_is_held_for_a_base_station_that_left_holds_up_nothing_for_the_next(service: DeviceService) -> None:
    said = [(1.0, told(request(service, 1, 8), 1e-6, 1e-3)), (1.1, Message(Goodbye("done")))]
    said += [(1.2, Message(Welcome(PROTOCOL_VERSION, 1.0))), (1.3, told(request(service, 2, 8), 0.5, 100.0))]
    times = heard(service, None, said)
    assert 1 not in times and times[2] == pytest.approx(1.3, abs=1e-3)


@pytest.mark.parametrize("real", [False, True])
def test_a_share_is_of_the_emulated_link_or_of_the_real_one_never_of_both(service: DeviceService, real: bool) -> None:
    air = emulating(service, EmulationOptions("orin-nano-8gb", "wifi-5ghz-far"))
    air.emulator = Emulator(wire(), "s")
    air.row_scale, row_bytes = 1000.0, 2 * service.manifest.model.d_model  # a row is 64 ms of the emulated link
    air.profile = msgspec.structs.replace(air.profile, points=(Point(1, 1.0, 1.0),))
    whole = heard(service, air, [(1.0, request(service, 1, 1))])[1] - 1.0
    mbps = row_bytes * 8e-6 / 0.2  # a row is 200 ms of the real link
    service.clock, air.emulator = VirtualClock(), Emulator(wire(), "s")
    divided = heard(service, air, [(1.0, told(request(service, 1, 1), 0.5, mbps if real else None))])[1] - 1.0
    assert divided - whole == pytest.approx(0.2 if real else 2 * 0.064, abs=1e-3)
