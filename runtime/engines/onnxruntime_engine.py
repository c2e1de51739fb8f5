"""ONNX Runtime on the CPU: one session for each expert's graph stub.

A session holds float16 weights as float32: it folds their cast when it is opened. int8 and int4 it holds as stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wdmoe.runtime.errors import EngineError
from wdmoe.runtime.huge_pages import use_huge_pages
from wdmoe.runtime.manifest import ExpertEntry
from wdmoe.runtime.memory import available_memory_bytes
from wdmoe.runtime.messages import Rows
from wdmoe.runtime.quantised import resident_bytes
from wdmoe.runtime.sessions import open_session
from wdmoe.runtime.tensor_file import read_spans

# On ARM its int4 kernel of KleidiAI rounds rows by one scale a row, and scales to bfloat16: answers are off by up to 5 %.
_QUANTISED_CONFIGURATION = (("mlas.disable_kleidiai", "1"),)


class OnnxruntimeEngine:
    """Runs experts with ONNX Runtime's CPU provider."""

    name = "onnxruntime"
    # int8 and int4 weights multiply rows that are sums of two int8 numbers, see `wdmoe.export.graphs`; where one number must
    # do, golden rows are such that it does.
    tolerance = 1e-4
    _TOLERANCE_QUANTISED = 1e-3

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
        spans = [span for entry in experts for span in read_spans(folder / entry.weights).values()]
        needed_bytes = sum(resident_bytes(span) for span in spans)
        quantised = any(span.dtype == "U8" for span in spans)
        if free_bytes is not None and needed_bytes > free_bytes:
            raise EngineError(
                f"engine {self.name}: holds weights as {'stored' if quantised else 'float32'}, "
                f"{needed_bytes / 1e9:.1f} GB for this slice, {free_bytes / 1e9:.1f} GB are free"
            )
        if quantised:
            self.tolerance = self._TOLERANCE_QUANTISED
        self.version = onnxruntime.__version__
        configuration = _QUANTISED_CONFIGURATION if quantised else ()
        self._sessions = {
            (entry.block, entry.expert): open_session(folder / entry.graph, threads, configuration) for entry in experts
        }
        use_huge_pages()

    @classmethod
    def identity(cls) -> str:
        """Name the library, whichever package it is from; see `wdmoe.runtime.engines.engine_identity`."""
        import onnxruntime

        return str(onnxruntime.__version__)

    def run(self, block: int, expert: int, rows: Rows) -> Rows:
        """Run one expert on rows; see `ExpertEngine`."""
        (out,) = self._sessions[block, expert].run(["out"], {"rows": rows})
        result: Rows = out
        return result
