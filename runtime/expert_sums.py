"""What a request asks to be computed: expert outputs, weighted and summed by row. Devices and the base station share it."""

from __future__ import annotations

import numpy as np

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
        which = index[at : at + count]
        # `index` ascends within an expert, so as many entries as rows means every row in order.
        out = engine.run(request.block, expert, rows if count == len(rows) else rows[which])
        # For the same reason no two additions meet.
        total[which] += out * weights[at : at + count, None]
        at += count
    return total
