"""Where long computations run, so that the loop that owns the sockets never waits for them."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Result = TypeVar("Result")
_ABANDON_WAIT_S = 60.0  # a job is one stage, or the experts of one request


@dataclass(frozen=True, slots=True)
class Done(Generic[Result]):
    """A job that has ended: its result, or what it raised."""

    result: Result | None
    error: Exception | None
    took_s: float = 0.0  # while it ran


class Worker(Protocol[Result]):
    """Runs jobs, begun in the order they were submitted; with one thread, ended in it too."""

    def submit(self, job: Callable[[], Result], short: bool = False) -> None:
        """Queue a job; a short one may be run by `finished`, on its caller's thread, without two switches of thread."""
        ...

    def due(self) -> bool:
        """Whether `finished` has something to run or to return: whoever waits for anything else should not."""
        ...

    def finished(self) -> list[Done[Result]]:
        """Run what is due here; take what has ended since the last call, in the order it ended."""
        ...

    def abandon(self) -> None:
        """Drop what waits, let what runs end, forget its result: the next `finished` is of later jobs."""
        ...

    def close(self) -> None:
        """Let the running job end, drop the others."""
        ...


class ThreadWorker(Generic[Result]):
    """Runs jobs on threads of its own, `on_done` is called from them after each; short ones on its owner's.

    Never more at a time than it has threads: while these have work, short jobs queue there as well.
    """

    def __init__(self, name: str, on_done: Callable[[], None], threads: int = 1) -> None:
        self._jobs: queue.SimpleQueue[tuple[int, Callable[[], Result]] | None] = queue.SimpleQueue()
        self._here: deque[Callable[[], Result]] = deque()  # to be run by `finished`
        self._out = 0  # jobs of the threads whose result was not taken
        self._done: deque[Done[Result]] = deque()
        self._round = 0  # jobs of an earlier one are abandoned
        self._busy = [threading.Lock() for _ in range(threads)]  # of each thread, while it runs a job
        self._closing = False
        self._on_done = on_done
        self._threads = [
            threading.Thread(target=self._run, args=(busy,), name=name if n == 0 else f"{name}-{n}", daemon=True)
            for n, busy in enumerate(self._busy)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[[], Result], short: bool = False) -> None:
        """Queue a job."""
        if self._here or (short and not self._out):
            self._here.append(job)
        else:
            self._out += 1
            self._jobs.put((self._round, job))

    def due(self) -> bool:
        """Whether `finished` has something to run or to return."""
        return bool(self._here or self._done)

    def finished(self) -> list[Done[Result]]:
        """Run what is due here; take what has ended since the last call."""
        taken: list[Done[Result]] = []
        while self._done:
            taken.append(self._done.popleft())
        self._out -= len(taken)
        while self._here:
            taken.append(run_job(self._here[0]))
            self._here.popleft()  # only now: until it has ended, nothing goes to a thread
        return taken

    def abandon(self) -> None:
        """Drop what waits, let what runs end, forget its result."""
        self._round += 1
        for busy in self._busy:
            if busy.acquire(timeout=_ABANDON_WAIT_S):
                busy.release()
        self._done.clear()
        self._here.clear()
        self._out = 0

    def close(self) -> None:
        """Let what runs end, drop the rest."""
        self._closing = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(timeout=10)

    def _run(self, busy: threading.Lock) -> None:
        while (queued := self._jobs.get()) is not None and not self._closing:
            submitted, job = queued
            with busy:
                if submitted != self._round:
                    continue
                done = run_job(job)
                if submitted == self._round:
                    self._done.append(done)
            self._on_done()


class InlineWorker(Generic[Result]):
    """Runs each job at once, on the caller's thread: for tests and virtual time."""

    def __init__(self, on_done: Callable[[], None]) -> None:
        self._done: list[Done[Result]] = []
        self._on_done = on_done

    def submit(self, job: Callable[[], Result], short: bool = False) -> None:
        """Run a job."""
        self._done.append(run_job(job))
        self._on_done()

    def due(self) -> bool:
        """Whether `finished` has something to return."""
        return bool(self._done)

    def finished(self) -> list[Done[Result]]:
        """Take what has ended since the last call."""
        taken, self._done = self._done, []
        return taken

    def abandon(self) -> None:
        """Forget what has ended."""
        self._done.clear()

    def close(self) -> None:
        """Nothing to stop."""


def run_job(job: Callable[[], Result]) -> Done[Result]:
    """Run a job now."""
    started_s = time.perf_counter()
    try:
        result = job()
    except Exception as error:  # noqa: BLE001 - whatever it was, it must reach the loop, which knows what to do
        return Done(None, error, time.perf_counter() - started_s)
    return Done(result, None, time.perf_counter() - started_s)
