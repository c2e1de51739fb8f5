"""Quantises the weights of experts, whole rows at a time: symmetric, a float16 scale for each row or group.

int8: a scale for each row, by its largest weight. int4: a scale for each group of 128 weights of a row, by the clipping ratio
of three that leaves the least squared error, then fitted to the integers it gave.

`rounded_rows` does to rows what ONNX Runtime's int4 kernel on the CPU does to them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wdmoe.runtime.errors import CheckpointError
from wdmoe.runtime.half import float16_from_float32, float32_from_float16
from wdmoe.runtime.quantised import ALIGNMENT, GROUP, ZERO_INT4, ZERO_INT8, padded

FloatArray = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Scales = npt.NDArray[np.float16]

_LARGEST_INT8 = np.float32(127)
_SMALLEST_ROW = np.float32(1e-30)  # so that nothing is divided by zero
_LARGEST_SCALE = np.float32(65504.0)
_SMALLEST_SCALE = np.float32(2.0**-24)
# Steps that the largest weight of an int4 group is away from zero. 7 clips nothing, 8 what is positive and near it
# (there is a -8, but no 8), 9 a few outliers for the sake of the others. Experts of the small model answer with an RMS
# error of 0.207 by 7 alone, 0.187 by 8 alone, 0.172 by these and the fits; seven ratios in place of three gain nothing.
_STEPS = (7.0, 8.0, 9.0)
_FITS = 2


def quantise_int8(weights: FloatArray, tensor: object) -> tuple[Bytes, Scales]:
    """Quantise rows [n, columns] to int8.

    Args:
        weights: whole rows.
        tensor: its name, or whatever names it, for the error.

    Returns:
        Bytes [n, columns, padded to a multiple of 16] and scales [n].

    Raises:
        CheckpointError: a weight is not finite, or a scale does not fit into float16.
    """
    largest = _largest(weights, tensor)
    scales = _scales(largest / np.float32(127), tensor)
    integers = np.rint(weights / float32_from_float16(scales)[:, None])
    np.clip(integers, -127, 127, out=integers)
    stored = np.full((len(weights), padded(weights.shape[1], ALIGNMENT)), ZERO_INT8, np.uint8)
    stored[:, : weights.shape[1]] = integers + np.float32(ZERO_INT8)
    return stored, scales


def quantise_int4(weights: FloatArray, tensor: object) -> tuple[Bytes, Scales]:
    """Quantise rows [n, columns] to int4; arguments and errors as of `quantise_int8`.

    Returns:
        Bytes [n, groups, 64], the low nibble first, and scales [n, groups]; the last group is padded with zeros.
    """
    rows, columns = weights.shape
    groups = padded(columns, GROUP) // GROUP
    if columns % GROUP:
        weights = np.pad(weights, ((0, 0), (0, groups * GROUP - columns)))
    grouped = weights.reshape(rows * groups, GROUP)
    largest = _largest(grouped, tensor)
    best = _scales(largest / np.float32(_STEPS[0]), tensor)
    integers, error = _rounded(grouped, best)
    for steps in _STEPS[1:]:
        scales = _scales(largest / np.float32(steps), tensor)
        _keep_better(grouped, scales, best, integers, error)
    # For given integers the best scale is a division; with it a few weights are nearer to another integer.
    for _ in range(_FITS):
        squares = np.einsum("ij,ij->i", integers, integers)
        fitted = np.einsum("ij,ij->i", grouped, integers) / np.maximum(squares, np.float32(1))
        _keep_better(grouped, _scales(fitted, tensor), best, integers, error)
    nibbles = (integers + np.float32(ZERO_INT4)).astype(np.uint8).reshape(rows, groups, GROUP // 2, 2)
    packed: Bytes = nibbles[..., 0] | (nibbles[..., 1] << np.uint8(4))
    return packed, best.reshape(rows, groups)


def rounded_rows(rows: FloatArray) -> FloatArray:
    """Round rows [n, columns] to int8 and back, with a scale for each 128 columns by the largest of them."""
    columns = rows.shape[1]
    groups = np.pad(rows, ((0, 0), (0, padded(columns, GROUP) - columns))).reshape(len(rows), -1, GROUP)
    largest = np.maximum(np.abs(groups).max(axis=2, keepdims=True), _SMALLEST_ROW)
    # As the kernel does it: times the reciprocal, which rounds otherwise than a division.
    steps = np.rint(groups * (_LARGEST_INT8 / largest))
    rounded: FloatArray = (steps * (largest / _LARGEST_INT8)).reshape(len(rows), -1)[:, :columns]
    return rounded


def _keep_better(grouped: FloatArray, scales: Scales, best: Scales, integers: FloatArray, error: FloatArray) -> None:
    """Take scales, and the integers they give, wherever they leave less error than the best so far."""
    other, other_error = _rounded(grouped, scales)
    better = np.flatnonzero(other_error < error)
    best[better], integers[better], error[better] = scales[better], other[better], other_error[better]


def _rounded(grouped: FloatArray, scales: Scales) -> tuple[FloatArray, FloatArray]:
    """Return the integers nearest to weights [m, GROUP] in units of their scales, and the squared error of each group."""
    wide = float32_from_float16(scales)[:, None]
    integers: FloatArray = np.rint(grouped / wide)
    np.clip(integers, -ZERO_INT4, ZERO_INT4 - 1, out=integers)
    difference = integers * wide
    difference -= grouped
    error: FloatArray = np.einsum("ij,ij->i", difference, difference)
    return integers, error


def _largest(weights: FloatArray, tensor: object) -> FloatArray:
    largest: FloatArray = np.maximum(weights.max(axis=1), -weights.min(axis=1))
    if not np.isfinite(largest).all():
        raise CheckpointError(f"tensor {tensor}: has values that are not finite; the checkpoint is damaged")
    return largest


def _scales(wanted: FloatArray, tensor: object) -> Scales:
    """Round scales to float16; where all weights are zero, or next to it, any scale will do."""
    if float(wanted.max(initial=0.0)) > _LARGEST_SCALE:
        raise CheckpointError(f"tensor {tensor}: weights too large to be quantised; export with --precision fp32")
    return float16_from_float32(np.maximum(wanted, _SMALLEST_SCALE))
