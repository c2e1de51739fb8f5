"""Random devices as the deciding functions see them, for tests and benchmarks."""

from __future__ import annotations

import numpy as np

from wdmoe.bs.airtime import LatencyModel, Medium


def random_model(rng: np.random.Generator, n_devices: int, medium: Medium, up_to: int = 64) -> LatencyModel:
    """Devices with a fixed cost of reading weights and a slope beyond a bend, on links of different rates."""
    reading, slope, bend = rng.uniform(0.2, 2.0, n_devices), rng.uniform(0.01, 0.1, n_devices), 8
    tokens = np.arange(up_to + 1)
    tables = reading[:, None] + slope[:, None] * np.maximum(0, tokens - bend)
    tables[:, 0] = 0
    return LatencyModel(
        tables=tables,
        table=np.arange(n_devices),
        slowness=rng.uniform(0.8, 1.5, n_devices),
        staging_ms=rng.uniform(0, 0.02, n_devices),
        way_ms=np.full(n_devices, rng.uniform(0, 0.5)),
        down_ms=rng.uniform(0.05, 0.4, n_devices),
        up_ms=rng.uniform(0.05, 0.4, n_devices),
        medium=medium,
    )
