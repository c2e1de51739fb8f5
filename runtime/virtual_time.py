"""The seams to network and worker in virtual time: what computes runs at once, what it would have taken is declared.

Peers answer at moments of a virtual clock, jobs end at moments of it, and waiting moves it to the next of them: the loop
above is the one that runs over sockets, deterministic, and as fast as this machine computes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from wdmoe.runtime.clock import VirtualClock
from wdmoe.runtime.links import Parcel, Peer
from wdmoe.runtime.messages import Frame
from wdmoe.runtime.worker import Done, run_job

Result = TypeVar("Result")
Frames = Sequence[Frame]


class TimedPeer(Protocol):
    """The other end of a `VirtualLink`."""

    def take(self, frames: Frames, now_s: float) -> None:
        """Take a message that was sent now."""
        ...

    def next_s(self) -> float:
        """When something of its arrives next; infinity if nothing is on its way."""
        ...

    def due(self, now_s: float) -> Iterable[Frames]:
        """Take the messages that have arrived by now."""
        ...


class VirtualLink:
    """The base station's side of a network whose peers say when their messages arrive; see `Link`."""

    def __init__(self, peers: Mapping[Peer, TimedPeer], clock: VirtualClock) -> None:
        """Connect peers, in the order in which those that arrive at one moment are heard."""
        self._peers = dict(peers)
        self._clock = clock
        self._wakes: list[float] = []  # a heap

    def wake_at(self, at_s: float) -> None:
        """Let `exchange` return at a moment, if nothing comes before."""
        heapq.heappush(self._wakes, at_s)

    def exchange(self, outgoing: Iterable[Parcel], timeout_s: float) -> list[Parcel]:
        """Send, then return what has arrived; with nothing there, go on to the next moment at which something happens."""
        now_s = self._clock.now_s()
        for parcel in outgoing:
            if (peer := self._peers.get(parcel.peer)) is not None:
                # Copied, as a socket would: nobody may count on sharing memory with a peer.
                peer.take([bytes(frame) for frame in parcel.frames], now_s)
        next_s = min(min((peer.next_s() for peer in self._peers.values()), default=float("inf")), self._next_wake_s())
        self._clock.advance_to(min(next_s, now_s + max(0.0, timeout_s)))
        now_s = self._clock.now_s()
        while self._next_wake_s() <= now_s:
            heapq.heappop(self._wakes)
        return [
            Parcel(name, [bytes(frame) for frame in frames])
            for name, peer in self._peers.items()
            for frames in peer.due(now_s)
        ]

    def wake(self) -> None:
        """Let the next `exchange` return without waiting."""
        self.wake_at(self._clock.now_s())

    def redial(self) -> None:
        """Nothing to dial."""

    def close(self) -> None:
        """Nothing to free."""

    def _next_wake_s(self) -> float:
        return self._wakes[0] if self._wakes else float("inf")


class VirtualWorker(Generic[Result]):
    """Runs each job when it is submitted, and says that it has ended when its declared time is over; see `Worker`."""

    def __init__(
        self,
        clock: VirtualClock,
        cost_s: Callable[[Result | None], float],
        wake_at: Callable[[float], None],
        on_job: Callable[[Result | None, float, float], None] = lambda result, began_s, ended_s: None,
    ) -> None:
        """Start idle.

        Args:
            clock: of the loop.
            cost_s: how long a job takes, by its result; None for one that failed.
            wake_at: called with the moment at which a job will have ended.
            on_job: told each result with the moments between which it is worked on.
        """
        self._clock = clock
        self._cost_s = cost_s
        self._wake_at = wake_at
        self._on_job = on_job
        self._ended: list[tuple[float, Done[Result]]] = []  # ascending: one job after another
        self._free_s = float("-inf")

    def submit(self, job: Callable[[], Result], short: bool = False) -> None:
        """Run a job; it counts as ended when those before it and its own time are over."""
        done = run_job(job)
        took_s = self._cost_s(done.result)
        began_s = max(self._clock.now_s(), self._free_s)
        self._free_s = began_s + took_s
        self._ended.append((self._free_s, Done(done.result, done.error, took_s)))
        self._on_job(done.result, began_s, self._free_s)
        self._wake_at(self._free_s)

    def due(self) -> bool:
        """Whether anything has ended by now."""
        return bool(self._ended) and self._ended[0][0] <= self._clock.now_s()

    def finished(self) -> list[Done[Result]]:
        """Take what has ended by now."""
        now_s = self._clock.now_s()
        taken = [done for at_s, done in self._ended if at_s <= now_s]
        del self._ended[: len(taken)]
        return taken

    def abandon(self) -> None:
        """Forget what was submitted."""
        self._ended.clear()
        self._free_s = float("-inf")

    def close(self) -> None:
        """Nothing to stop."""
