"""Weights keep their value, or the export stops with the tensor's name."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from wdmoe.export.conversion import to_float16, to_float32
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
