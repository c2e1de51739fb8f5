"""Which engines answered wrong on this device: remembered beside what they keep, in `engines/verdicts.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from wdmoe.runtime.manifest import DeviceManifest

FOLDER, FILE_NAME = "engines", "verdicts.json"
_MOST = 100  # kept; older ones are of libraries long replaced


class Verdicts:
    """The failed self-checks of one slice, by what they hold for: the engine with its library and machine, and the slice."""

    def __init__(self, folder: Path, manifest: DeviceManifest, say: Callable[[str], None]) -> None:
        """Read what is remembered; a damaged file is nothing remembered.

        Args:
            folder: of the slice.
            manifest: of the slice.
            say: told what could not be read or kept.
        """
        self._path, self._slice, self._say = folder / FOLDER / FILE_NAME, manifest.manifest_sha256, say
        self._failed: dict[str, str] = {}
        try:
            read = json.loads(self._path.read_bytes())
            self._failed = {str(key): str(reason) for key, reason in read["failed"].items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            say(f"{self._path}: cannot be read ({error}); every engine is tried")

    def of(self, identity: str) -> str | None:
        """Return how an engine failed before; None if it did not."""
        return self._failed.get(self._key(identity))

    def remember(self, identity: str, reason: str) -> None:
        """Keep that an engine failed."""
        self._failed[self._key(identity)] = reason
        self._write()

    def forget(self, identity: str) -> None:
        """Let an engine be tried again."""
        if self._failed.pop(self._key(identity), None) is not None:
            self._write()

    def _key(self, identity: str) -> str:
        digest = hashlib.sha256(f"{identity}\n{self._slice}".encode()).hexdigest()
        return f"{identity.partition(' ')[0]} {digest}"

    def _write(self) -> None:
        kept = dict(list(self._failed.items())[-_MOST:])
        partial = self._path.with_name(FILE_NAME + ".partial")
        try:
            self._path.parent.mkdir(exist_ok=True)
            partial.write_text(json.dumps({"failed": kept}, indent=1) + "\n")
            partial.replace(self._path)
        except OSError as error:
            self._say(f"{self._path}: cannot be written ({error.strerror}); what failed is not remembered")
