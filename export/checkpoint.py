"""A Hugging Face checkpoint folder, read through its safetensors headers: a tensor is read only when it is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.export.conversion import FLOAT_DTYPES
from wdmoe.export.tensor_writer import forget
from wdmoe.runtime.errors import BundleError, CheckpointError
from wdmoe.runtime.tensor_file import TensorSpan, map_tensor, read_spans

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_SAMPLE_BYTES = 4096
_READ_AS: dict[str, npt.DTypeLike] = {
    "BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F64": np.float64, "U8": np.uint8,
}  # fmt: skip
# Small enough to stay in the cache from reading over conversion to hashing. Counted in elements, so that a product
# with the pieces comes out the same, to the last bit, in whatever precision they are stored.
_PIECE_ELEMENTS = 1 << 18
# Bytes read, after which the kernel may drop them: a checkpoint larger than memory pushes nothing else out of it.
_WINDOW_BYTES = 1 << 25


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """Rows of one expert in a tensor that holds those of all experts: a contiguous range of its bytes."""

    tensor: str
    whole: tuple[int, int, int]  # shape that the tensor must have: [n_experts, rows, columns]
    expert: int
    first: int  # rows first .. last - 1
    last: int

    def __str__(self) -> str:
        return f"{self.tensor}[{self.expert}, {self.first}:{self.last}]"

    def within(self, span: TensorSpan) -> TensorSpan:
        """Find the rows in the span of the whole tensor."""
        n_experts, rows, columns = self.whole
        row_bytes = span.size_bytes // (n_experts * rows)
        offset_bytes = span.offset_bytes + (self.expert * rows + self.first) * row_bytes
        count = self.last - self.first
        return TensorSpan(span.dtype, (count, columns), offset_bytes, count * row_bytes)


TensorName = str | ExpertRows


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its config and where each tensor lies."""

    folder: Path
    config: dict[str, Any]
    shards: tuple[Path, ...]  # in name order
    _where: dict[str, tuple[Path, TensorSpan]] = field(repr=False)

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._where)

    @property
    def model_type(self) -> str:
        """The family's name in config.json."""
        return str(self.config.get("model_type"))

    def span(self, name: TensorName) -> TensorSpan:
        """Say where a tensor, or one expert's rows of it, lies, its type and shape.

        Raises:
            CheckpointError: the checkpoint does not have it, or not in the shape that the rows are part of.
        """
        return self._find(name)[1]

    def tensor(self, name: TensorName) -> npt.NDArray[Any]:
        """Map a tensor read-only; BF16 comes as uint16."""
        return map_tensor(*self._find(name))

    def pieces(self, name: TensorName) -> Iterator[npt.NDArray[Any]]:
        """Read a tensor front to back, whole rows at a time, about a MiB each; BF16 comes as uint16.

        NOTE: read, not mapped: mapped pages would count as memory of this process.
        """
        path, span = self._find(name)
        return read_pieces(path, span)

    @cached_property
    def source_sha256(self) -> str:
        """Name of the checkpoint, as docs/bundle-format.md says: config, headers and a sample of every tensor."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for shard in self.shards:
            spans = sorted((span for path, span in self._where.values() if path == shard), key=_offset)
            data_start = spans[0].offset_bytes if spans else shard.stat().st_size
            digest.update(shard.name.encode())
            with shard.open("rb") as file:
                digest.update(file.read(data_start))
                for span in spans:
                    file.seek(span.offset_bytes)
                    digest.update(file.read(min(_SAMPLE_BYTES, span.size_bytes)))
        return digest.hexdigest()

    @cached_property
    def stamp(self) -> str:
        """Like `source_sha256`, and size and time of every shard: any later change of the files shows."""
        digest = hashlib.sha256(self.source_sha256.encode())
        for shard in self.shards:
            status = shard.stat()
            digest.update(f"{shard.name} {status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()

    def json(self, name: str) -> dict[str, Any] | None:
        """Read one of the smaller files beside the weights; None where the checkpoint has none."""
        path = self.folder / name
        return _read_json(path) if path.is_file() else None

    def _find(self, name: TensorName) -> tuple[Path, TensorSpan]:
        if isinstance(name, ExpertRows):
            path, span = self._find(name.tensor)
            if span.shape != name.whole:
                raise wrong_shape(self.folder, name.tensor, span.shape, name.whole)
            return path, name.within(span)
        try:
            return self._where[name]
        except KeyError:
            raise CheckpointError(
                f"{self.folder}: tensor {name} is missing from its {len(self.shards)} safetensors files; "
                "the checkpoint is incomplete, download it again"
            ) from None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder; reads config.json and the headers of all shards.

    Raises:
        CheckpointError: names the file and the remedy.
    """
    config = read_config(folder)
    shards = _shard_paths(folder)
    where: dict[str, tuple[Path, TensorSpan]] = {}
    for shard in shards:
        where.update((name, (shard, span)) for name, span in _spans(shard).items())
    return Checkpoint(folder, config, shards, where)


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a checkpoint; its weights need not be there.

    Raises:
        CheckpointError: it is missing, damaged, or of a quantised model.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: not a folder; expected a Hugging Face checkpoint (config.json, *.safetensors)"
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder / 'config.json'}: missing; expected the folder of a Hugging Face checkpoint")
    config = _read_json(folder / "config.json")
    if method := config.get("quantization_config"):
        kind = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise CheckpointError(
            f"{folder / 'config.json'}: the checkpoint is quantised ({kind}); "
            "give the original one with float weights, wdmoe-export quantises by itself"
        )
    return config


