"""ONNX Runtime sessions as both sides open them: quiet, few threads, no busy waiting."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from wdmoe.runtime.errors import EngineError

if TYPE_CHECKING:
    import onnxruntime


def open_session(graph: Path, threads: int, entries: Sequence[tuple[str, str]] = ()) -> onnxruntime.InferenceSession:
    """Open a graph on the CPU.

    Args:
        graph: an ONNX file; its weights lie beside it.
        threads: for one call.
        entries: of the session's configuration, beyond those of every session; ONNX Runtime ignores what it does not know.

    Raises:
        ImportError: ONNX Runtime is not installed.
        EngineError: it refuses the graph.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Base station and devices often share a machine, and a device has other work than to spin.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Sessions run one after another: with an arena for each, every one would keep room for its own largest call.
    _make_common_arena()
    options.add_session_config_entry("session.use_env_allocators", "1")
    for name, value in entries:
        options.add_session_config_entry(name, value)
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base below Exception
        raise EngineError(f"{graph}: ONNX Runtime {ort.__version__} refuses it: {error}") from error


@cache
def _make_common_arena() -> None:
    import onnxruntime as ort

    kind = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(
        kind, ort.OrtArenaCfg({"arena_extend_strategy": 1})
    )  # 1: no more than is asked for
