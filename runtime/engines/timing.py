"""How long an expert call takes here: a quick measurement, for profiles that are taken at every start."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from wdmoe.profiles.device_profile import Point
from wdmoe.runtime.messages import Rows

_TOKENS = (1, 4, 16, 64, 256)
_CALLS = 15
_BUDGET_S = 0.5  # for each token count: a slow machine takes fewer calls


class Runs(Protocol):
    """What runs experts; see `ExpertEngine`."""

    def run(self, block: int, expert: int, rows: Rows) -> Rows:
        """Run one expert on rows."""
        ...


def quick_points(engine: Runs, experts: Sequence[tuple[int, int]], d_model: int) -> tuple[Point, ...]:
    """Measure an expert call at a few token counts; takes about a second on a small model.

    Args:
        engine: with the experts loaded.
        experts: (block, expert) of each, at least one.
        d_model: width of a row.
    """
    rng = np.random.default_rng(0)
    points: list[Point] = []
    for tokens in _TOKENS:
        rows = rng.standard_normal((tokens, d_model), dtype=np.float32)
        times_ms: list[float] = []
        started = time.perf_counter()
        for call in range(_CALLS + 2):
            # Another expert each time, as in service: one expert over and over would sit in the cache.
            block, expert = experts[call % len(experts)]
            before = time.perf_counter()
            engine.run(block, expert, rows)
            after = time.perf_counter()
            if call >= 2:  # the first calls allocate
                times_ms.append((after - before) * 1e3)
            if times_ms and after - started > _BUDGET_S:
                break
        p50, p95 = np.percentile(times_ms, (50, 95))
        points.append(Point(tokens, float(p50), float(p95)))
    return tuple(points)
