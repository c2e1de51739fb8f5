"""The reference engine: plain numpy in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from wdmoe.runtime.manifest import ExpertEntry
from wdmoe.runtime.messages import Rows
from wdmoe.runtime.tensor_file import map_tensors


class NumpyEngine:
    """Runs experts with numpy; weights are held as float32. `threads` is up to numpy's own BLAS."""

    name = "numpy"
    version = np.__version__
    tolerance = 1e-4

    def __init__(self, folder: Path, experts: Sequence[ExpertEntry], threads: int) -> None:
        self._weights: dict[tuple[int, int], tuple[Rows, Rows, Rows]] = {}
        for entry in experts:
            tensors = map_tensors(folder / entry.weights)
            gate, up, down = (tensors[n].astype(np.float32) for n in ("gate_proj", "up_proj", "down_proj"))
            self._weights[entry.block, entry.expert] = gate, up, down

    def run(self, block: int, expert: int, rows: Rows) -> Rows:
        """Run one expert on rows; see `ExpertEngine`."""
        gate, up, down = self._weights[block, expert]
        return swiglu(rows, gate, up) @ down.T


def swiglu(rows: Rows, gate: Rows, up: Rows) -> Rows:
    """Return silu(gate x) * (up x) for each row x: [n, d_model] with [d_ff, d_model] twice -> [n, d_ff]."""
    gated = rows @ gate.T
    with np.errstate(over="ignore"):  # exp(-x) overflows to inf for very negative x, and x / inf is the right 0
        gated /= 1.0 + np.exp(-gated)
    gated *= rows @ up.T
    return gated
