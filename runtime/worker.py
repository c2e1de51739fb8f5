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
    """Runs jobs one after another, in the order they were submitted."""

    def submit(self, job: Callable[[], Result]) -> None:
        """Queue a job."""
        ...

    def finished(self) -> list[Done[Result]]:
        """Take what has ended since the last call, in the order it was submitted."""
        ...

    def abandon(self) -> None:
        """Drop what waits, let the running job end, forget its result: the next `finished` is of later jobs."""
        ...

    def close(self) -> None:
        """Let the running job end, drop the others."""
        ...


class ThreadWorker(Generic[Result]):
    """Runs jobs on one thread of its own; `on_done` is called from it after each."""

    def __init__(self, name: str, on_done: Callable[[], None]) -> None:
        self._jobs: queue.SimpleQueue[tuple[int, Callable[[], Result]] | None] = queue.SimpleQueue()
        self._done: deque[Done[Result]] = deque()
        self._round = 0  # jobs of an earlier one are abandoned
        self._busy = threading.Lock()  # while a job runs
        self._closing = False
        self._on_done = on_done
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], Result]) -> None:
        """Queue a job."""
        self._jobs.put((self._round, job))

    def finished(self) -> list[Done[Result]]:
        """Take what has ended since the last call."""
        taken: list[Done[Result]] = []
        while self._done:
            taken.append(self._done.popleft())
        return taken

    def abandon(self) -> None:
        """Drop what waits, let the running job end, forget its result."""
        self._round += 1
        if self._busy.acquire(timeout=_ABANDON_WAIT_S):
            self._busy.release()
        self._done.clear()

    def close(self) -> None:
        """Let the running job end, drop the others."""
        self._closing = True
        self._jobs.put(None)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while (queued := self._jobs.get()) is not None and not self._closing:
            submitted, job = queued
            with self._busy:
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

    def submit(self, job: Callable[[], Result]) -> None:
        """Run a job."""
        self._done.append(run_job(job))
        self._on_done()

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
