"""What an end-to-end training has finished: kept in its unfinished folder, so that an interrupted one goes on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, final

import numpy as np
import torch

from wdmoe.export.carve_state import RECORD_NAME, check_unfinished, lock_folder, read_record, write_durably
from wdmoe.export.tensor_writer import TensorWriter
from wdmoe.runtime.errors import CheckpointError
from wdmoe.runtime.manifest import FileEntry, sha256_of
from wdmoe.runtime.tensor_file import map_tensors

SAVE_EVERY_STEPS = 10
SAVE_EVERY_S = 60.0
_VERSION = 1


@final
class TrainingState:
    """Opened by one process at a time. The record becomes a part of the finished folder.

    A state counts once its file is on the disk and the record, which is replaced in one step, names it. The last record
    says that all is finished: after it nothing is left to do but to give the folder its name.
    """

    def __init__(
        self, folder: Path, recipe: Mapping[str, Any], last_step: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Open the folder of an unfinished training.

        Args:
            folder: is made if it is not there.
            recipe: all that decides what will be written, as JSON.
            last_step: which is kept, whenever the one before was.
            clock: seconds; after a minute without, the next step is kept.

        Raises:
            CheckpointError: another process is writing there, or it holds a training by another recipe.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._recipe, self._last_step, self._clock = folder, dict(recipe), last_step, clock
        self._lock = lock_folder(folder)
        try:
            check_unfinished(folder, recipe)
            self.finished, self._step, self._entry, self.figures = self._read()
        except BaseException:
            os.close(self._lock)
            raise
        self._clear()
        self._kept_at_s = clock()

    def __enter__(self) -> TrainingState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    @property
    def step(self) -> int | None:
        """Finished steps that are kept; None before the model is planned and fitted."""
        return self._step if self._entry is not None else None

    def load(self) -> tuple[int, dict[str, torch.Tensor]]:
        """Return the number of finished steps and the tensors kept then."""
        if self._entry is None:
            return 0, {}
        found = map_tensors(self.folder / _state_name(self._step))
        return self._step, {name: torch.from_numpy(np.array(values)) for name, values in found.items()}

    def keep(self, step: int, tensors: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Keep the state after so many steps, if it is time."""
        due = step % SAVE_EVERY_STEPS == 0 or step == self._last_step
        if due or self._clock() - self._kept_at_s >= SAVE_EVERY_S:
            self.write(step, tensors())

    def write(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep the state after so many steps."""
        path = self.folder / _state_name(step)
        with TensorWriter(path, {name: ("F32", tuple(values.shape)) for name, values in tensors.items()}) as writer:
            for values in tensors.values():
                writer.write(values.float().numpy())
            self._entry = writer.finish()
            writer.rename(path)
        before, self._step = self._step, step
        self._write_record()
        if before != step:
            (self.folder / _state_name(before)).unlink(missing_ok=True)
        self._kept_at_s = self._clock()

    def note(self, name: str, value: float) -> None:
        """Write down a figure that the record keeps."""
        self.figures[name] = value
        self._write_record()

    def close_record(self) -> None:
        """Leave what a finished folder keeps: the record without the state."""
        path = self.folder / _state_name(self._step)
        self.finished, self._entry = True, None
        self._write_record()
        path.unlink(missing_ok=True)

    def _write_record(self) -> None:
        entry = self._entry
        record = {
            "version": _VERSION,
            "recipe": self._recipe,
            "blocks": [],
            "figures": self.figures,
            "step": self._step,
            "finished": self.finished,
            "state": entry and {"sha256": entry.sha256, "size_bytes": entry.size_bytes},
        }
        write_durably(self.folder / RECORD_NAME, json.dumps(record, indent=1).encode())

    def _read(self) -> tuple[bool, int, FileEntry | None, dict[str, float]]:
        """Find the state that is kept."""
        nothing: tuple[bool, int, None, dict[str, float]] = (False, 0, None, {})
        record = read_record(self.folder)
        if record is None or record.get("version") != _VERSION:
            return nothing
        if _without_maker(record.get("recipe")) != _without_maker(self._recipe):
            return nothing
        try:
            step, figures, finished = int(record["step"]), dict(record["figures"]), bool(record["finished"])
            entry = FileEntry(**record["state"]) if record["state"] else None
        except (KeyError, TypeError, ValueError):
            return nothing
        if entry is None:
            return (True, step, None, figures) if finished else nothing
        path = self.folder / _state_name(step)
        if not path.is_file() or path.stat().st_size != entry.size_bytes or sha256_of(path) != entry.sha256:
            raise CheckpointError(f"{path}: missing or damaged, the training cannot go on; remove {self.folder}")
        return False, step, entry, figures

    def _clear(self) -> None:
        """Remove what is not finished."""
        known = {_state_name(self._step)} if self._entry is not None else set()
        if self.finished:
            known |= {path.name for path in self.folder.glob("model-*.safetensors")}
        for pattern in ("*.partial", "*.safetensors", "*.bin"):
            for path in self.folder.glob(pattern):
                if path.name not in known:
                    path.unlink()


def _without_maker(recipe: object) -> object:
    return {name: value for name, value in recipe.items() if name != "made_by"} if isinstance(recipe, dict) else None


def _state_name(step: int) -> str:
    return f"state-{step:06d}.safetensors"
