"""A band that is divided between real device processes over loopback, against the same in virtual time."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
from processes import command, free_address, stop

from wdmoe.bs.config import StationConfig, VirtualConfig
from wdmoe.bs.policies import Exact
from wdmoe.bs.questions import Answer, Choice, Question
from wdmoe.bs.records import Record
from wdmoe.bs.scoring import DistributedScorer
from wdmoe.bs.station import Station, open_station
from wdmoe.bs.virtual import open_virtual_station
from wdmoe.profiles.modelled import ExpertShape

HARDWARE = ("agx-orin-64gb", "orin-nx-16gb", "orin-nx-8gb", "orin-nano-8gb")
LINKS = tuple(f"radio:mhz=100:efficiency={e}" for e in (6, 6, 2, 2))
QUESTIONS = [
    Question(
        f"q/{n}",
        tuple(Choice(tuple(f"Question {n}: bread\nAnswer:".encode()), tuple(c)) for c in (b" in a box", b" in bags")),
    )
    for n in range(6)
]
TOLERANCE = 0.15


def answered(station: Station) -> tuple[list[Answer], list[Record]]:
    warm_up = DistributedScorer(station.pipeline, Exact(), 1, None)
    warm_up.score(QUESTIONS[:1])
    scorer = DistributedScorer(station.pipeline, Exact(), 1, None)
    return scorer.score(QUESTIONS), scorer.records


def live(bundle: Path, bandwidth: str) -> tuple[list[Answer], list[Record]]:
    address = free_address()
    processes: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        stack.callback(lambda: stop(processes))
        for number, (hardware, link) in enumerate(zip(HARDWARE, LINKS, strict=True)):
            options = [
                "--bundle",
                bundle / f"device-{number}",
                "--bs",
                address,
                "--engine",
                "numpy",
                "--emulate",
                hardware,
            ]
            options += ["--link", link, "--cost-shape", "4096x14336", "--cost-precision", "int4"]
            processes.append(subprocess.Popen(command("wdmoe-device", *options), stderr=subprocess.DEVNULL))
        config = StationConfig(bundle, address, threads=1, wait_s=60, bandwidth=bandwidth)
        return answered(stack.enter_context(open_station(config, lambda text: None)))


def virtual(bundle: Path, bandwidth: str, stage_ms: float) -> tuple[list[Answer], list[Record]]:
    modelled = VirtualConfig(
        HARDWARE, LINKS, "orthogonal", bandwidth, ExpertShape(4096, 14336), "int4", stage_ms, engine="numpy"
    )
    with open_virtual_station(StationConfig(bundle, threads=1), modelled, lambda text: None) as station:
        return answered(station)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_over_real_sockets_dividing_for_each_block_gains_what_virtual_time_says(bundle: Path) -> None:
    totals: dict[str, tuple[float, float]] = {}
    for bandwidth in ("uniform", "per-block"):
        answers, records = live(bundle, bandwidth)
        stage_ms = sum(r.bs_ms for r in records) / sum(len(r.blocks) + 1 for r in records)
        modelled_answers, modelled = virtual(bundle, bandwidth, stage_ms)
        assert answers == modelled_answers
        totals[bandwidth] = (sum(r.latency_ms for r in records), sum(r.latency_ms for r in modelled))
    print(totals)
    live_gain, modelled_gain = (totals["per-block"][k] / totals["uniform"][k] for k in (0, 1))
    assert modelled_gain < 0.95
    assert live_gain == pytest.approx(modelled_gain, rel=TOLERANCE), totals
