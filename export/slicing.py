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

from wdmoe.export.checkpoint import Checkpoint, read_pieces
from wdmoe.export.conversion import Losses, to_float16, to_float32
from wdmoe.export.families import ExpertNames
from wdmoe.export.journal import Finished, Journal
from wdmoe.export.quantising import quantise_int4, quantise_int8
from wdmoe.export.tensor_writer import PARTIAL_SUFFIX, TensorWriter
from wdmoe.export.weights import Part, expert_parts
from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.half import float32_from_float16
from wdmoe.runtime.manifest import QUANTISED, FileEntry, Precision
from wdmoe.runtime.quantised import SCALE_SUFFIX, expert_layout
from wdmoe.runtime.quantised import to_float32 as stored_to_float32
from wdmoe.runtime.tensor_file import TensorSpan, read_spans

FloatArray = npt.NDArray[np.float32]
OnBytes = Callable[[int], None]

GOLDEN_ROWS = 4
_GOLDEN_SEED = 20240722


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
        losses = Losses()
        temporary = self._folder / f"block_{block:02d}_expert_{expert:02d}"
        with TensorWriter(temporary, expert_layout(rows.shape[1], d_ff, self._precision)) as writer:
            if self._precision in QUANTISED:
                outputs, exact = _answers_of_two(rows, *(self._quantised(part, writer, on_bytes) for part in parts))
                losses.add_error(outputs, exact)
            else:
                outputs = answers_of(rows, *(self._floats(part, writer, losses, on_bytes) for part in parts))
            entry = writer.finish()
            self._journal.add(self._key(block, expert), Finished(entry, losses))
            writer.rename(self._folder / expert_file_name(entry.sha256))
        return ExpertFile(entry, writer.spans, outputs, losses)

    def seal(self, used: frozenset[str]) -> None:
        """Remove every file that this export does not use."""
        for path in self._folder.iterdir():
            if path.name not in used:
                path.unlink()

    def _floats(
        self, part: Part, writer: TensorWriter, losses: Losses, on_bytes: OnBytes
    ) -> Iterator[npt.NDArray[Any]]:
        """Write a matrix in the precision of the bundle, and hand out what is written, piece by piece."""
        for name, _ in part.sources:
            dtype = self._checkpoint.span(name).dtype
            for raw in self._checkpoint.pieces(name):
                half = self._precision == "fp16"
                piece = to_float16(raw, dtype, name, losses, self._clamp) if half else to_float32(raw, dtype)
                writer.write(piece)
                yield piece
                on_bytes(raw.nbytes)

    def _quantised(
        self, part: Part, writer: TensorWriter, on_bytes: OnBytes
    ) -> Iterator[tuple[FloatArray, FloatArray]]:
        """Write a matrix as int8 or int4, its scales behind it; hand out what it is now and what it was, by pieces."""
        quantise = quantise_int8 if self._precision == "int8" else quantise_int4
        scales: list[npt.NDArray[np.float16]] = []
        for name, _ in part.sources:
            dtype = self._checkpoint.span(name).dtype
            for raw in self._checkpoint.pieces(name):
                weights = to_float32(raw, dtype)
                stored, scale = quantise(weights, name)
                writer.write(stored)
                scales.append(scale)
                yield stored_to_float32(stored, scale, part.shape[1]), weights
                on_bytes(raw.nbytes)
        writer.write(np.concatenate(scales))

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
            scale = spans.get(part.name + SCALE_SUFFIX)
            scales = None if scale is None else np.concatenate(list(read_pieces(path, scale)))
            start = 0
            for piece in read_pieces(path, spans[part.name], part.shape[1]):
                digest.update(piece.reshape(-1).view(np.uint8).data)
                used = None if scales is None else scales[start : start + len(piece)]
                yield piece if used is None else stored_to_float32(piece, used, part.shape[1])
                start += len(piece)
            if scales is not None:
                digest.update(scales.reshape(-1).view(np.uint8).data)

        outputs = answers_of(rows, *map(read, parts))
        if digest.hexdigest() != finished.entry.sha256:
            return None
        return ExpertFile(finished.entry, spans, outputs, finished.losses)

    def _key(self, block: int, expert: int) -> str:
        how = f"{self._precision} clamped" if self._clamp else self._precision
        return f"{self._checkpoint.stamp} {how} {block} {expert}"


def answers_of(
    rows: FloatArray,
    gate: Iterator[npt.NDArray[Any]],
    up: Iterator[npt.NDArray[Any]],
    down: Iterator[npt.NDArray[Any]],
) -> FloatArray:
    """Run an expert in float32 on rows, its weights coming by in this order, whole rows at a time."""
    gated = _silu(_project(rows, gate))
    return _project(gated * _project(rows, up), down)


def _silu(rows: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):  # exp(-x) of a very negative x is infinite, and silu(x) is then 0 as it should
        scaled: FloatArray = rows / (1 + np.exp(-rows))
    return scaled


def _answers_of_two(
    rows: FloatArray,
    gate: Iterator[tuple[FloatArray, FloatArray]],
    up: Iterator[tuple[FloatArray, FloatArray]],
    down: Iterator[tuple[FloatArray, FloatArray]],
) -> tuple[FloatArray, FloatArray]:
    """Run an expert and another of its shape side by side, the weights of both coming by together."""
    gated, gated_too = _project_two(rows, rows, gate)
    inner, inner_too = _project_two(rows, rows, up)
    return _project_two(_silu(gated) * inner, _silu(gated_too) * inner_too, down)


def _project_two(
    rows: FloatArray, rows_too: FloatArray, pieces: Iterator[tuple[FloatArray, FloatArray]]
) -> tuple[FloatArray, FloatArray]:
    columns, columns_too = zip(*((_times(rows, one), _times(rows_too, other)) for one, other in pieces), strict=True)
    return np.concatenate(columns, axis=1), np.concatenate(columns_too, axis=1)


def _project(rows: FloatArray, pieces: Iterator[npt.NDArray[Any]]) -> FloatArray:
    return np.concatenate([_times(rows, weights) for weights in map(_as_float32, pieces)], axis=1)


def _times(rows: FloatArray, weights: FloatArray) -> FloatArray:
    """Multiply rows [n, in] by a few rows of weights [m, in]: [n, m]."""
    # NOTE: a row at a time, though it looks wasteful: a product this small of two matrices is dealt out to all cores
    # by BLAS, and took 100 times as long as this wherever one of them was busy.
    return np.stack([weights @ row for row in rows])


def _as_float32(piece: npt.NDArray[Any]) -> FloatArray:
    return float32_from_float16(piece) if piece.dtype == np.float16 else piece
