"""The reference engine: plain numpy in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wdmoe.runtime.manifest import ExpertEntry
from wdmoe.runtime.memory import available_memory_bytes
from wdmoe.runtime.messages import Rows
from wdmoe.runtime.quantised import StoredMatrix, expert_matrices
from wdmoe.runtime.tensor_file import map_tensors

FloatArray = npt.NDArray[np.float32]
Weights = FloatArray | StoredMatrix

_FLOAT32_SHARE = 0.5  # of the memory that is free
_CHUNK_ELEMENTS = 1 << 20  # of a matrix that is not float32, converted at a time


class NumpyEngine:
    """Runs experts with numpy; `threads` is up to numpy's own BLAS.

    Weights are held as float32, if that takes at most half of the memory that is free. If not, they stay in their
    files, mapped, and what is not float32 is converted at each use, 4 MB at a time: slower, in the memory of the files alone.
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
        paths = {(entry.block, entry.expert): folder / entry.weights for entry in experts}
        stored = {key: expert_matrices(map_tensors(path), path) for key, path in paths.items()}
        free_bytes = available_memory_bytes() if free_bytes is None else free_bytes
        needed_bytes = sum(4 * matrix.size for matrices in stored.values() for matrix in matrices)
        self.converts_at_use = free_bytes is not None and needed_bytes > _FLOAT32_SHARE * free_bytes
        self._weights: dict[tuple[int, int], list[Weights]] = {}
        for key, matrices in stored.items():
            held = map(_as_stored, matrices) if self.converts_at_use else (matrix.float32() for matrix in matrices)
            self._weights[key] = list(held)

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
    if not isinstance(weight, StoredMatrix):
        return rows @ weight.T
    result = np.empty((len(rows), weight.rows), np.float32)
    at_once = max(1, _CHUNK_ELEMENTS // weight.columns)
    for start in range(0, weight.rows, at_once):
        chunk = weight.float32(start, start + at_once)
        np.matmul(rows, chunk.T, out=result[:, start : start + at_once])
    return result


def _as_stored(matrix: StoredMatrix) -> Weights:
    return matrix.stored if matrix.stored.dtype == np.float32 else matrix
