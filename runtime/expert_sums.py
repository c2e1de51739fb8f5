"""What a request asks to be computed: expert outputs, weighted and summed by row. Devices and the base station share it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wdmoe.runtime.engines import ExpertEngine
from wdmoe.runtime.messages import ExpertRequest, Rows, request_index, request_weights

_LAID_OUT_FLOATS = 1 << 22  # 16 MiB

Which = slice | npt.NDArray[np.uint32]


def weighted_sums(engine: ExpertEngine, request: ExpertRequest, rows: Rows) -> Rows:
    """Run the experts a request names and sum their weighted outputs, one row for each row sent.

    Args:
        engine: holds the experts.
        request: checked.
        rows: float32 [n, d_model].

    Returns:
        float32 [n, d_model].
    """
    if len(rows) == 1:
        return _sum_of_row(engine, request, rows)
    index = request_index(request)
    most = int(np.bincount(index).max())  # experts of one row
    if rows.size * most <= _LAID_OUT_FLOATS:
        return _sum_at_the_end(engine, request, rows, index, most)
    return _sum_as_they_come(engine, request, rows, index)


def _sum_of_row(engine: ExpertEngine, request: ExpertRequest, row: Rows) -> Rows:
    """Weigh and sum the outputs of all experts for the one row."""
    outputs = np.concatenate([engine.run(request.block, expert, row) for expert in request.experts])
    total: Rows = np.matmul(request_weights(request)[None], outputs)
    return total


def _sum_at_the_end(
    engine: ExpertEngine, request: ExpertRequest, rows: Rows, index: npt.NDArray[np.uint32], most: int
) -> Rows:
    """Lay the outputs out by row, then multiply each row's with its weights: reads and writes a third as much."""
    n, d_model = rows.shape
    place = _places(index, n, most)
    weights = np.zeros(n * most, np.float32)
    weights[place] = request_weights(request)
    outputs = np.empty((n * most, d_model), np.float32)
    if len(index) < len(outputs):
        empty = np.ones(len(outputs), np.bool_)
        empty[place] = False
        outputs[empty] = 0
    at = 0
    for expert, count in zip(request.experts, request.counts, strict=True):
        outputs[place[at : at + count]] = engine.run(request.block, expert, rows[_which(index, at, count)])
        at += count
    total: Rows = np.matmul(weights.reshape(n, 1, most), outputs.reshape(n, most, d_model)).reshape(n, d_model)
    return total


def _places(index: npt.NDArray[np.uint32], n: int, most: int) -> npt.NDArray[np.int64]:
    """Return the place of each entry's output: after those of the same row whose experts come before."""
    numbers = np.arange(len(index))
    order = np.argsort(index, kind="stable")
    by_row = index[order]
    place = np.empty(len(index), np.int64)
    place[order] = by_row.astype(np.int64) * most + numbers - np.searchsorted(by_row, np.arange(n))[by_row]
    return place


def _sum_as_they_come(engine: ExpertEngine, request: ExpertRequest, rows: Rows, index: npt.NDArray[np.uint32]) -> Rows:
    """Add each expert's weighted outputs to the sums: needs no more memory than they do."""
    weights = request_weights(request)
    total = np.zeros(rows.shape, np.float32)
    at = 0
    for expert, count in zip(request.experts, request.counts, strict=True):
        which = _which(index, at, count)
        # As `index` ascends within an expert, no two additions meet.
        total[which] += engine.run(request.block, expert, rows[which]) * weights[at : at + count, None]
        at += count
    return total


def _which(index: npt.NDArray[np.uint32], at: int, count: int) -> Which:
    """Return the rows of an expert; as they ascend, they may be one piece, which needs no copy."""
    first, last = int(index[at]), int(index[at + count - 1])
    return slice(first, last + 1) if last - first + 1 == count else index[at : at + count]
