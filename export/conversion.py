"""Converts weights as a checkpoint stores them to the precisions of a bundle. BF16 comes as its raw 16 bits."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.runtime.errors import CheckpointError

Array = npt.NDArray[Any]

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names
_FLOAT16_LIMIT = 65520.0  # rounds to infinity; everything below fits
_BF16_LIMIT_BITS = 0x4780  # 65536.0, the smallest bfloat16 at or above the limit; infinity and NaN lie above it


def to_float32(raw: Array, dtype: str) -> npt.NDArray[np.float32]:
    """Convert weights to float32: exact, but for float64."""
    if dtype == "BF16":
        bits: npt.NDArray[np.uint32] = raw.astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32)
    return raw.astype(np.float32, copy=False)


def to_float16(raw: Array, dtype: str, tensor: object) -> npt.NDArray[np.float16]:
    """Convert weights to float16; what is below its smallest value becomes zero.

    Args:
        raw: the weights as stored.
        dtype: safetensors' name of their type.
        tensor: its name, or whatever names it, for the error.

    Raises:
        CheckpointError: a value does not fit into float16.
    """
    if dtype == "F16":
        return raw
    if dtype == "BF16":
        if raw.size and int((raw & np.uint16(0x7FFF)).max()) >= _BF16_LIMIT_BITS:
            raise _too_large(tensor, to_float32(raw, dtype))
        return np.take(_bf16_table(), raw)
    if raw.size and not float(np.abs(raw).max()) < _FLOAT16_LIMIT:  # NaN compares false
        raise _too_large(tensor, raw)
    return raw.astype(np.float16)


@cache
def _bf16_table() -> npt.NDArray[np.float16]:
    """float16 of every bfloat16, by its bits: a look-up is faster than two conversions."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return to_float32(np.arange(1 << 16, dtype=np.uint16), "BF16").astype(np.float16)


def _too_large(tensor: object, values: Array) -> CheckpointError:
    size = np.abs(values.astype(np.float64))
    worst = float("nan") if np.isnan(size).any() else float(size.max())
    return CheckpointError(
        f"tensor {tensor}: the value {worst:g} does not fit into float16 (largest 65504); export with --precision fp32"
    )
