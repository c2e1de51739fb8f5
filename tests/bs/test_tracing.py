"""The timeline of a run: spans nest, each device has its track, and sums are those of the record."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from inprocess import open_system

from wdmoe.bs.config import StationConfig, VirtualConfig
from wdmoe.bs.policies import Exact
from wdmoe.bs.questions import Choice, Question
from wdmoe.bs.records import Record
from wdmoe.bs.scoring import DistributedScorer
from wdmoe.bs.tracing import Reply, Trace
from wdmoe.bs.virtual import open_virtual_station
from wdmoe.runtime.clock import VirtualClock
from wdmoe.runtime.errors import DeviceFailed

QUESTIONS = [Question(f"q/{n}", (Choice(tuple(b"Tea is best kept"), tuple(b" dry" * (n + 1))),)) for n in range(3)]


class TickingClock(VirtualClock):
    """Each look at it takes a millisecond."""

    def now_s(self) -> float:
        self.advance(1e-3)
        return super().now_s()


class PassingClock(VirtualClock):
    """Real time, and what was waited."""

    def now_s(self) -> float:
        return time.perf_counter() + super().now_s()


def traced(
    bundle: Path, path: Path, in_flight: int, make_clock: Callable[[], VirtualClock] = TickingClock
) -> tuple[dict[str, Any], list[Record]]:
    trace = Trace()
    with open_system(bundle, trace=trace, clock=make_clock()) as system:
        scorer = DistributedScorer(system.pipeline, Exact(), in_flight, None)
        scorer.score(QUESTIONS)
    trace.write(path)
    assert [other.name for other in path.parent.iterdir()] == [path.name]
    return json.loads(path.read_text()), scorer.records


def by_track(timeline: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the spans of each (process, thread), by their names."""
    events = timeline["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    tracks: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[processes[event["pid"]], threads[event["pid"], event["tid"]]].append(event)
    return tracks


def assert_nested(spans: list[dict[str, Any]]) -> None:
    open_until: list[float] = []
    for span in sorted(spans, key=lambda span: (span["ts"], -span["dur"])):
        assert span["ts"] >= 0 and span["dur"] >= 0
        while open_until and open_until[-1] <= span["ts"] + 1e-3:
            open_until.pop()
        end = span["ts"] + span["dur"]
        assert not open_until or end <= open_until[-1] + 1e-3
        open_until.append(end)


@pytest.mark.parametrize("in_flight", [1, 3])
def test_spans_nest_and_every_device_has_a_track(bundle: Path, tmp_path: Path, in_flight: int) -> None:
    timeline, records = traced(bundle, tmp_path / "trace.json", in_flight)
    tracks = by_track(timeline)
    for spans in tracks.values():
        assert_nested(spans)
    if in_flight == 1:
        devices = [(f"device-{k}", f"device-{k}") for k in range(4)]
        assert sorted(tracks) == [("base station", track) for track in ("loop", "stages", "waits")] + devices
    devices_spans = [span for (process, _), spans in tracks.items() if process != "base station" for span in spans]
    requests = [span for span in devices_spans if span["name"].startswith("block ")]
    waits = [s for (_, track), spans in tracks.items() if track.startswith("waits") for s in spans]
    assert len(waits) == sum(len(record.blocks) for record in records) <= len(requests)


def test_sums_are_those_of_the_record(bundle: Path, tmp_path: Path) -> None:
    timeline, records = traced(bundle, tmp_path / "trace.json", 1, PassingClock)
    tracks = by_track(timeline)
    alike = partial(pytest.approx, rel=0.2, abs=2.0)  # the worker's own clock is read right before and after the job

    def total_ms(process: str, track: str, word: str) -> float:
        return float(sum(span["dur"] for span in tracks[process, track] if word in span["name"])) / 1e3

    stages_ms = total_ms("base station", "stages", "stage") + total_ms("base station", "stages", "head")
    assert stages_ms == alike(sum(record.bs_ms for record in records))
    assert total_ms("base station", "stages", "shared") == alike(sum(record.shared_ms for record in records))
    waits_ms = sum(block.waiting_ms for record in records for block in record.blocks)
    assert total_ms("base station", "waits", "") == pytest.approx(waits_ms)
    device_ms = sum(total_ms(f"device-{k}", f"device-{k}", "compute") for k in range(4))
    assert device_ms >= sum(block.device_ms for record in records for block in record.blocks) > 0


@pytest.mark.parametrize("in_flight", [1, 3])
def test_in_virtual_time_spans_are_as_long_as_modelled(bundle: Path, tmp_path: Path, in_flight: int) -> None:
    path = tmp_path / "trace.json"
    config = StationConfig(bundle, trace=path)
    virtual = VirtualConfig(("orin-nx-8gb",) * 4, ("wifi-6",), stage_ms=2.0)
    with open_virtual_station(config, virtual, lambda line: None) as station:
        scorer = DistributedScorer(station.pipeline, Exact(), in_flight, None)
        scorer.score(QUESTIONS)
    tracks = by_track(json.loads(path.read_text()))
    for spans in tracks.values():
        assert_nested(spans)
    assert all(process.endswith(" (modelled)") for process, _ in tracks)
    stages = tracks["base station (modelled)", "stages"]
    assert {round(span["dur"] / 1e3, 6) for span in stages} == {2.0}
    assert sum(span["dur"] for span in stages) / 1e3 == pytest.approx(sum(record.bs_ms for record in scorer.records))
    assert {span["name"].split()[0] for span in stages} == {"stage", "head"}
    assert all(b["ts"] >= a["ts"] + a["dur"] - 1e-3 for a, b in pairwise(sorted(stages, key=lambda span: span["ts"])))
    waits = [span["dur"] for (_, track), spans in tracks.items() if track.startswith("waits") for span in spans]
    waited_ms = sum(block.waiting_ms for record in scorer.records for block in record.blocks)
    assert sum(waits) / 1e3 == pytest.approx(waited_ms) and waited_ms > 0
    devices = {process for process, _ in tracks} - {"base station (modelled)"}
    assert devices == {f"device-{k} (modelled)" for k in range(4)}
    if in_flight == 1:
        assert len(tracks) == 2 + 4  # nothing computes in no time: there is no loop


def test_a_run_in_virtual_time_that_breaks_off_leaves_its_timeline(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    virtual = VirtualConfig(("orin-nx-8gb",) * 4, ("wifi-6",))

    def run() -> None:
        with open_virtual_station(StationConfig(bundle, trace=path), virtual, lambda line: None) as station:
            DistributedScorer(station.pipeline, Exact(), 1, None).score(QUESTIONS[:1])
            raise DeviceFailed("device-0", "the power went")

    with pytest.raises(DeviceFailed):
        run()
    assert by_track(json.loads(path.read_text()))


def test_requests_that_overlap_stand_beside_each_other(tmp_path: Path) -> None:
    trace = Trace()
    trace.replies += [Reply("d", 0, "a", 1.0, 2.0, 0.1, 0.5), Reply("d", 0, "b", 1.5, 3.0, 0.5, 0.5)]
    trace.replies.append(Reply("d", 1, "a", 2.5, 3.5, 9.0, 9.0))  # a device whose clock runs too fast
    trace.write(tmp_path / "trace.json")
    tracks = by_track(json.loads((tmp_path / "trace.json").read_text()))
    assert sorted(tracks) == [("d", "d"), ("d", "d (2)")]
    first = [(span["name"], round(span["ts"] / 1e3), round(span["dur"] / 1e3)) for span in tracks["d", "d"]]
    assert first == [
        ("block 0 of a", 0, 1000), ("air, down", 0, 200), ("queue", 200, 100), ("compute", 300, 500), ("air, up", 800, 200),
        ("block 1 of a", 1500, 1000), ("compute", 1500, 1000),
    ]  # fmt: skip
    for spans in tracks.values():
        assert_nested(spans)
