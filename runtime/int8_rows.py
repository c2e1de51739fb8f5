"""Rows as int8 with a scale each, a quarter of float32: scale = largest absolute value / 127.

A packed row is its scale, a little-endian float32, and then d_model int8 numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

SCALE_BYTES = 4
_LARGEST = 127
_LARGEST_SCALE = float(np.finfo(np.float32).max) / 128  # beyond, a number of the row could become infinite

Floats = npt.NDArray[np.float32]
Packed = npt.NDArray[np.int8]  # [n, SCALE_BYTES + d_model]


def pack_int8(rows: Floats) -> Packed:
    """Round finite rows, half of a scale off at most."""
    scales = np.maximum(rows.max(axis=1), -rows.min(axis=1)) / np.float32(_LARGEST)
    packed = np.empty((len(rows), SCALE_BYTES + rows.shape[1]), np.int8)
    packed[:, :SCALE_BYTES] = scales.astype("<f4").view(np.int8).reshape(-1, SCALE_BYTES)
    # A row of zeros has scale 0; one of the smallest numbers a scale that is itself rounded, hence the clipping.
    divisors = np.where(scales > 0, scales, np.float32(1))
    rounded = np.rint(rows / divisors[:, None])
    packed[:, SCALE_BYTES:] = np.clip(rounded, -_LARGEST, _LARGEST, out=rounded)
    return packed


def unpack_int8(packed: Packed) -> Floats:
    """Multiply with the scales."""
    rows: Floats = packed[:, SCALE_BYTES:] * scales_of(packed)[:, None]
    return rows


def scales_of(packed: Packed) -> Floats:
    """Return the scale of each row."""
    scales: npt.NDArray[Any] = np.ascontiguousarray(packed[:, :SCALE_BYTES]).view("<f4")[:, 0]
    return scales.astype(np.float32, copy=False)


def scales_hold(packed: Packed) -> bool:
    """Whether every scale is a number that a sender can have meant."""
    scales = scales_of(packed)
    return bool(((scales >= 0) & (scales <= _LARGEST_SCALE)).all())  # not a number is neither