def read_pieces(path: Path, span: TensorSpan, row_elements: int | None = None) -> Iterator[npt.NDArray[Any]]:
    """Read one tensor of a safetensors file front to back, whole rows at a time.

    Args:
        path: of the file.
        span: of the tensor.
        row_elements: weights of a row, where bytes hold them in another number.
    """
    dtype = np.dtype(_READ_AS[span.dtype])
    row_shape = span.shape[1:]
    rows_left = span.shape[0]
    row_elements = int(np.prod(row_shape, dtype=np.int64)) if row_elements is None else row_elements
    at_once = max(1, _PIECE_ELEMENTS // max(1, row_elements))
    with path.open("rb") as file:
        behind_bytes = file.seek(span.offset_bytes)
        while rows_left:
            piece = np.empty((min(at_once, rows_left), *row_shape), dtype)
            if file.readinto(piece.reshape(-1).view(np.uint8).data) != piece.nbytes:
                raise CheckpointError(f"{path}: became shorter while it was read")
            yield piece
            rows_left -= len(piece)
            if file.tell() - behind_bytes >= _WINDOW_BYTES:
                behind_bytes = forget(file.fileno(), behind_bytes, file.tell())


def _offset(span: TensorSpan) -> int:
    return span.offset_bytes


def _shard_paths(folder: Path) -> tuple[Path, ...]:
    if (folder / INDEX_NAME).is_file():
        return _indexed_shards(folder)
    if (folder / SINGLE_NAME).is_file():
        return (folder / SINGLE_NAME,)
    if stray := sorted(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder / INDEX_NAME}: missing, but {stray[0].name} is there; download the index too")
    if pickles := sorted(path for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES):
        raise CheckpointError(
            f"{pickles[0]}: a pickle runs what it holds, so it is not read; convert it once with transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER, safe_serialization=True)"
        )
    raise CheckpointError(f"{folder}: no {SINGLE_NAME} and no {INDEX_NAME}; the checkpoint has no weights")


def _indexed_shards(folder: Path) -> tuple[Path, ...]:
    path = folder / INDEX_NAME
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map; download it again")
    shards = sorted({str(name) for name in weight_map.values()})
    if outside := [name for name in shards if Path(name).name != name]:
        raise CheckpointError(f"{path}: names the shard {outside[0]!r}, which is not a file of this folder")
    if missing := [name for name in shards if not (folder / name).is_file()]:
        rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder / missing[0]}{rest}: missing, the index names it; download the shard again")
    return tuple(folder / name for name in shards)


def _spans(shard: Path) -> dict[str, TensorSpan]:
    try:
        return read_spans(shard)
    except BundleError as error:
        raise CheckpointError(f"{error}; download this file again") from error


def wrong_shape(folder: Path, tensor: TensorName, found: Sequence[int], expected: Sequence[int]) -> CheckpointError:
    """Say that a tensor is not what the config makes of it."""
    return CheckpointError(f"{folder}: tensor {tensor} has shape {list(found)}, config.json implies {list(expected)}")


def check_floats(checkpoint: Checkpoint, names: Sequence[str]) -> None:
    """Refuse tensors that are not plain floats (integer weights of a quantised checkpoint, for one)."""
    for name in names:
        if (dtype := checkpoint.span(name).dtype) not in FLOAT_DTYPES:
            raise CheckpointError(f"tensor {name}: type {dtype} is not supported; supported: {', '.join(FLOAT_DTYPES)}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
