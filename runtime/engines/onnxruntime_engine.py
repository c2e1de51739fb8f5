"""ONNX Runtime on the CPU: one session for each expert's graph stub.

A session holds its weights as float32 whatever their precision: it folds the cast of float16 weights when it is opened.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from wdmoe.runtime.errors import EngineError
from wdmoe.runtime.manifest import ExpertEntry
from wdmoe.runtime.memory import available_memory_bytes
from wdmoe.runtime.messages import Rows
from wdmoe.runtime.sessions import open_session
from wdmoe.runtime.tensor_file import read_spans


class OnnxruntimeEngine:
    """Runs experts with ONNX Runtime's CPU provider."""

    name = "onnxruntime"
    tolerance = 1e-4

    def __init__(
        self, folder: Path, experts: Sequence[ExpertEntry], threads: int, free_bytes: int | None = None
    ) -> None:
        """Open the experts.

        Args:
            folder: of the slice.
            experts: what to load.
            threads: for one call.
            free_bytes: memory to count on; None asks the system.

        Raises:
            EngineError: the weights do not fit into memory, or a graph is refused.
        """
        import onnxruntime

        free_bytes = available_memory_bytes() if free_bytes is None else free_bytes
        spans = (span for entry in experts for span in read_spans(folder / entry.weights).values())
        needed_bytes = sum(4 * math.prod(span.shape) for span in spans)
        if free_bytes is not None and needed_bytes > free_bytes:
            raise EngineError(
                f"engine {self.name}: holds weights as float32, {needed_bytes / 1e9:.1f} GB for this slice, "
                f"{free_bytes / 1e9:.1f} GB are free"
            )
        self.version = onnxruntime.__version__
        self._sessions = {(entry.block, entry.expert): open_session(folder / entry.graph, threads) for entry in experts}

    def run(self, block: int, expert: int, rows: Rows) -> Rows:
        """Run one expert on rows; see `ExpertEngine`."""
        (out,) = self._sessions[block, expert].run(["out"], {"rows": rows})
        result: Rows = out
        return result
