"""ONNX Runtime on the CPU: one session for each expert's graph stub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wdmoe.runtime.manifest import ExpertEntry
from wdmoe.runtime.messages import Rows
from wdmoe.runtime.sessions import open_session


class OnnxruntimeEngine:
    """Runs experts with ONNX Runtime's CPU provider."""

    name = "onnxruntime"
    tolerance = 1e-4

    def __init__(self, folder: Path, experts: Sequence[ExpertEntry], threads: int) -> None:
        import onnxruntime

        self.version = onnxruntime.__version__
        self._sessions = {(entry.block, entry.expert): open_session(folder / entry.graph, threads) for entry in experts}

    def run(self, block: int, expert: int, rows: Rows) -> Rows:
        """Run one expert on rows; see `ExpertEngine`."""
        (out,) = self._sessions[block, expert].run(["out"], {"rows": rows})
        result: Rows = out
        return result
