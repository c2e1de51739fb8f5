"""What a carving has finished: kept in its unfinished folder, so that an interrupted one goes on block by block."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, final

import numpy as np
import numpy.typing as npt

from wdmoe.export.tensor_writer import TensorWriter
from wdmoe.runtime.errors import CheckpointError
from wdmoe.runtime.manifest import FileEntry, sha256_of
from wdmoe.runtime.tensor_file import map_tensors

RECORD_NAME = "carving.json"
END_TO_END = "end-to-end"  # of --distil
_VERSION = 1

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BlockReport:
    """A finished block: its file, and how far the carved block is from the dense one on held-out rows."""

    sha256: str
    size_bytes: int
    error_cut: float  # as cut; relative, see distilling.relative_error
    error: float  # as written: the same without distillation


@final
class CarveState:
    """Opened by one process at a time. The record becomes a part of the finished folder.

    A block counts as finished once its file and the hidden states that the next block sees are on the disk.
    """

    blocks: list[BlockReport]

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        """Open the folder of an unfinished carving; one by another recipe begins again.

        Args:
            folder: is made if it is not there.
            recipe: all that decides what will be written, as JSON.

        Raises:
            CheckpointError: another process is writing there.
        """
        folder.mkdir(exist_ok=True)
        self._folder, self._recipe = folder, dict(recipe)
        self._lock = lock_folder(folder)
        self.blocks, self._hidden = self._read()
        self._clear()

    def __enter__(self) -> CarveState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def hidden(self) -> FloatArray | None:
        """Read the hidden states that the next block sees; None before the first block."""
        if not self.blocks or not self._hidden:
            return None
        return np.array(map_tensors(self._folder / _hidden_name(len(self.blocks)))["hidden"])

    def add(self, report: BlockReport, hidden: FloatArray) -> None:
        """Write down that the next block is finished.

        Args:
            report: of the block, whose file is on the disk.
            hidden: what the block after it sees.
        """
        path = self._folder / _hidden_name(len(self.blocks) + 1)
        with TensorWriter(path, {"hidden": ("F32", hidden.shape)}) as writer:
            writer.write(hidden)
            self._hidden = writer.finish()
            writer.rename(path)
        self.blocks.append(report)
        self._write()
        (self._folder / _hidden_name(len(self.blocks) - 1)).unlink(missing_ok=True)

    def close_record(self) -> None:
        """Leave what a finished folder keeps: the record without hidden states."""
        self._hidden = None
        self._write()
        (self._folder / _hidden_name(len(self.blocks))).unlink(missing_ok=True)

    def _write(self) -> None:
        hidden = self._hidden
        record = {
            "version": _VERSION,
            "recipe": self._recipe,
            "blocks": [asdict(block) for block in self.blocks],
            "hidden": hidden and {"sha256": hidden.sha256, "size_bytes": hidden.size_bytes},
        }
        write_durably(self._folder / RECORD_NAME, json.dumps(record, indent=1).encode())

    def _read(self) -> tuple[list[BlockReport], FileEntry | None]:
        """Find how many blocks are finished: their files must still be what the record says."""
        record = read_record(self._folder)
        if record is None or record.get("version") != _VERSION or record.get("recipe") != self._recipe:
            return [], None
        try:
            blocks = [BlockReport(**block) for block in record["blocks"]]
            hidden = FileEntry(**record["hidden"]) if record["hidden"] else None
        except (KeyError, TypeError):
            return [], None
        n_blocks = int(self._recipe["blocks"])
        for number, block in enumerate(blocks):
            if not _is_whole(self._folder / shard_name(number, n_blocks), FileEntry(block.sha256, block.size_bytes)):
                return [], None
        if hidden is None:
            return (blocks, None) if len(blocks) == n_blocks else ([], None)
        return (blocks, hidden) if _is_whole(self._folder / _hidden_name(len(blocks)), hidden) else ([], None)

    def _clear(self) -> None:
        """Remove what is not finished."""
        n_blocks = int(self._recipe["blocks"])
        known = {shard_name(number, n_blocks) for number in range(len(self.blocks))} | {RECORD_NAME}
        if self._hidden is not None:
            known.add(_hidden_name(len(self.blocks)))
        for pattern in ("*.partial", "*.safetensors"):
            for path in self._folder.glob(pattern):
                if path.name not in known:
                    path.unlink()


def shard_name(number: int, n_blocks: int) -> str:
    """Name the file of a block, from 0; the one after the last block holds what is outside of the blocks."""
    return f"model-{number + 1:05d}-of-{n_blocks + 1:05d}.safetensors"


def lock_folder(folder: Path) -> int:
    """Take a folder for this process alone, until the handle that is returned is closed.

    Raises:
        CheckpointError: another process has it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise CheckpointError(
            f"{folder}: another carving is writing there; wait for it or choose another --out"
        ) from error
    return handle


def check_unfinished(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Refuse to throw an unfinished training away: hours may be in it.

    Args:
        folder: of an unfinished carving, if there is one.
        recipe: of the carving that is asked for.

    Raises:
        CheckpointError: names what differs.
    """
    record = read_record(folder)
    before = record.get("recipe") if record else None
    if not isinstance(before, dict) or before.get("distil") != END_TO_END:
        return
    differs = sorted(name for name in {*before, *recipe} - {"made_by"} if before.get(name) != recipe.get(name))
    if differs:
        name = differs[0]
        raise CheckpointError(
            f"{folder}: holds an unfinished training of another carving ({name} {before.get(name)}, asked for "
            f"{recipe.get(name)}); give the command as it was to go on, choose another --out, or remove the folder"
        )


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read the record of a carving, finished or not; None if there is none that can be read."""
    try:
        record = json.loads((folder / RECORD_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file in one step, to the disk."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _hidden_name(block: int) -> str:
    return f"hidden-{block:05d}.safetensors"


def _is_whole(path: Path, entry: FileEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.size_bytes and sha256_of(path) == entry.sha256
