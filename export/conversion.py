"""Converts weights as a checkpoint stores them to the precisions of a bundle. BF16 comes as its raw 16 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.runtime.errors import CheckpointError
from wdmoe.runtime.half import float16_from_float32

Array = npt.NDArray[Any]

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names
_FLOAT16_LARGEST = 65504.0
_FLOAT16_LIMIT = 65520.0  # rounds to infinity; everything below fits
_FLOAT16_VANISHING = 2.0**-25  # rounds to zero, as all below
_BF16_LIMIT_BITS = 0x4780  # 65536.0, the smallest bfloat16 at or above the limit; infinity and NaN lie above it
_BF16_INFINITE_BITS = 0x7F80
_BF16_VANISHING_BITS = 0x3300  # 2^-25


@dataclass(slots=True)
class Losses:
    """What a precision did not hold."""

    weights: int = 0  # stored as float16
    clamped: int = 0  # weights too large for float16, now its largest
    to_zero: int = 0  # weights too small for float16, now zero
    # Of quantised experts: how far their answers to the golden rows are from those of the checkpoint's own weights.
    largest_error: float = 0.0  # relative to the largest value of an expert's answers
    error_square: float = 0.0  # sum over all answers
    square: float = 0.0  # of the answers themselves

    def add(self, other: Losses) -> None:
        """Count those of another part too."""
        self.weights += other.weights
        self.clamped += other.clamped
        self.to_zero += other.to_zero
        self.largest_error = max(self.largest_error, other.largest_error)
        self.error_square += other.error_square
        self.square += other.square

    def add_error(self, answers: Array, exact: Array) -> None:
        """Compare the answers of a quantised expert with those of its own weights."""
        difference, exact = answers.astype(np.float64) - exact, exact.astype(np.float64)
        largest = float(np.abs(exact).max(initial=0.0))
        error = float(np.abs(difference).max(initial=0.0))
        self.largest_error = max(self.largest_error, error / largest if largest else error)
        self.error_square += float((difference**2).sum())
        self.square += float((exact**2).sum())

    @property
    def rms_error(self) -> float:
        """Root of the mean squared error over root of the mean square."""
        return math.sqrt(self.error_square / self.square) if self.square else math.sqrt(self.error_square)


def to_float32(raw: Array, dtype: str) -> npt.NDArray[np.float32]:
    """Convert weights to float32: exact, but for float64."""
    if dtype == "BF16":
        bits: npt.NDArray[np.uint32] = raw.astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32)
    return raw.astype(np.float32, copy=False)


def to_float16(
    raw: Array,
    dtype: str,
    tensor: object,
    losses: Losses | None = None,
    clamp: bool = False,
    option: str = "--precision",
) -> npt.NDArray[np.float16]:
    """Convert weights to float16; what is below its smallest value becomes zero.

    Args:
        raw: the weights as stored.
        dtype: safetensors' name of their type.
        tensor: its name, or whatever names it, for the error.
        losses: is told of what float16 does not hold.
        clamp: whether a value that is too large becomes the largest float16; NaN never does.
        option: which asked for float16, for the error.

    Raises:
        CheckpointError: a value does not fit into float16.
    """
    losses = losses if losses is not None else Losses()
    losses.weights += raw.size
    if dtype == "F16" or not raw.size:
        return raw.astype(np.float16, copy=False)
    try:
        return _from_bfloat16(raw, losses, clamp) if dtype == "BF16" else _from_wider(raw, losses, clamp)
    except _TooLarge as error:
        raise CheckpointError(
            f"tensor {tensor}: the value {error.worst:g} does not fit into float16 (largest 65504); "
            f"export with {option} fp32{'' if math.isnan(error.worst) else ', or clamp it with --clamp'}"
        ) from None


class _TooLarge(Exception):
    """A value does not fit into float16."""

    def __init__(self, values: Array) -> None:
        size = np.abs(values.astype(np.float64))
        self.worst = float("nan") if np.isnan(size).any() else float(size.max())


def _from_bfloat16(raw: Array, losses: Losses, clamp: bool) -> npt.NDArray[np.float16]:
    size = raw & np.uint16(0x7FFF)
    largest = int(size.max())
    if largest >= _BF16_LIMIT_BITS:
        if not clamp or largest > _BF16_INFINITE_BITS:
            raise _TooLarge(to_float32(raw, "BF16"))
        losses.clamped += int(np.count_nonzero(size >= np.uint16(_BF16_LIMIT_BITS)))
    losses.to_zero += int(np.count_nonzero(size) - np.count_nonzero(size > np.uint16(_BF16_VANISHING_BITS)))
    return np.take(_bf16_table(), raw)


def _from_wider(raw: Array, losses: Losses, clamp: bool) -> npt.NDArray[np.float16]:
    size = np.abs(raw)
    if not float(size.max()) < _FLOAT16_LIMIT:  # NaN compares false
        if not clamp or np.isnan(size).any():
            raise _TooLarge(raw)
        losses.clamped += int(np.count_nonzero(size >= _FLOAT16_LIMIT))
        raw = np.clip(raw, -_FLOAT16_LARGEST, _FLOAT16_LARGEST)
    losses.to_zero += int(np.count_nonzero(size) - np.count_nonzero(size > _FLOAT16_VANISHING))
    return float16_from_float32(raw) if raw.dtype == np.float32 else raw.astype(np.float16)


@cache
def _bf16_table() -> npt.NDArray[np.float16]:
    """float16 of every bfloat16, by its bits, infinity and what is near it clamped."""
    with np.errstate(invalid="ignore", under="ignore"):
        values = to_float32(np.arange(1 << 16, dtype=np.uint16), "BF16")
        return np.clip(values, -_FLOAT16_LARGEST, _FLOAT16_LARGEST).astype(np.float16)
