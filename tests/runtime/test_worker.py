from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from wdmoe.runtime.worker import InlineWorker, ThreadWorker, Worker


def threaded(on_done: Callable[[], None]) -> Worker[int]:
    return ThreadWorker("test", on_done)


def inline(on_done: Callable[[], None]) -> Worker[int]:
    return InlineWorker(on_done)


@pytest.mark.parametrize("make", [threaded, inline])
def test_jobs_end_in_the_order_they_came_and_failures_are_handed_over(
    make: Callable[[Callable[[], None]], Worker[int]],
) -> None:
    def fail() -> int:
        raise OSError("broken")

    ended = threading.Semaphore(0)
    worker = make(ended.release)
    for job in (lambda: 1, fail, lambda: 3):
        worker.submit(job)
    for _ in range(3):
        assert ended.acquire(timeout=10)
    done = worker.finished()
    assert [d.result for d in done] == [1, None, 3]
    assert isinstance(done[1].error, OSError)
    assert worker.finished() == []
    worker.close()


def test_what_is_abandoned_leaves_nothing_to_the_next() -> None:
    started, go_on = threading.Event(), threading.Event()
    ran: list[str] = []
    ended = threading.Semaphore(0)
    worker: Worker[str] = ThreadWorker("test", ended.release)

    def slow() -> str:
        started.set()
        assert go_on.wait(timeout=10)
        ran.append("slow")
        raise OSError("of the run before")

    def queued() -> str:
        ran.append("queued")
        return "queued"

    worker.submit(slow)
    worker.submit(queued)
    assert started.wait(timeout=10)
    threading.Timer(0.1, go_on.set).start()
    worker.abandon()
    assert ran == ["slow"]  # it was waited for
    worker.submit(lambda: "next")
    while not (done := worker.finished()):
        assert ended.acquire(timeout=10)
    assert [d.result for d in done] == ["next"] and ran == ["slow"]
    worker.close()


def test_short_jobs_run_on_the_callers_thread_but_never_beside_the_workers_own() -> None:
    ended, go_on = threading.Semaphore(0), threading.Event()
    ran_on: list[str] = []
    worker: Worker[None] = ThreadWorker("test", ended.release)

    def note() -> None:
        ran_on.append(threading.current_thread().name)

    def hold() -> None:
        assert go_on.wait(timeout=10)
        note()

    worker.submit(note, short=True)
    worker.submit(note)  # behind it, so that the order stays
    assert worker.due() and len(worker.finished()) == 2 and not worker.due()
    worker.submit(hold)
    worker.submit(note, short=True)  # the thread has work: behind that
    assert not worker.due() and worker.finished() == []
    go_on.set()
    for _ in range(2):
        assert ended.acquire(timeout=10)
    assert worker.due() and len(worker.finished()) == 2
    worker.submit(note, short=True)
    worker.abandon()
    assert not worker.due() and worker.finished() == []
    worker.submit(note, short=True)
    assert len(worker.finished()) == 1
    here = threading.current_thread().name
    assert ran_on == [here, here, "test", "test", here]
    worker.close()
