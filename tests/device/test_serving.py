"""How a device leaves: the base station hears of it, and nobody can keep it."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from inprocess import make_service
from processes import command
from processes import stop as stop_processes

from wdmoe.bs.hub import HEARTBEAT_S, Hub, Left
from wdmoe.device.service import DeviceService
from wdmoe.device.serving import serve
from wdmoe.runtime.clock import RealClock, VirtualClock
from wdmoe.runtime.links import BS, Parcel, ZmqLink, dial, listen
from wdmoe.runtime.manifest import BsManifest, read_manifest
from wdmoe.runtime.messages import (
    MAX_ROWS,
    PROTOCOL_VERSION,
    ExpertRequest,
    Goodbye,
    Header,
    Hello,
    Message,
    Ping,
    Welcome,
    decode,
    encode,
)
from wdmoe.runtime.stopping import StopFlag
from wdmoe.runtime.worker import InlineWorker


@pytest.fixture
def service(bundle: Path) -> DeviceService:
    return make_service(bundle / "device-1", RealClock())  # type: ignore[arg-type]


@pytest.fixture
def station(bundle: Path) -> Iterator[tuple[Hub, ZmqLink]]:
    link = listen("tcp://127.0.0.1:0", 1 << 20)
    yield Hub(link, read_manifest(bundle / "bs", BsManifest), RealClock()), link
    if not link._socket.closed:
        link.close()


@contextmanager
def stopping(service: DeviceService, address: str) -> Iterator[Callable[[], None]]:
    """Let a device serve on a thread until it is told to stop, then close its link at once, as the command does."""
    link, stop = dial(address, 1 << 22), StopFlag()
    worker: InlineWorker[Message] = InlineWorker(link.wake)

    def run() -> None:
        serve(service, link, worker, stop, lambda _: None)
        link.close()

    def stop_serving() -> None:
        stop.set()
        link.wake()

    service.welcomed = False
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield stop_serving
    finally:
        stop_serving()
        thread.join()


def turn_until_welcome(hub: Hub, service: DeviceService) -> None:
    deadline_s = time.monotonic() + 30
    while not service.welcomed:
        assert time.monotonic() < deadline_s
        hub.turn(0.05)


class Script:
    """A link that says what it is told to, one parcel each time it is asked, and then nothing, while time passes."""

    def __init__(self, clock: VirtualClock, said: list[Message], then: Callable[[], None]) -> None:
        self.sent: list[Header] = []
        self._clock, self._said, self._then = clock, said, then

    def exchange(self, outgoing: Iterable[Parcel], timeout_s: float) -> list[Parcel]:
        self.sent += [decode(parcel.frames, 32).header for parcel in outgoing]
        if not self._said:
            self._clock.advance(timeout_s)
            return []
        message = self._said.pop(0)
        if isinstance(message.header, Welcome):
            self._then()
        return [Parcel(BS, encode(message))]

    def wake(self) -> None: ...

    def redial(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize(("pings", "heard"), [(0, True), (3, True), (3, False)])
def test_it_leaves_once_its_goodbye_was_heard_or_after_half_a_second(bundle: Path, pings: int, heard: bool) -> None:
    clock, stop = VirtualClock(), StopFlag()
    said = [Message(Welcome(PROTOCOL_VERSION, 1.0)), *pings * [Message(Ping(1))]] + heard * [Message(Goodbye("heard"))]
    link = Script(clock, said, stop.set)
    serve(make_service(bundle / "device-1", clock), link, InlineWorker(lambda: None), stop, lambda _: None)
    assert [type(header) for header in link.sent] == [Hello, Goodbye]
    assert said == [] and clock.now_s() == pytest.approx(0.0 if heard else 0.5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_device_process_that_is_told_to_stop_is_missed_at_once(
    bundle: Path, station: tuple[Hub, ZmqLink], number: signal.Signals
) -> None:
    hub, link = station
    options = ["--bundle", bundle / "device-1", "--bs", link.address, "--engine", "numpy"]
    process = subprocess.Popen(command("wdmoe-device", *options), stderr=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + 30
        while not any(device.latency.round_trip_ms for device in hub.devices.values()):
            assert time.monotonic() < deadline_s
            hub.turn(0.05)
        process.send_signal(number)
        told_s = time.monotonic()
        while hub.devices and time.monotonic() - told_s < 3 * HEARTBEAT_S:
            hub.turn(0.01)
        assert time.monotonic() - told_s < 0.5
        hub.turn(0.0)
        assert process.wait(10) == 0
        assert time.monotonic() - told_s < 2.0  # of which a second is for the end of a Python process
    finally:
        stop_processes([process])


def large_request(service: DeviceService) -> Message:
    """A request that takes long to travel and is refused at once."""
    entries = np.arange(MAX_ROWS, dtype="<u4").tobytes()
    expert = service.manifest.model.n_experts
    header = ExpertRequest(1, 0, MAX_ROWS, "fp32", (expert,), (MAX_ROWS,), entries, np.ones(MAX_ROWS, "<f4").tobytes())
    return Message(header, np.ones((MAX_ROWS, service.manifest.model.d_model), "<f4"))


def test_the_base_station_hears_at_once_when_a_device_stops_though_requests_are_on_their_way(
    service: DeviceService, station: tuple[Hub, ZmqLink]
) -> None:
    hub, link = station
    request = large_request(service)
    for _ in range(5):
        with stopping(service, link.address) as stop:
            turn_until_welcome(hub, service)
            for _ in range(20):
                hub.send(service.name, request)
            hub.turn(0.0)
            stop()
            stopped_s = time.monotonic()
            left: list[Left] = []
            while not left and time.monotonic() - stopped_s < 0.5:
                left += [event for event in hub.turn(0.01) if isinstance(event, Left)]
            assert left == [Left("device-1", "stopped by its operator")]
            hub.turn(0.0)  # sends the answer
        assert time.monotonic() - stopped_s < 1.0


@pytest.mark.parametrize("there", [True, False], ids=["frozen", "gone"])
def test_a_device_stops_soon_when_nobody_hears_its_goodbye(
    service: DeviceService, station: tuple[Hub, ZmqLink], there: bool
) -> None:
    hub, link = station
    with stopping(service, link.address) as stop:
        turn_until_welcome(hub, service)
        if not there:
            link.close()
        stop()
        started_s = time.monotonic()
    assert time.monotonic() - started_s < 1.0
