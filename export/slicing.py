"""Writes the experts of a checkpoint, one file each, named by the hash of its content.

What each expert answers to a few fixed rows is computed from the same bytes on their way to the disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, final

import numpy as np
import numpy.typing as npt

from wdmoe.export.checkpoint import Checkpoint, TensorName, read_pieces
from wdmoe.export.conversion import to_float16, to_float32
from wdmoe.export.families import ExpertNames
from wdmoe.export.tensor_writer import PARTIAL_SUFFIX, TensorWriter
from wdmoe.export.weights import Part, expert_parts
from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.manifest import FileEntry, Precision
from wdmoe.runtime.tensor_file import TensorSpan, read_spans

FloatArray = npt.NDArray[np.float32]
OnBytes = Callable[[int], None]

GOLDEN_ROWS = 4
_GOLDEN_SEED = 20240722
_DTYPES: dict[Precision, str] = {"fp32": "F32", "fp16": "F16"}
_RECORD_NAME = "done.jsonl"


@dataclass(frozen=True, slots=True)
class ExpertFile:
    """One expert as written."""

    entry: FileEntry
    spans: dict[str, TensorSpan]
    outputs: FloatArray  # [GOLDEN_ROWS, d_model], its answers to the golden rows of its block

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
    """The folder of expert files of one export, and the record of those already finished.

    A finished expert is on the disk, under its final name, before the record says so. A file found again after an
    interruption is used only if its content still has the hash recorded.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint, precision: Precision) -> None:
        """Open the folder for this process alone; remove what an interrupted export left half written.

        Raises:
            BundleError: another process is writing there.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._checkpoint, self._precision = folder, checkpoint, precision
        self._record: TextIO = (folder / _RECORD_NAME).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._record.close()
            raise BundleError(
                f"{folder}: another wdmoe-export is writing there; wait for it or choose another --out"
            ) from error
        for stale in folder.glob(f"*{PARTIAL_SUFFIX}"):
            stale.unlink()
        self._done = self._read_record()

    def __enter__(self) -> ExpertStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._record.close()

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
        dtype = _DTYPES[self._precision]
        temporary = self._folder / f"block_{block:02d}_expert_{expert:02d}"
        with TensorWriter(temporary, {part.name: (dtype, part.shape) for part in parts}) as writer:

            def written(part: Part) -> Iterator[npt.NDArray[Any]]:
                for name, _ in part.sources:
                    for piece in self._stored(name, on_bytes):
                        writer.write(piece)
                        yield piece

            outputs = _answers(rows, *map(written, parts))
            entry = writer.finish()
            writer.rename(self._folder / expert_file_name(entry.sha256))
        line = {"key": self._key(block, expert), "sha256": entry.sha256, "size_bytes": entry.size_bytes}
        self._record.write(json.dumps(line) + "\n")
        self._record.flush()
        return ExpertFile(entry, writer.spans, outputs)

    def seal(self, used: frozenset[str]) -> None:
        """Remove the record and every file that this export does not use."""
        for path in self._folder.iterdir():
            if path.name not in used:
                path.unlink()

    def _stored(self, name: TensorName, on_bytes: OnBytes) -> Iterator[npt.NDArray[Any]]:
        """Read a tensor of the checkpoint in the precision of the bundle."""
        dtype = self._checkpoint.span(name).dtype
        for piece in self._checkpoint.pieces(name):
            yield to_float16(piece, dtype, name) if self._precision == "fp16" else to_float32(piece, dtype)
            on_bytes(piece.nbytes)

    def _find(self, block: int, expert: int, parts: tuple[Part, ...], rows: FloatArray) -> ExpertFile | None:
        entry = self._done.get(self._key(block, expert))
        if entry is None:
            return None
        path = self._folder / expert_file_name(entry.sha256)
        if not path.is_file() or path.stat().st_size != entry.size_bytes:
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
        return ExpertFile(entry, spans, outputs) if digest.hexdigest() == entry.sha256 else None

    def _key(self, block: int, expert: int) -> str:
        return f"{self._checkpoint.stamp} {self._precision} {block} {expert}"

    def _read_record(self) -> dict[str, FileEntry]:
        self._record.seek(0)
        done: dict[str, FileEntry] = {}
        for text in self._record:
            try:
                line = json.loads(text)
                done[line["key"]] = FileEntry(line["sha256"], line["size_bytes"])
            except (ValueError, KeyError, TypeError):
                continue  # the line that an interruption cut short
        return done


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
    return piece.astype(np.float32, copy=False)
