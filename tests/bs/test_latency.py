from __future__ import annotations

import msgspec
import pytest

from wdmoe.bs.latency import DeviceLatency, LatencyTracker
from wdmoe.profiles.device_profile import VERSION, DeviceProfile, Point

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
