"""Writes the folder of a carved checkpoint: a safetensors file for each block, one for the rest, and the small files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wdmoe.export.calibration_text import TOKENIZER_NAME
from wdmoe.export.carve import BlockPlan, FfnWeights, FloatArray, carve_block
from wdmoe.export.carve_state import shard_name, write_durably
from wdmoe.export.checkpoint import INDEX_NAME
from wdmoe.export.conversion import Array, to_float32
from wdmoe.export.dense import DenseModel, ffn_names
from wdmoe.export.tensor_writer import TensorWriter
from wdmoe.runtime.errors import CheckpointError
from wdmoe.runtime.half import float16_from_float32
from wdmoe.runtime.manifest import FileEntry
from wdmoe.runtime.tensor_file import encode_header, read_spans, total_bytes

_SMALL_FILES = (
    TOKENIZER_NAME, "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_FLOAT16_LIMIT = 65520.0  # rounds to infinity

_NOTHING: Mapping[str, FloatArray] = {}

Layout = dict[str, tuple[str, tuple[int, ...]]]  # name -> safetensors dtype, shape


def as_stored(model: DenseModel, block: int, values: FloatArray) -> FloatArray:
    """Round weights to what the carved block's file will hold of them."""
    dtype = _stored_dtype(model, block)
    return to_float32(_encoded(values, dtype, f"router of block {block}"), dtype)


def write_block(
    folder: Path,
    model: DenseModel,
    block: int,
    weights: FfnWeights,
    plan: BlockPlan,
    replaced: Mapping[str, FloatArray] = _NOTHING,
) -> FileEntry:
    """Write the file of a block: what is not feed-forward byte for byte, the rest in the feed-forward's own precision.

    Args:
        folder: of the new checkpoint.
        model: the dense model.
        block: its number.
        weights: of its feed-forward.
        plan: how that is carved.
        replaced: values of dense tensors that were trained; written in the precision of the dense ones.

    Raises:
        CheckpointError: a weight does not fit into float16 once it is multiplied as the carved block needs it.
    """
    path, dtype = folder / shard_name(block, model.layout.spec.n_blocks), _stored_dtype(model, block)
    carved = {_below(block, name): values for name, values in carve_block(weights, plan, model.shape).items()}
    layout = _layout(model, model.copied[block], replaced)
    layout |= {name: (dtype, values.shape) for name, values in carved.items()}
    with TensorWriter(path, _widest_first(layout)) as writer:
        for name in writer.spans:
            if name in carved:
                writer.write(_encoded(carved.pop(name), dtype, name))
            else:
                _copy(writer, model, name, replaced)
        entry = writer.finish()
        writer.rename(path)
    return entry


def write_rest(folder: Path, model: DenseModel, replaced: Mapping[str, FloatArray] = _NOTHING) -> None:
    """Write all but the blocks: embedding, final norm, head, index, config, tokenizer, licence."""
    n_blocks = model.layout.spec.n_blocks
    path = folder / shard_name(n_blocks, n_blocks)
    with TensorWriter(path, _widest_first(_layout(model, model.copied[-1], replaced))) as writer:
        for name in writer.spans:
            _copy(writer, model, name, replaced)
        writer.finish()
        writer.rename(path)
    where: dict[str, str] = {}
    size_bytes = 0
    for number in range(n_blocks + 1):
        shard = shard_name(number, n_blocks)
        spans = read_spans(folder / shard)
        where |= dict.fromkeys(spans, shard)
        size_bytes += total_bytes(spans.values())
    _write_json(folder / INDEX_NAME, {"metadata": {"total_size": size_bytes}, "weight_map": where})
    _write_json(folder / "config.json", model.config)
    source = model.checkpoint.folder
    small = [source / name for name in _SMALL_FILES] + [path for pattern in _LICENCES for path in source.glob(pattern)]
    for file in small:
        if file.is_file():
            write_durably(folder / file.name, file.read_bytes())


def check_room(folder: Path, model: DenseModel, finished: int, state_bytes: int) -> None:
    """Refuse to begin what cannot be finished.

    Args:
        folder: that is being written.
        model: to be carved.
        finished: blocks that are written already.
        state_bytes: needed beside the result.

    Raises:
        CheckpointError: the disk has no room.
    """
    needed = state_bytes
    for number, names in enumerate(model.copied[finished:], start=finished):
        layout = _layout(model, names)
        if number < model.layout.spec.n_blocks:
            layout |= _carved_layout(model, number)
        header, spans = encode_header(layout)
        needed += len(header) + total_bytes(spans.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder.absolute().parent}: {free / 1e9:.1f} GB free, the carved checkpoint needs {needed / 1e9:.1f} GB; "
            "choose another --out"
        )


def bring_to_disk(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _carved_layout(model: DenseModel, block: int) -> Layout:
    """Say what the carved tensors of a block take; their number is that of the dense ones and the two routers."""
    shape, dtype, d_model = model.shape, _stored_dtype(model, block), model.layout.spec.d_model
    return {
        "feed-forward": (dtype, (3, shape.neurons, d_model)),
        "routers": (dtype, (shape.experts + 1, d_model)),
    }


def _layout(model: DenseModel, names: Sequence[str], replaced: Mapping[str, FloatArray] = _NOTHING) -> Layout:
    spans = {name: model.checkpoint.span(name) for name in names}
    return {
        name: (_writable(span.dtype) if name in replaced else span.dtype, span.shape) for name, span in spans.items()
    }


def _widest_first(layout: Layout) -> Layout:
    """Order tensors so that all are aligned to their element."""
    return dict(sorted(layout.items(), key=lambda item: -_ITEM_BYTES[item[1][0]]))


def _stored_dtype(model: DenseModel, block: int) -> str:
    return _writable(model.checkpoint.span(ffn_names(block)[0]).dtype)


def _writable(dtype: str) -> str:
    """Return the type for values that were computed, in float32, from tensors of this one."""
    return "F32" if dtype == "F64" else dtype


def _below(block: int, name: str) -> str:
    return f"model.layers.{block}.mlp.{name}"


def _copy(writer: TensorWriter, model: DenseModel, name: str, replaced: Mapping[str, FloatArray]) -> None:
    if name in replaced:
        writer.write(_encoded(replaced[name], writer.spans[name].dtype, name))
        return
    for piece in model.checkpoint.pieces(name):
        writer.write(piece)


def _encoded(values: FloatArray, dtype: str, tensor: str) -> Array:
    """Round float32 to a type of safetensors; BF16 as its raw 16 bits."""
    if dtype == "F32":
        return values
    if not np.isfinite(values).all():
        raise CheckpointError(f"{tensor}: is not finite; the dense checkpoint is damaged, download it again")
    if dtype == "BF16":
        bits: npt.NDArray[np.uint32] = np.ascontiguousarray(values).view(np.uint32)
        nearest = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))  # ties to even
        return (nearest >> np.uint32(16)).astype(np.uint16)
    if float(np.abs(values).max(initial=0.0)) >= _FLOAT16_LIMIT:
        raise CheckpointError(
            f"{tensor}: the value {np.abs(values).max():g} does not fit into float16 (largest 65504); convert the dense "
            "checkpoint to bfloat16 or float32 first"
        )
    return float16_from_float32(np.ascontiguousarray(values))


def _write_json(path: Path, content: object) -> None:
    write_durably(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
