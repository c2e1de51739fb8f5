"""Runs the jobs of an export on a few threads: while one waits for the disk, another converts and hashes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

Result = TypeVar("Result")
OnBytes = Callable[[int], None]

# Each thread holds a few MiB. Hashing, at 1 to 2 GB/s a core, is the slowest step; four outrun most disks.
_MOST_WORKERS = 4


class _Abandoned(Exception):
    """Another job failed."""


def default_workers() -> int:
    """Threads that an export uses on this machine."""
    return max(1, min(_MOST_WORKERS, len(os.sched_getaffinity(0))))


def run_all(jobs: Sequence[Callable[[OnBytes], Result]], workers: int, on_bytes: OnBytes) -> list[Result]:
    """Run jobs and return their results in order; the first failure, or Ctrl-C, stops the others at their next piece.

    Args:
        jobs: each calls what it is given with the number of bytes it has dealt with, piece by piece.
        workers: threads; with one, the jobs run one after the other in the caller's own.
        on_bytes: called with these numbers, by one thread at a time.
    """
    if workers == 1:
        return [job(on_bytes) for job in jobs]
    stopped, guard = threading.Event(), threading.Lock()

    def count(size_bytes: int) -> None:
        if stopped.is_set():
            raise _Abandoned
        with guard:
            on_bytes(size_bytes)

    with ThreadPoolExecutor(workers, thread_name_prefix="export") as pool:
        try:
            futures = [pool.submit(job, count) for job in jobs]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
            return [future.result() for future in futures]
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
