"""Weights keep their value, or the export stops with the tensor's name."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from wdmoe.export.conversion import Losses, to_float16, to_float32
from wdmoe.runtime.errors import CheckpointError

ALL_BITS = np.arange(1 << 16, dtype=np.uint16)


def test_every_bfloat16_converts_as_torch_converts_it() -> None:
    source = torch.from_numpy(ALL_BITS.view(np.int16)).view(torch.bfloat16)
    np.testing.assert_array_equal(to_float32(ALL_BITS, "BF16"), source.float().numpy())
    fits = ALL_BITS[source.float().abs().numpy() <= 65504]
    expected = torch.from_numpy(fits.view(np.int16)).view(torch.bfloat16).half().numpy()
    np.testing.assert_array_equal(to_float16(fits, "BF16", "t"), expected)


@pytest.mark.parametrize("value", [65536.0, -1e5, np.inf, -np.inf, np.nan])
def test_a_value_that_float16_cannot_hold_stops_with_the_tensor_s_name(value: float) -> None:
    values = np.array([1.0, value, 2.0], np.float32)
    bits = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    stored: dict[str, npt.NDArray[Any]] = {"F32": values, "F64": values.astype(np.float64), "BF16": bits}
    for dtype, raw in stored.items():
        with pytest.raises(CheckpointError, match=r"tensor model\.x: the value .* --precision fp32"):
            to_float16(raw, dtype, "model.x")


def test_the_largest_float16_is_kept() -> None:
    assert to_float16(np.array([65504, -65519.9], np.float32), "F32", "t").tolist() == [65504, -65504]


def test_float16_and_float32_are_not_copied() -> None:
    half, single = np.ones(3, np.float16), np.ones(3, np.float32)
    assert to_float16(half, "F16", "t") is half
    assert to_float32(single, "F32") is single


def _bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def test_what_float16_does_not_hold_is_counted() -> None:
    values = np.array([0, 1, 2**-24, -(2**-25), 1e-30, 65504, 1e5, -np.inf], np.float32)
    for dtype, raw in (("F32", values), ("F64", values.astype(np.float64)), ("BF16", _bfloat16(values))):
        losses = Losses()
        got = to_float16(raw, dtype, "t", losses, clamp=True)
        assert losses == Losses(weights=8, clamped=2, to_zero=2)
        assert got[-2:].tolist() == [65504, -65504]
        assert got[2:5].tolist() == [2**-24, 0, 0]


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_what_is_not_a_number_is_never_clamped(dtype: str) -> None:
    values = np.array([1e5, np.nan], np.float32)
    with pytest.raises(CheckpointError, match="the value nan does not fit"):
        to_float16(values if dtype == "F32" else _bfloat16(values), dtype, "t", clamp=True)
