"""Jobs on threads: results in order, the first failure ends all."""

from __future__ import annotations

import threading

import pytest

from wdmoe.export.parallel import OnBytes, run_all


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_jobs(workers: int) -> None:
    counted: list[int] = []

    def job(number: int, on_bytes: OnBytes) -> int:
        on_bytes(number)
        return number

    jobs = [lambda on_bytes, number=number: job(number, on_bytes) for number in range(20)]
    assert run_all(jobs, workers, counted.append) == list(range(20))
    assert sorted(counted) == list(range(20))


def test_the_first_failure_stops_the_others_at_their_next_piece() -> None:
    failed, ended = threading.Event(), threading.Event()

    def failing(_: OnBytes) -> None:
        failed.set()
        raise OSError("disk full")

    def endless(on_bytes: OnBytes) -> None:
        failed.wait(10)
        try:
            while True:
                on_bytes(1)
        finally:
            ended.set()

    with pytest.raises(OSError, match="disk full"):
        run_all([endless, failing, failing], 2, lambda _: None)
    assert ended.is_set()
