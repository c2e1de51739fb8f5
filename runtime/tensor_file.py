"""Read and write safetensors files, with the byte range of every tensor.

The `safetensors` library hides the byte ranges, and a graph stub needs them: its initializers are ranges
of the file beside it. The format is documented at huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.runtime.errors import BundleError

_HEADER_LIMIT_BYTES = 100_000_000  # the library's own limit
_ALIGNMENT_BYTES = 64
# BF16 has no numpy type: it is handed out as its raw 16 bits.
_DTYPES: dict[str, npt.DTypeLike] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
    "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items() if name != "BF16"}


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """Where a tensor lies in its file."""

    dtype: str  # safetensors' name, for example "BF16"
    shape: tuple[int, ...]
    offset_bytes: int  # from the start of the file
    size_bytes: int


def read_spans(path: Path) -> dict[str, TensorSpan]:
    """Read the header of a safetensors file; the tensors themselves are not touched.

    Raises:
        BundleError: the header is damaged, or the file is shorter or longer than it says.
    """
    file_size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise BundleError(f"{path}: {file_size} bytes is too short for a safetensors file")
        (header_size,) = struct.unpack("<Q", prefix)
        if header_size > min(_HEADER_LIMIT_BYTES, file_size - 8):
            raise BundleError(f"{path}: header of {header_size} bytes in a file of {file_size}; not a safetensors file")
        raw = file.read(header_size)
    try:
        header = json.loads(raw)
        spans = {name: _span(info, 8 + header_size) for name, info in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path}: damaged safetensors header ({error})") from error
    _check_extents(path, spans, 8 + header_size, file_size)
    return spans


def map_tensor(path: Path, span: TensorSpan) -> npt.NDArray[Any]:
    """Map one tensor read-only; nothing is read until it is used. BF16 comes as uint16."""
    dtype = np.dtype(_DTYPES[span.dtype])
    if span.size_bytes == 0:
        return np.empty(span.shape, dtype)
    return np.memmap(path, dtype, mode="r", offset=span.offset_bytes, shape=span.shape)


def map_tensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Map every tensor of a file read-only."""
    return {name: map_tensor(path, span) for name, span in read_spans(path).items()}


def encode_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, TensorSpan]]:
    """Lay out a file: the bytes before the first tensor, and where each tensor goes.

    Args:
        tensors: name -> (safetensors dtype name, shape), in the order they will be written.
    """
    entries: dict[str, dict[str, Any]] = {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(_DTYPES[dtype]).itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT_BYTES)
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: _span(entry, start) for name, entry in entries.items()}


def write_tensors(path: Path, tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, TensorSpan]:
    """Write a safetensors file under a temporary name, then rename it. Widest types first keeps all aligned."""
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header, spans = encode_header({name: (_NAMES[a.dtype], a.shape) for name, a in ordered.items()})
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(header)
        for array in ordered.values():
            file.write(np.ascontiguousarray(array).data)
    partial.replace(path)
    return spans


def _span(info: Mapping[str, Any], data_start: int) -> TensorSpan:
    begin, end = info["data_offsets"]
    shape = tuple(int(size) for size in info["shape"])
    itemsize = np.dtype(_DTYPES[info["dtype"]]).itemsize
    if min(shape, default=0) < 0 or begin < 0 or end - begin != int(np.prod(shape, dtype=object)) * itemsize:
        raise ValueError(f"shape {shape} of {info['dtype']} does not fill bytes {begin} to {end}")
    return TensorSpan(info["dtype"], shape, data_start + begin, end - begin)


def _check_extents(path: Path, spans: Mapping[str, TensorSpan], start: int, file_size: int) -> None:
    end = start
    for name, span in sorted(spans.items(), key=lambda item: item[1].offset_bytes):
        if span.offset_bytes != end:
            raise BundleError(f"{path}: tensor {name} begins at byte {span.offset_bytes}, expected {end}")
        end += span.size_bytes
    if end != file_size:
        raise BundleError(f"{path}: {file_size} bytes, the header says {end}; the file is incomplete")


def total_bytes(spans: Iterable[TensorSpan]) -> int:
    """Sum of the tensors' sizes."""
    return sum(span.size_bytes for span in spans)
