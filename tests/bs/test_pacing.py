"""How many microbatches at a time: cases with known answers, and end to end in virtual time against every fixed number."""

from __future__ import annotations

from pathlib import Path

import pytest

from wdmoe.bs.config import InFlight, StationConfig, VirtualConfig
from wdmoe.bs.latency import LatencyTracker
from wdmoe.bs.microbatch import pack_questions
from wdmoe.bs.pacing import MOST, STAGES_BUSY, Cost, Pacing, Request, cost_of_block, enough_in_flight
from wdmoe.bs.policies import Exact
from wdmoe.bs.questions import Choice, Question
from wdmoe.bs.virtual import open_virtual_station
from wdmoe.profiles.device_profile import VERSION, DeviceProfile, Point
from wdmoe.profiles.modelled import ExpertShape


@pytest.mark.parametrize(
    ("alone_ms", "busiest_ms", "expected"),
    [
        (10.0, 10.0, 1),  # one resource does all: others would only wait
        (20.0, 10.0, 3),  # two equal parts, and one to spare
        (30.0, 10.0, 4),
        (10.9, 10.0, 1),  # a second one would gain less than a tenth
        (12.0, 10.0, 2),
        (15.0, 10.0, 2),
        (16.0, 10.0, 3),  # with two, one that is a little late would be missed
        (0.0, 0.0, 1),  # nothing is known
        (1e6, 1.0, MOST),
    ],
)
def test_as_many_as_the_busiest_goes_into_one(alone_ms: float, busiest_ms: float, expected: int) -> None:
    assert enough_in_flight(alone_ms, busiest_ms) == expected


TWO = (Request("a", 6.0, 2.0, 1.0), Request("b", 4.0, 8.0, 1.0))


def test_on_links_of_their_own_devices_do_not_hinder_each_other() -> None:
    cost = cost_of_block(5.0, TWO)
    assert cost.alone_ms == pytest.approx(5 + 13)  # device b: 1 + 4 + 8
    assert cost.busy_ms == {STAGES_BUSY: 5.0, "a": 2.0, "b": 8.0, "air to a": 6.0, "air to b": 4.0}


def test_a_channel_that_all_share_is_one_resource() -> None:
    cost = cost_of_block(5.0, TWO, "shared")
    assert cost.busy_ms == {STAGES_BUSY: 5.0, "a": 2.0, "b": 8.0, "air": 10.0}
    # b is sent to first, 2; a after it, 5; a is ready at 7.5 and done at 10.5; b is ready at 10.5, and done 2 later.
    assert cost.alone_ms == pytest.approx(5 + 12.5 + 0.5)


def test_the_head_costs_the_base_station_alone() -> None:
    assert cost_of_block(7.0, ()) == Cost(7.0, {STAGES_BUSY: 7.0})


def test_where_the_channel_is_nearly_all_the_time_one_it_stays() -> None:
    busy = (Request("a", 60.0, 2.0, 0.2), Request("b", 40.0, 3.0, 0.2))  # the air is 100 ms of 104
    alone, busiest = (cost := cost_of_block(2.0, busy, "shared")).alone_ms, max(cost.busy_ms.values())
    assert 1.0 < alone / busiest < 1.1 and enough_in_flight(alone, busiest) == 1
    less = cost_of_block(20.0, busy, "shared")
    assert 1.1 < less.alone_ms / max(less.busy_ms.values()) < 1.5
    assert enough_in_flight(less.alone_ms, max(less.busy_ms.values())) == 2


def test_pacing_begins_with_one_and_follows_a_change() -> None:
    pacing = Pacing()
    assert pacing.in_flight == 1
    for _ in range(50):
        pacing.note(Cost(10.0, {STAGES_BUSY: 10.0}))
    assert pacing.in_flight == 1
    for _ in range(1000):
        pacing.note(Cost(40.0, {STAGES_BUSY: 10.0, "a": 9.0}))
    assert pacing.in_flight == 5


def test_where_the_rate_of_a_link_is_not_known_requests_tell_it() -> None:
    profile = DeviceProfile(VERSION, "d", "s", "numpy", "fp32", 8, 16, (Point(1, 1.0, 1.1), Point(100, 100.0, 110.0)))
    tracker = LatencyTracker(profile, round_trip_ms=2.0)
    assert tracker.parts_ms([20], 20) == pytest.approx((0.0, 20.0))
    for waited_ms in (0.0, 0.0, 5.0, 90.0):  # some behind others
        tracker.observe_request([20], 2.0 + 10.0 + 40.0 + waited_ms, rows=20, compute_ms=40.0)
    assert tracker.parts_ms([20], 20) == pytest.approx((10.0, 40.0))
    tracker.observe_request([1], 500.0, rows=1, compute_ms=2.0)  # too few rows to tell
    assert tracker.parts_ms([20], 20)[0] == pytest.approx(10.0)


QUESTIONS = [
    pack_questions(
        [Question(f"q/{n}", tuple(Choice(tuple(range(n, n + 24)), (c, n)) for c in (1, 2)))],
        None,
    )
    for n in range(24)
]


def per_second(bundle: Path, virtual: VirtualConfig, in_flight: InFlight) -> tuple[float, float]:
    """Return questions a second, and how many were in flight in the middle of the run."""
    with open_virtual_station(StationConfig(bundle, threads=1), virtual, lambda text: None) as station:
        started_s = station.hub.clock.now_s()
        records = [record for _, _, record in station.pipeline.run(QUESTIONS, Exact(), in_flight)]
        middle = sorted(record.in_flight for record in records)[len(records) // 2]
        return len(records) / (station.hub.clock.now_s() - started_s), middle


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("link", "channel", "stage_ms"),
    [
        ("wifi-5ghz-near", "orthogonal", 6.0),
        ("wifi-5ghz-near", "shared", 2.0),
        ("wifi-5ghz-mid", "shared", 2.0),
        ("ethernet-1g", "orthogonal", 40.0),
    ],
)
def test_auto_is_as_fast_as_the_best_fixed_number(bundle: Path, link: str, channel: str, stage_ms: float) -> None:
    devices = ("agx-orin-64gb", "orin-nx-16gb", "orin-nx-8gb", "orin-nano-8gb")
    virtual = VirtualConfig(
        devices, (link,), "shared" if channel == "shared" else "orthogonal",
        cost_shape=ExpertShape(2048, 1024), cost_precision="fp16", stage_ms=stage_ms, engine="numpy",
    )  # fmt: skip
    fixed = {n: per_second(bundle, virtual, n)[0] for n in (1, 2, 3, 4, 6, 8)}
    auto, used = per_second(bundle, virtual, "auto")
    assert auto >= 0.95 * max(fixed.values()), (fixed, auto, used)
    least = min(n for n, rate in fixed.items() if rate >= 0.97 * max(fixed.values()))
    assert used <= least + 1  # and no more than it takes
    if stage_ms < 40:
        assert auto > 1.2 * fixed[1]  # it would not have done to stay at one


def test_auto_and_a_band_that_is_divided_anew_contradict_each_other(bundle: Path) -> None:
    virtual = VirtualConfig(("orin-nano-8gb",) * 4, ("wifi-5ghz-mid",), "orthogonal", "per-block")
    with (
        pytest.raises(ValueError, match="give --in-flight a number"),
        open_virtual_station(StationConfig(bundle, in_flight="auto"), virtual, lambda text: None),
    ):
        pass
