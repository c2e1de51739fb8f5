"""The link and the worker in virtual time: what happens next happens next, and nothing waits for real."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest

from wdmoe.profiles.link_profile import LinkProfile
from wdmoe.runtime.channels import OwnChannel
from wdmoe.runtime.clock import VirtualClock
from wdmoe.runtime.emulation import Computed, Emulator, Exchange
from wdmoe.runtime.links import Parcel
from wdmoe.runtime.messages import Frame
from wdmoe.runtime.virtual_time import VirtualLink, VirtualWorker


class Echo:
    """Answers what it was sent, some time later."""

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s
        self._coming: list[tuple[float, Sequence[Frame]]] = []

    def take(self, frames: Sequence[Frame], now_s: float) -> None:
        self._coming.append((now_s + self._after_s, frames))

    def next_s(self) -> float:
        return min((at_s for at_s, _ in self._coming), default=float("inf"))

    def due(self, now_s: float) -> Iterable[Sequence[Frame]]:
        due = [frames for at_s, frames in self._coming if at_s <= now_s]
        self._coming = [(at_s, frames) for at_s, frames in self._coming if at_s > now_s]
        return due


def test_waiting_goes_on_to_what_happens_next_and_no_further() -> None:
    clock = VirtualClock()
    link = VirtualLink({b"slow": Echo(0.3), b"quick": Echo(0.1)}, clock)
    assert link.exchange([Parcel(b"slow", [b"s"]), Parcel(b"quick", [b"q"]), Parcel(b"gone", [b"-"])], 0.05) == []
    assert clock.now_s() == 0.05
    assert link.exchange([], 1.0) == [Parcel(b"quick", [b"q"])] and clock.now_s() == 0.1
    link.wake_at(0.2)
    assert link.exchange([], 1.0) == [] and clock.now_s() == 0.2
    link.wake()
    assert link.exchange([], 1.0) == [] and clock.now_s() == 0.2
    assert link.exchange([], 1.0) == [Parcel(b"slow", [b"s"])] and clock.now_s() == 0.3


def test_jobs_run_at_once_and_end_one_after_another() -> None:
    clock, wakes, ran = VirtualClock(), list[float](), list[int]()

    def job(number: int) -> int:
        ran.append(number)
        if number == 3:
            raise RuntimeError("no")
        return number

    worker: VirtualWorker[int] = VirtualWorker(clock, lambda result: 0.0 if result is None else 0.5, wakes.append)
    for number in (1, 2, 3):
        worker.submit(lambda number=number: job(number))  # type: ignore[misc]
    assert ran == [1, 2, 3] and wakes == [0.5, 1.0, 1.0] and worker.finished() == []
    clock.advance_to(0.5)
    (first,) = worker.finished()
    assert (first.result, first.took_s) == (1, 0.5)
    clock.advance_to(1.0)
    second, third = worker.finished()
    assert second.result == 2 and isinstance(third.error, RuntimeError)
    worker.submit(lambda: job(4))
    worker.abandon()
    clock.advance_to(9.0)
    assert worker.finished() == []


def test_requests_go_first_on_a_shared_channel_and_replies_as_they_are_ready() -> None:
    # A kilobyte takes a millisecond, either way, and half a round trip is a millisecond too.
    wire, channel = LinkProfile("wire", "", 8.0, 8.0, 2.0, 0.0, True, ()), OwnChannel()
    a, b = (Emulator(wire, name, channel) for name in "ab")

    def computed(emulator: Emulator, down_kb: float, service_ms: float, up_kb: float) -> Computed:
        return emulator.compute(Exchange(0.0, 0.0, 1e3 * down_kb, 1e3 * up_kb, service_ms))

    of_a, of_b = computed(a, 4, 10, 1), computed(b, 2, 1, 8)
    # Sent 0 to 4 and 4 to 6; there at 5 and 7; computed at 15 and 8; b's reply is on the air from 8 to 16.
    assert [of_a.ended_s, of_b.ended_s] == pytest.approx([0.015, 0.008])
    assert b.answer(of_b, of_b.ended_s).at_s == pytest.approx(0.017)
    released = a.answer(of_a, of_a.ended_s)
    assert released.at_s == pytest.approx(0.018) and released.queue_us == 1000
