"""Writes a safetensors file front to back, a piece at a time, and hashes it on the way."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, final

import numpy as np
import numpy.typing as npt

from wdmoe.runtime.manifest import FileEntry
from wdmoe.runtime.tensor_file import TensorSpan, encode_header, total_bytes

PARTIAL_SUFFIX = ".partial"


@final
class TensorWriter:
    """A safetensors file being written under a temporary name.

    Leaving the `with` block without an error needs `finish` to have been called; with an error, the temporary
    file stays behind and the next export removes it.
    """

    spans: dict[str, TensorSpan]

    def __init__(self, path: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """Lay out the file: name -> (safetensors dtype, shape), in the order in which they will be written."""
        header, self.spans = encode_header(layout)
        self._temporary = path.with_name(path.name + PARTIAL_SUFFIX)
        self._left_bytes = total_bytes(self.spans.values())
        self._size_bytes = len(header) + self._left_bytes
        self._digest = hashlib.sha256(header)
        self._file = self._temporary.open("wb")
        self._file.write(header)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, piece: npt.NDArray[Any]) -> None:
        """Append the next elements of the tensors."""
        data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
        self._digest.update(data)
        self._file.write(data)
        self._left_bytes -= data.nbytes

    def finish(self) -> FileEntry:
        """Bring the file to the disk, still under its temporary name."""
        if self._left_bytes:
            raise ValueError(f"{self._temporary}: {self._left_bytes} bytes of its tensors were not written")
        self._file.flush()
        os.fsync(self._file.fileno())
        return FileEntry(self._digest.hexdigest(), self._size_bytes)

    def rename(self, path: Path) -> None:
        """Give the finished file its name."""
        self._temporary.replace(path)
