from __future__ import annotations

import msgspec
import numpy as np
import pytest

from wdmoe.bs.airtime import latency_model
from wdmoe.bs.latency import DeviceLatency, LatencyTracker
from wdmoe.profiles.device_profile import VERSION, DeviceProfile, Point, StagingPoint

PROFILE = DeviceProfile(VERSION, "d", "s", "numpy", "fp32", 8, 16, (Point(1, 1.0, 1.1), Point(11, 2.0, 2.2)))


def test_a_request_takes_the_round_trip_and_each_expert_in_turn() -> None:
    assert DeviceLatency(PROFILE.curve(), 0.5).request_ms([1, 6]) == pytest.approx(0.5 + 1.0 + 1.5)


def test_on_a_link_of_known_rate_each_row_adds_its_time() -> None:
    link = DeviceLatency(PROFILE.curve(), 0.5, row_link_ms=0.25)
    assert link.request_ms([1, 6]) == pytest.approx(0.5 + 1.0 + 1.5 + 7 * 0.25)
    assert link.request_ms([1, 6], rows=6) == pytest.approx(0.5 + 1.0 + 1.5 + 6 * 0.25)
    tracker = LatencyTracker(msgspec.structs.replace(PROFILE, row_link_ms=0.25), round_trip_ms=0.5)
    tracker.observe_request([1, 6], 9.0, rows=6)
    assert tracker.model().correction == pytest.approx(2.0)


def test_the_correction_follows_what_is_measured_and_shrugs_off_an_outlier() -> None:
    tracker = LatencyTracker(PROFILE, round_trip_ms=1.0)
    for measured_ms in (4.0, 4.0, 400.0, 4.0, 4.0):
        tracker.observe_request([1], measured_ms)
    assert tracker.model().correction == pytest.approx(2.0)
    assert tracker.model().request_ms([1]) == pytest.approx(4.0)


def test_the_correction_follows_a_device_that_slows_down() -> None:
    tracker = LatencyTracker(PROFILE, round_trip_ms=1.0)
    for measured_ms in [2.0] * 100 + [6.0] * 20:
        tracker.observe_request([1], measured_ms)
    assert tracker.model().correction == pytest.approx(3.0)


def test_the_round_trip_is_the_smallest_seen() -> None:
    tracker = LatencyTracker(PROFILE)
    for measured_ms in (0.4, 0.2, 9.0):
        tracker.observe_round_trip(measured_ms)
    assert tracker.model().round_trip_ms == 0.2


def test_the_air_that_requests_tell_is_known_to_the_model_and_no_longer_put_down_to_the_device() -> None:
    tracker = LatencyTracker(PROFILE, round_trip_ms=1.0)
    for _ in range(3):
        tracker.observe_request([20], 1.0 + 40.0 + 4.0, rows=20, compute_ms=4.0)
    assert tracker.model().row_link_ms == 0.0 and tracker.model().correction > 5
    for _ in range(2):
        tracker.observe_request([20], 1.0 + 40.0 + 4.0, rows=20, compute_ms=4.0)
    model = tracker.model()
    assert model.row_link_ms == pytest.approx(2.0) and model.correction == pytest.approx(1.0, rel=0.05)
    np.testing.assert_allclose(latency_model([model], 32).row_air_ms, [2.0 * model.correction])
    for _ in range(40):  # one row at a time says nothing of the rate
        tracker.observe_request([1], 4.0, rows=1, compute_ms=1.0)
    assert tracker.model().row_link_ms == pytest.approx(2.0)


def test_what_the_profile_says_of_the_link_is_not_learnt_anew_and_its_ways_may_differ() -> None:
    tracker = LatencyTracker(msgspec.structs.replace(PROFILE, row_link_ms=0.4, row_up_ms=0.3), round_trip_ms=1.0)
    for _ in range(8):
        tracker.observe_request([20], 100.0, rows=20, compute_ms=4.0)
    model = latency_model([tracker.model()], 32, "shared")
    assert (model.down_ms[0], model.up_ms[0]) == pytest.approx((0.1, 0.3))
    assert tracker.asked_ms([20], 20)[::3] == pytest.approx((2.0, 6.0))
    with pytest.raises(ValueError, match=r"the way back takes 0\.5"):
        msgspec.structs.replace(PROFILE, row_link_ms=0.4, row_up_ms=0.5)


def test_measured_staging_reaches_the_model() -> None:
    staged = msgspec.structs.replace(PROFILE, staging=(StagingPoint(1, 1, 1, 1, 1), StagingPoint(10, 2.0, 1, 1, 1)))
    tracker = LatencyTracker(staged, round_trip_ms=0.5)
    assert tracker.model().request_ms([1, 6]) == pytest.approx(0.5 + 1.0 + 1.5 + 7 * 0.4)
    assert latency_model([tracker.model()], 8).staging_ms[0] == pytest.approx(0.4)
    tracker.observe_request([6], 0.5 + 1.5 + 6 * 0.4, rows=6, compute_ms=1.5 + 6 * 0.4)
    assert tracker.model().correction == pytest.approx(1.0)
    assert tracker.parts_ms([6], 6) == pytest.approx((0.0, 1.5 + 2.4))
