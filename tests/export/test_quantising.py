"""Quantised weights are near the weights they were made of, whatever these are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from wdmoe.export.quantising import quantise_int4, quantise_int8, rounded_rows
from wdmoe.runtime.errors import CheckpointError
from wdmoe.runtime.quantised import to_float32

FloatArray = npt.NDArray[np.float32]


def _weights(rows: int = 6, columns: int = 300) -> FloatArray:
    rng = np.random.default_rng(0)
    spread = np.exp(rng.standard_normal((rows, 1)))
    return (spread * rng.standard_normal((rows, columns)) / 50).astype(np.float32)


def test_int8_is_off_by_half_a_step_of_its_row_at_most() -> None:
    weights = _weights()
    stored, scales = quantise_int8(weights, "t")
    assert (stored.shape, scales.shape) == ((6, 304), (6,))
    steps = np.abs(weights).max(axis=1, keepdims=True) / 127
    # The float16 of a scale may be 2^-11 too small: the largest weight is clipped by as much.
    assert (np.abs(to_float32(stored, scales, 300) - weights) <= steps * (0.5 + 127 * 2**-11)).all()
    assert (stored[:, 300:] == 128).all()
    assert stored.min() > 0  # -128 is not used: what is symmetric can be negated


def test_int4_is_better_than_rounding_to_sevenths_of_the_largest_weight() -> None:
    weights = _weights(64, 512)
    stored, scales = quantise_int4(weights, "t")
    assert (stored.shape, scales.shape) == ((64, 4, 64), (64, 4))
    found = np.square(to_float32(stored, scales, 512) - weights).reshape(64, 4, 128).sum(axis=2)
    groups = weights.reshape(64, 4, 128)
    steps = (np.abs(groups).max(axis=2, keepdims=True) / 7).astype(np.float16).astype(np.float32)
    plain = np.square(np.rint(groups / steps) * steps - groups).sum(axis=2)
    assert (found <= plain * 1.0001).all()
    assert found.sum() < 0.9 * plain.sum()


def test_a_row_that_128_does_not_divide_ends_in_zeros() -> None:
    stored, scales = quantise_int4(_weights(), "t")
    assert (stored.shape, scales.shape) == ((6, 3, 64), (6, 3))
    assert (stored[:, 2, 22:] == 0x88).all()
    short, short_scales = quantise_int4(np.ascontiguousarray(_weights()[:, 256:]), "t")
    np.testing.assert_array_equal(short[:, 0], stored[:, 2])
    np.testing.assert_array_equal(short_scales[:, 0], scales[:, 2])


@pytest.mark.parametrize("quantise", [quantise_int8, quantise_int4])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-7, 1e-3, 1e4])
def test_weights_of_any_size_survive(quantise: object, size: float) -> None:
    assert callable(quantise)
    weights = _weights() * np.float32(size)
    stored, scales = quantise(weights, "t")
    error = np.abs(to_float32(stored, scales, 300) - weights).max()
    assert error <= max(2.0**-24, 0.15 * float(np.abs(weights).max()))  # below 2^-24 float16 has no scale: zeros


@pytest.mark.parametrize("quantise", [quantise_int8, quantise_int4])
@pytest.mark.parametrize(("value", "message"), [(np.nan, "not finite"), (np.inf, "not finite"), (1e9, "too large")])
def test_what_cannot_be_quantised_stops_with_the_tensor_s_name(quantise: object, value: float, message: str) -> None:
    assert callable(quantise)
    weights = _weights()
    weights[3, 7] = value
    with pytest.raises(CheckpointError, match=f"tensor some.name: .*{message}"):
        quantise(weights, "some.name")


def test_rounded_rows_are_off_by_half_a_step_at_most_and_stay_as_they_are_when_rounded_again() -> None:
    rows = _weights(columns=300) * 50
    rows[2, 128:256] = 0  # a group without any size
    rounded = rounded_rows(rows)
    assert rounded.shape == rows.shape and rounded.dtype == np.float32
    groups = np.pad(rows, ((0, 0), (0, 84))).reshape(6, 3, 128)
    steps = np.repeat(np.abs(groups).max(axis=2) / 127, 128, axis=1)[:, :300]
    assert (np.abs(rounded - rows) <= steps * (0.5 + 1e-4)).all() and np.abs(rounded - rows).max() > 0
    np.testing.assert_allclose(rounded_rows(rounded), rounded, rtol=1e-6)
