"""The reference engine: plain numpy in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.runtime.half import float32_from_float16
from wdmoe.runtime.manifest import ExpertEntry
from wdmoe.runtime.memory import available_memory_bytes
from wdmoe.runtime.messages import Rows
from wdmoe.runtime.tensor_file import map_tensors

Weights = npt.NDArray[Any]  # float32, or float16 as stored

_FLOAT32_SHARE = 0.5  # of the memory that is free
_CHUNK_ELEMENTS = 1 << 20  # of a float16 matrix, converted at a time


class NumpyEngine:
    """Runs experts with numpy; `threads` is up to numpy's own BLAS.

    Weights are held as float32, if that takes at most half of the memory that is free. If not, they stay in their
    files, mapped, and float16 is converted at each use, 4 MB at a time: slower, in the memory of the files alone.
    """

    name = "numpy"
    version = np.__version__
    tolerance = 1e-4

    def __init__(
        self, folder: Path, experts: Sequence[ExpertEntry], threads: int, free_bytes: int | None = None
    ) -> None:
        """Load experts.

        Args:
            folder: of the slice.
            experts: what to load.
            threads: not used.
            free_bytes: memory to count on; None asks the system.
        """
        mapped = {(entry.block, entry.expert): map_tensors(folder / entry.weights) for entry in experts}
        free_bytes = available_memory_bytes() if free_bytes is None else free_bytes
        needed_bytes = sum(4 * tensor.size for tensors in mapped.values() for tensor in tensors.values())
        self.converts_at_use = free_bytes is not None and needed_bytes > _FLOAT32_SHARE * free_bytes
        held = _as_stored if self.converts_at_use else _as_float32
        self._weights: dict[tuple[int, int], tuple[Weights, Weights, Weights]] = {}
        for key, tensors in mapped.items():
            self._weights[key] = held(tensors["gate_proj"]), held(tensors["up_proj"]), held(tensors["down_proj"])

    def run(self, block: int, expert: int, rows: Rows) -> Rows:
        """Run one expert on rows; see `ExpertEngine`."""
        gate, up, down = self._weights[block, expert]
        return _project(swiglu(rows, gate, up), down)


def swiglu(rows: Rows, gate: Weights, up: Weights) -> Rows:
    """Return silu(gate x) * (up x) for each row x: [n, d_model] with [d_ff, d_model] twice -> [n, d_ff]."""
    gated = _project(rows, gate)
    with np.errstate(over="ignore"):  # exp(-x) overflows to inf for very negative x, and x / inf is the right 0
        gated /= 1.0 + np.exp(-gated)
    gated *= _project(rows, up)
    return gated


def _project(rows: Rows, weight: Weights) -> Rows:
    """Multiply rows [n, in] by a weight [out, in]."""
    if weight.dtype == np.float32:
        return rows @ weight.T
    result = np.empty((len(rows), len(weight)), np.float32)
    at_once = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), at_once):
        chunk = float32_from_float16(weight[start : start + at_once])
        np.matmul(rows, chunk.T, out=result[:, start : start + at_once])
    return result


def _as_float32(tensor: Weights) -> Weights:
    return float32_from_float16(tensor) if tensor.dtype == np.float16 else np.array(tensor, np.float32)


def _as_stored(tensor: Weights) -> Weights:
    return tensor.view(np.ndarray)
