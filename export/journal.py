"""The journal of an unfinished bundle: which of its large files are finished, and the lock on it.

The journal knows of a file just before it gets its final name, so that none that has it is written again. One found
again after an interruption is used only if its content has the hash written here.
"""

from __future__ import annotations

import fcntl
import json
import threading
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import TextIO, final

from wdmoe.export.conversion import Losses
from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.manifest import FileEntry

JOURNAL_NAME = "done.jsonl"


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished file, and what its weights lost."""

    entry: FileEntry
    losses: Losses = field(default_factory=Losses)


@final
class Journal:
    """Opened by one process at a time; its threads share it."""

    def __init__(self, folder: Path) -> None:
        """Open the journal of a folder that is being written, for this process alone.

        Raises:
            BundleError: another process is writing there.
        """
        self._path = folder / JOURNAL_NAME
        self._guard = threading.Lock()
        self._file: TextIO = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise BundleError(
                f"{folder}: another wdmoe-export is writing there; wait for it or choose another --out"
            ) from error
        self._done = self._read()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def find(self, key: str) -> Finished | None:
        """Say what is known of a file; None if it is not finished."""
        with self._guard:
            return self._done.get(key)

    def add(self, key: str, finished: Finished) -> None:
        """Write down that a file is finished.

        NOTE: not brought to the disk: a line that a power cut takes away costs writing its file again.
        """
        entry = finished.entry
        line = {"key": key, "sha256": entry.sha256, "size_bytes": entry.size_bytes, **asdict(finished.losses)}
        with self._guard:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            self._done[key] = finished

    def _read(self) -> dict[str, Finished]:
        self._file.seek(0)
        done: dict[str, Finished] = {}
        text = "\n"
        for text in self._file:
            try:
                line = json.loads(text)
                losses = Losses(**{one.name: line[one.name] for one in fields(Losses)})
                done[line["key"]] = Finished(FileEntry(line["sha256"], line["size_bytes"]), losses)
            except (ValueError, KeyError, TypeError):
                continue  # the line that an interruption cut short
        if not text.endswith("\n"):
            self._file.write("\n")  # what comes next shall not be appended to it
        return done
