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
# Bytes after which the kernel is told to write: the disk works from the start, and `finish` waits for a window only.
_WINDOW_BYTES = 1 << 25


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
        self._behind_bytes = 0  # written bytes that the kernel was told to bring to the disk and to drop from memory

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
        if self._file.tell() - self._behind_bytes >= _WINDOW_BYTES:
            self._file.flush()
            self._behind_bytes = forget(self._file.fileno(), self._behind_bytes, self._file.tell())

    def finish(self) -> FileEntry:
        """Bring the file to the disk, still under its temporary name: what has its name is whole, whatever fails."""
        if self._left_bytes:
            raise ValueError(f"{self._temporary}: {self._left_bytes} bytes of its tensors were not written")
        self._file.flush()
        os.fsync(self._file.fileno())
        return FileEntry(self._digest.hexdigest(), self._size_bytes)

    def rename(self, path: Path) -> None:
        """Give the finished file its name."""
        self._temporary.replace(path)


def forget(file: int, start_bytes: int, end_bytes: int) -> int:
    """Tell the kernel that a range of a file will not be needed soon: what is not on the disk yet is sent there.

    Returns:
        The end of the range.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start_bytes, end_bytes - start_bytes, os.POSIX_FADV_DONTNEED)
    return end_bytes
