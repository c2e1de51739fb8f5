"""float16 conversions agree with numpy's own to the last bit."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from wdmoe.runtime.half import float16_from_float32, float32_from_float16, rounded_to_float16, widened_to_float32

EVERY_HALF = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


def test_every_float16_becomes_the_same_float32() -> None:
    got, expected = float32_from_float16(EVERY_HALF), EVERY_HALF.astype(np.float32)
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


def test_every_finite_float16_its_midpoints_and_their_neighbours_round_as_numpy_rounds() -> None:
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    midpoints = (halves[:-1] + halves[1:]) / 2
    near = [np.nextafter(midpoints, np.float32(end), dtype=np.float32) for end in (0, 1e9)]
    random = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    values = np.concatenate([halves, midpoints, *near, random, random * np.float32(1e-6)])
    values = np.concatenate([values, -values])
    got, expected = float16_from_float32(values), values.astype(np.float16)
    np.testing.assert_array_equal(got.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("loaded", [True, False], ids=["onnxruntime", "numpy alone"])
def test_rows_are_cast_as_numpy_casts_whether_onnxruntime_is_in_use_or_not(
    monkeypatch: pytest.MonkeyPatch, loaded: bool
) -> None:
    pytest.importorskip("onnxruntime")
    if not loaded:
        monkeypatch.delitem(sys.modules, "onnxruntime")
    halves = EVERY_HALF.reshape(64, -1)
    np.testing.assert_array_equal(widened_to_float32(halves), halves.astype(np.float32))
    random = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    for scale in (1e-6, 1.0, 3e4):  # below the normal numbers, among them, and partly too large
        values = random * np.float32(scale)
        with np.errstate(over="ignore"):
            expected = values.astype(np.float16)
        np.testing.assert_array_equal(rounded_to_float16(values), expected)
        assert np.isinf(expected).any() == (scale > 1)
