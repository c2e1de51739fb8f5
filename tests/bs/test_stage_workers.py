"""Several stages at a time: real threads and sockets answer to the bit as one at a time does."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import pytest

from wdmoe.bs.config import StationConfig
from wdmoe.bs.pacing import STAGES_BUSY, Request, cost_of_block
from wdmoe.bs.policies import parse_policy
from wdmoe.bs.questions import Choice, Question
from wdmoe.bs.scoring import DistributedScorer
from wdmoe.bs.station import open_station
from wdmoe.runtime.worker import ThreadWorker

QUESTIONS = [
    Question(f"q/{n}", (Choice(tuple(f"Q: {'so ' * n}\nA:".encode()), tuple(f" yes{n}".encode())),)) for n in range(9)
]


def test_stages_at_a_time_answer_as_one_at_a_time(bundle: Path, address: str, tmp_path: Path) -> None:
    config = StationConfig(bundle, address, threads=1, wire="fp32")
    with open_station(config, lambda _: None) as station:
        one = [DistributedScorer(station.pipeline, parse_policy(p), 1, None).score(QUESTIONS) for p in ("exact", "ser")]
    timeline = tmp_path / "trace.json"
    with open_station(dataclasses.replace(config, stage_workers=3, trace=timeline), lambda _: None) as station:
        for alone, policy in zip(one, ("exact", "ser"), strict=True):
            for _ in range(3):
                assert DistributedScorer(station.pipeline, parse_policy(policy), 6, None).score(QUESTIONS) == alone
    names = {event["args"]["name"] for event in json.loads(timeline.read_text())["traceEvents"] if event["ph"] == "M"}
    assert {"stages", "stages-1", "stages-2"} <= names  # a track for each


def test_as_many_jobs_run_at_a_time_as_there_are_threads() -> None:
    ended, here, go_on = threading.Semaphore(0), threading.Semaphore(0), threading.Event()
    worker: ThreadWorker[int] = ThreadWorker("test", ended.release, threads=2)

    def job() -> int:
        here.release()
        assert go_on.wait(timeout=10)
        return 1

    for _ in range(3):
        worker.submit(job)
    assert here.acquire(timeout=10) and here.acquire(timeout=10)
    assert not here.acquire(timeout=0.1)  # the third waits
    go_on.set()
    for _ in range(3):
        assert ended.acquire(timeout=10)
    assert [done.result for done in worker.finished()] == [1, 1, 1]
    worker.close()


def test_what_runs_on_every_thread_is_waited_for_when_it_is_abandoned() -> None:
    started, go_on, ended = threading.Barrier(3), threading.Event(), threading.Semaphore(0)
    ran: list[int] = []
    worker: ThreadWorker[None] = ThreadWorker("test", ended.release, threads=2)

    def job() -> None:
        started.wait(timeout=10)
        assert go_on.wait(timeout=10)
        ran.append(1)

    for _ in range(4):
        worker.submit(job)
    started.wait(timeout=10)
    threading.Timer(0.1, go_on.set).start()
    worker.abandon()
    assert ran == [1, 1]
    worker.submit(lambda: None)
    while not worker.finished():
        assert ended.acquire(timeout=10)
    assert ran == [1, 1]
    worker.close()


def test_pacing_knows_that_stages_share_the_work() -> None:
    asked = [Request("d", 2.0, 3.0, 0.0)]
    one, two = cost_of_block(8.0, asked), cost_of_block(8.0, asked, stage_workers=2)
    assert one.alone_ms == two.alone_ms and two.busy_ms[STAGES_BUSY] == one.busy_ms[STAGES_BUSY] / 2


def test_stages_on_a_gpu_run_one_at_a_time(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--stage-workers is 2, but stages on a GPU run one at a time"):
        StationConfig(tmp_path, stages_on="cuda", stage_workers=2)
    with pytest.raises(ValueError, match="--stage-workers is 0, expected at least 1"):
        StationConfig(tmp_path, stage_workers=0)
