"""Engines run experts. One seam, looked up by name in a table, best first."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from wdmoe.runtime.errors import EngineError
from wdmoe.runtime.manifest import ExpertEntry
from wdmoe.runtime.messages import Rows

__all__ = ["ENGINES", "ExpertEngine", "engine_identity", "load_engine", "prepare_engine"]


class ExpertEngine(Protocol):
    """Runs the experts of one slice; belongs to one thread at a time."""

    name: str
    version: str  # of the library behind it
    tolerance: float  # largest error against the golden outputs that is rounding, relative to their largest value

    def run(self, block: int, expert: int, rows: Rows) -> Rows:
        """Return down_proj (silu(gate_proj x) * up_proj x) for each row x, both float32 [n, d_model]."""
        ...


# name -> where it is, best first; imported only when asked for, since each needs a library of its own.
ENGINES = {
    "tensorrt": "wdmoe.runtime.engines.tensorrt_engine:TensorrtEngine",
    "onnxruntime-cuda": "wdmoe.runtime.engines.onnxruntime_cuda_engine:OnnxruntimeCudaEngine",
    "onnxruntime": "wdmoe.runtime.engines.onnxruntime_engine:OnnxruntimeEngine",
    "numpy": "wdmoe.runtime.engines.numpy_engine:NumpyEngine",
}
_INSTALL = {  # what to do where the library is missing
    "tensorrt": "it comes with JetPack on a Jetson: see `wdmoe-device info`",
    "onnxruntime": "install it with: pip install 'wdmoe[cpu]'",
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
    try:
        engine: ExpertEngine = _factory(name)(folder, experts, threads)
    except ImportError as error:
        raise _missing(name, error) from error
    return engine


def prepare_engine(name: str, folder: Path, experts: Sequence[ExpertEntry], say: Callable[[str], None]) -> bool:
    """Let an engine make what it keeps in the folder, once on each device, before it is loaded.

    Args:
        name: a key of `ENGINES`.
        folder: of the slice.
        experts: what will be loaded.
        say: told of the progress, which may take minutes.

    Returns:
        Whether this engine keeps anything.

    Raises:
        EngineError: the engine's library is not installed, or it cannot serve the slice.
    """
    try:
        prepare = getattr(_factory(name), "prepare", None)
        if prepare is None:
            return False
        prepare(folder, experts, say)
    except ImportError as error:
        raise _missing(name, error) from error
    return True


def engine_identity(name: str) -> str:
    """Name an engine, its library and, where that matters, the machine: what a verdict on its answers holds for.

    Raises:
        EngineError: the engine's library is not installed.
    """
    try:
        identity = getattr(_factory(name), "identity", None)
        if identity is not None:
            return f"{name} {identity()}"
        return f"{name} {importlib.metadata.version(name.partition('-')[0])}"
    except importlib.metadata.PackageNotFoundError:  # installed under another name
        return name
    except ImportError as error:
        raise _missing(name, error) from error


def _factory(name: str) -> Any:
    module, _, attribute = ENGINES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _missing(name: str, error: ImportError) -> EngineError:
    return EngineError(f"engine {name}: {error}; {_INSTALL.get(name, 'install its library')}")
