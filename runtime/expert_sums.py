"""What a request asks to be computed: expert outputs, weighted and summed by row. Devices and the base station share it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wdmoe.runtime.engines import ExpertEngine
from wdmoe.runtime.messages import ExpertRequest, Rows, request_index, request_weights


def weighted_sums(engine: ExpertEngine, request: ExpertRequest, rows: Rows) -> Rows:
    """Run the experts a request names and sum their weighted outputs, one row for each row sent.

    Args:
        engine: holds the experts.
        request: checked.
        rows: float32 [n, d_model].

    Returns:
        float32 [n, d_model].
    """
    index, weights = request_index(request), request_weights(request)
    total = np.zeros(rows.shape, np.float32)
    at = 0
    for expert, count in zip(request.experts, request.counts, strict=True):
        which: slice | npt.NDArray[np.uint32] = index[at : at + count]
        first, last = int(index[at]), int(index[at + count - 1])
        if last - first + 1 == count:  # `index` ascends within an expert: its rows are one piece, which needs no copy
            which = slice(first, last + 1)
        out = engine.run(request.block, expert, rows[which])
        # As it ascends, no two additions meet.
        total[which] += out * weights[at : at + count, None]
        at += count
    return total
