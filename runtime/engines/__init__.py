"""Engines run experts. One seam, looked up by name in a table, best first."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from wdmoe.runtime.errors import EngineError
from wdmoe.runtime.manifest import ExpertEntry
from wdmoe.runtime.messages import Rows

__all__ = ["ENGINES", "ExpertEngine", "load_engine"]


class ExpertEngine(Protocol):
    """Runs the experts of one slice; belongs to one thread at a time."""

    name: str
    version: str  # of the library behind it
    tolerance: float  # largest error against the golden outputs that is rounding, relative to their largest value

    def run(self, block: int, expert: int, rows: Rows) -> Rows:
        """Return down_proj (silu(gate_proj x) * up_proj x) for each row x, both float32 [n, d_model]."""
        ...


# name -> where it is; imported only when asked for, since each needs a library of its own.
ENGINES = {
    "onnxruntime-cuda": "wdmoe.runtime.engines.onnxruntime_cuda_engine:OnnxruntimeCudaEngine",
    "onnxruntime": "wdmoe.runtime.engines.onnxruntime_engine:OnnxruntimeEngine",
    "numpy": "wdmoe.runtime.engines.numpy_engine:NumpyEngine",
}


def load_engine(name: str, folder: Path, experts: Sequence[ExpertEntry], threads: int) -> ExpertEngine:
    """Load the experts of a slice into an engine.

    Args:
        name: a key of `ENGINES`.
        folder: of the slice.
        experts: what to load.
        threads: for one call.

    Raises:
        EngineError: the engine's library is not installed, or it cannot load the slice.
    """
    module, _, attribute = ENGINES[name].partition(":")
    factory = getattr(importlib.import_module(module), attribute)
    try:
        engine: ExpertEngine = factory(folder, experts, threads)
    except ImportError as error:
        raise EngineError(f"engine {name}: {error}; install it with: pip install 'wdmoe[cpu]'") from error
    return engine
