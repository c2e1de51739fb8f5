from __future__ import annotations

from pathlib import Path

import pytest

from wdmoe.profiles.device_profile import VERSION, DeviceProfile, Point, encode_profile, interpolate, read_profile


def profile(*points: tuple[int, float]) -> DeviceProfile:
    table = tuple(Point(tokens, ms, 2 * ms) for tokens, ms in points)
    return DeviceProfile(VERSION, "test", "none", "numpy", "fp32", 8, 16, table)


@pytest.mark.parametrize(
    ("tokens", "expected_ms"),
    [(0, 0.0), (1, 1.0), (4, 2.5), (7, 4.0), (10, 7.0)],
)
def test_prediction_is_linear_between_points_and_keeps_the_last_slope(tokens: int, expected_ms: float) -> None:
    assert profile((1, 1.0), (7, 4.0), (8, 5.0)).call_ms(tokens) == pytest.approx(expected_ms)


def test_beyond_a_table_that_ends_flat_the_best_rate_is_the_roofline() -> None:
    flat = profile((1, 2.0), (16, 2.0), (64, 2.0))
    assert flat.call_ms(64) == 2.0 and flat.call_ms(128) == pytest.approx(4.0)


def test_prediction_never_falls_with_more_tokens_even_if_the_measurement_did() -> None:
    noisy = profile((1, 1.0), (4, 0.7), (16, 3.0))
    times = [noisy.call_ms(tokens) for tokens in range(40)]
    assert times == sorted(times)


def test_one_point_is_scaled_in_proportion() -> None:
    assert interpolate(((4, 2.0),), 8) == pytest.approx(4.0)


def test_a_profile_survives_write_and_read(tmp_path: Path) -> None:
    written = profile((1, 1.0), (8, 5.0))
    (tmp_path / "p.json").write_bytes(encode_profile(written))
    assert read_profile(tmp_path / "p.json") == written


def test_points_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="must ascend"):
        profile((8, 1.0), (1, 5.0))


def test_what_is_emulated_says_as_what_and_nothing_else_does() -> None:
    with pytest.raises(ValueError, match="says what is emulated"):
        DeviceProfile(VERSION, "d", "s", "numpy", "fp32", 8, 16, (Point(1, 1.0, 1.0),), origin="emulated")


@pytest.mark.parametrize("text", ["{", "{}", '{"version": 1}'])
def test_a_damaged_profile_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"p\.json: not a device profile"):
        read_profile(path)
