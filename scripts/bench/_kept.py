"""What a long benchmark has done, so that the same command goes on from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.bench._environment import progress


class Kept:
    """Parts of a result that are done, by name, in FILE.unfinished beside it.

    Args:
        target: the result's file; None or -: nothing is kept.
        key: of what is measured; parts of anything else are not used again.
    """

    def __init__(self, target: str | None, key: str) -> None:
        self._path = None if target in (None, "-") else Path(f"{target}.unfinished")
        self._key = key
        self.parts: dict[str, Any] = {}
        if self._path is not None and self._path.exists():
            kept = json.loads(self._path.read_text())
            if kept["key"] == key:
                self.parts = kept["parts"]
            else:
                progress(f"{self._path}: of another run; nothing of it is used again")

    def add(self, name: str, part: Any) -> None:
        """Keep one more."""
        self.parts[name] = part
        if self._path is not None:
            partial = self._path.with_name(self._path.name + ".partial")
            partial.write_text(json.dumps({"key": self._key, "parts": self.parts}))
            partial.replace(self._path)

    def remove(self) -> None:
        """Forget all, as the result is written."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
