"""Writes the experts of a checkpoint, one file each, named by the hash of its content.

What each expert answers to a few fixed rows is computed from the same bytes on their way to the disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt

from wdmoe.export.checkpoint import Checkpoint, TensorName, read_pieces
from wdmoe.export.conversion import Losses, to_float16, to_float32
from wdmoe.export.families import ExpertNames
from wdmoe.export.journal import Finished, Journal
from wdmoe.export.tensor_writer import PARTIAL_SUFFIX, TensorWriter
from wdmoe.export.weights import Part, expert_parts
from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.half import float32_from_float16
from wdmoe.runtime.manifest import FileEntry, Precision
from wdmoe.runtime.tensor_file import TensorSpan, read_spans

FloatArray = npt.NDArray[np.float32]
OnBytes = Callable[[int], None]

GOLDEN_ROWS = 4
_GOLDEN_SEED = 20240722
DTYPES: dict[Precision, str] = {"fp32": "F32", "fp16": "F16"}


@dataclass(frozen=True, slots=True)
class ExpertFile:
    """One expert as written."""

    entry: FileEntry
    spans: dict[str, TensorSpan]
    outputs: FloatArray  # [GOLDEN_ROWS, d_model], its answers to the golden rows of its block
    losses: Losses

    @property
    def name(self) -> str:
        """Name of its file."""
        return expert_file_name(self.entry.sha256)


def expert_file_name(sha256: str) -> str:
    """Name the file of an expert after its content."""
    return f"{sha256}.safetensors"


def golden_rows(checkpoint: Checkpoint, post_norm: str, d_model: int, block: int) -> FloatArray:
    """Draw the rows that a device answers in its self-check: normal, scaled like the rows of that block."""
    dtype = checkpoint.span(post_norm).dtype
    scale = np.concatenate([to_float32(piece, dtype) for piece in checkpoint.pieces(post_norm)])
    normal = np.random.default_rng((_GOLDEN_SEED, block)).standard_normal((GOLDEN_ROWS, d_model), np.float32)
    rows: FloatArray = normal * scale
    return rows


@final
class ExpertStore:
    """The folder of expert files of one export; threads share it."""

    def __init__(
        self, folder: Path, journal: Journal, checkpoint: Checkpoint, precision: Precision, clamp: bool = False
    ) -> None:
        """Open the folder; remove what an interrupted export left half written.

        Args:
            folder: is made if it is not there.
            journal: of the experts already finished.
            checkpoint: where the weights come from.
            precision: in which they are written.
            clamp: whether values that float16 cannot hold become its largest.
        """
        folder.mkdir(exist_ok=True)
        self._folder, self._journal = folder, journal
        self._checkpoint, self._precision, self._clamp = checkpoint, precision, clamp
        for stale in folder.glob(f"*{PARTIAL_SUFFIX}"):
            stale.unlink()

    def put(
        self, block: int, expert: int, names: ExpertNames, rows: FloatArray, d_ff: int, on_bytes: OnBytes
    ) -> ExpertFile:
        """Write one expert, or find it written.

        Args:
            block: of the expert.
            expert: its number in the block.
            names: its tensors in the checkpoint.
            rows: golden rows of the block.
            d_ff: width of the expert.
            on_bytes: called with the number of bytes of the checkpoint that are dealt with.
        """
        parts = expert_parts(names, d_ff, rows.shape[1])
        if found := self._find(block, expert, parts, rows):
            on_bytes(sum(self._checkpoint.span(name).size_bytes for part in parts for name, _ in part.sources))
            return found
        dtype, losses = DTYPES[self._precision], Losses()
        temporary = self._folder / f"block_{block:02d}_expert_{expert:02d}"
        with TensorWriter(temporary, {part.name: (dtype, part.shape) for part in parts}) as writer:

            def written(part: Part) -> Iterator[npt.NDArray[Any]]:
                for name, _ in part.sources:
                    for piece in self._stored(name, losses, on_bytes):
                        writer.write(piece)
                        yield piece

            outputs = _answers(rows, *map(written, parts))
            entry = writer.finish()
            writer.rename(self._folder / expert_file_name(entry.sha256))
        self._journal.add(self._key(block, expert), Finished(entry, losses))
        return ExpertFile(entry, writer.spans, outputs, losses)

    def seal(self, used: frozenset[str]) -> None:
        """Remove every file that this export does not use."""
        for path in self._folder.iterdir():
            if path.name not in used:
                path.unlink()

    def _stored(self, name: TensorName, losses: Losses, on_bytes: OnBytes) -> Iterator[npt.NDArray[Any]]:
        """Read a tensor of the checkpoint in the precision of the bundle."""
        dtype = self._checkpoint.span(name).dtype
        for piece in self._checkpoint.pieces(name):
            if self._precision == "fp16":
                yield to_float16(piece, dtype, name, losses, self._clamp)
            else:
                yield to_float32(piece, dtype)
            on_bytes(piece.nbytes)

    def _find(self, block: int, expert: int, parts: tuple[Part, ...], rows: FloatArray) -> ExpertFile | None:
        """Find an expert written before the export was interrupted; its answers are computed anew."""
        if (finished := self._journal.find(self._key(block, expert))) is None:
            return None
        path = self._folder / expert_file_name(finished.entry.sha256)
        if not path.is_file() or path.stat().st_size != finished.entry.size_bytes:
            return None
        try:
            spans = read_spans(path)
        except BundleError:
            return None
        digest = hashlib.sha256()
        with path.open("rb") as file:
            digest.update(file.read(min(span.offset_bytes for span in spans.values())))

        def read(part: Part) -> Iterator[npt.NDArray[Any]]:
            for piece in read_pieces(path, spans[part.name]):
                digest.update(piece.reshape(-1).view(np.uint8).data)
                yield piece

        outputs = _answers(rows, *map(read, parts))
        if digest.hexdigest() != finished.entry.sha256:
            return None
        return ExpertFile(finished.entry, spans, outputs, finished.losses)

    def _key(self, block: int, expert: int) -> str:
        how = f"{self._precision} clamped" if self._clamp else self._precision
        return f"{self._checkpoint.stamp} {how} {block} {expert}"


def _answers(
    rows: FloatArray,
    gate: Iterator[npt.NDArray[Any]],
    up: Iterator[npt.NDArray[Any]],
    down: Iterator[npt.NDArray[Any]],
) -> FloatArray:
    """Run an expert in float32 on rows, its weights coming by in this order, whole rows at a time."""
    gated = _project(rows, gate)
    with np.errstate(over="ignore"):  # exp(-x) of a very negative x is infinite, and silu(x) is then 0 as it should
        gated /= 1 + np.exp(-gated)
    return _project(gated * _project(rows, up), down)


def _project(rows: FloatArray, pieces: Iterator[npt.NDArray[Any]]) -> FloatArray:
    # NOTE: a row at a time, though it looks wasteful: a product this small of two matrices is dealt out to all cores
    # by BLAS, and took 100 times as long as this wherever one of them was busy.
    columns = [np.stack([weights @ row for row in rows]) for weights in map(_as_float32, pieces)]
    return np.concatenate(columns, axis=1)


def _as_float32(piece: npt.NDArray[Any]) -> FloatArray:
    return float32_from_float16(piece) if piece.dtype == np.float16 else piece
