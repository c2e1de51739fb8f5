"""What a trained carving adds to a dense model, as one small file: plans, low-rank changes, norms.

The dense weights are not in it. Written by the scripts that train it, read when the checkpoint is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.export.carve import BlockPlan, CarveShape
from wdmoe.export.low_rank import LowRank, quantise, restore
from wdmoe.runtime.errors import BundleError, CheckpointError
from wdmoe.runtime.tensor_file import map_tensors, write_tensors

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]

# The matrices of a block that share one change: their rows stand below each other in it.
GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True, slots=True)
class BlockChange:
    """What training changed in the dense weights of one block, before they are carved."""

    groups: Mapping[str, LowRank]  # by the keys of `GROUPS`
    norms: Mapping[str, FloatArray]  # by the names in `NORMS`, [hidden]: the weights themselves


@dataclass(frozen=True, slots=True)
class CarveArtefact:
    """The shape of every block, the plan of each, and what else training changed; nothing if it is empty."""

    shape: CarveShape
    blocks: tuple[BlockPlan, ...]
    changes: tuple[BlockChange, ...] = ()
    final_norm: FloatArray | None = field(default=None)  # [hidden]


def changed(name: str, values: FloatArray, artefact: CarveArtefact) -> FloatArray:
    """Return the dense tensor of this published name as training left it.

    Args:
        name: for example `model.layers.3.self_attn.k_proj.weight`.
        values: the tensor of the dense model; not written to.
        artefact: whose changes apply.
    """
    if name == "model.norm.weight" and artefact.final_norm is not None:
        return artefact.final_norm
    parts = name.removesuffix(".weight").split(".", 3)
    if not artefact.changes or parts[:2] != ["model", "layers"]:
        return values
    change, module = artefact.changes[int(parts[2])], parts[3]
    if module in change.norms:
        return change.norms[module]
    for group, members in GROUPS.items():
        if module in members:
            place = members.index(module)
            # Q has more rows than K and V, which have as many each: so rows are counted from the end.
            start = change.groups[group].out.shape[0] - len(values) * (len(members) - place) if place else 0
            part = change.groups[group].out[start : start + len(values)]
            return values + LowRank(change.groups[group].into, part).matrix()
    return values


def write_artefact(path: Path, artefact: CarveArtefact, source_sha256: str) -> None:
    """Write what `read_artefact` reads, under a temporary name first.

    Permutation, router, scales and norms are [blocks, ...] arrays of 16 bits an element, changes are int8.
    """
    arrays: dict[str, Array] = {
        "shape": np.asarray(astuple(artefact.shape), np.int32),
        "source_sha256": np.frombuffer(bytes.fromhex(source_sha256), np.uint8),
        "permutation": np.stack([block.permutation for block in artefact.blocks]).astype(np.int16),
        "router": np.stack([block.router for block in artefact.blocks]).astype(np.float16),
        "scales": np.stack([block.scales for block in artefact.blocks]).astype(np.float16),
    }
    for index, block in enumerate(artefact.blocks):
        for expert, change in enumerate(block.deltas):
            arrays |= quantise(f"{index}.experts.{expert}", change)
    for index, block_change in enumerate(artefact.changes):
        for group in GROUPS:
            arrays |= quantise(f"{index}.{group}", block_change.groups[group])
        for norm in NORMS:
            arrays[f"{index}.{norm}"] = block_change.norms[norm].astype(np.float16)
    if artefact.final_norm is not None:
        arrays["final_norm"] = artefact.final_norm.astype(np.float16)
    write_tensors(path, arrays)


def read_artefact(path: Path, source_sha256: str) -> CarveArtefact:
    """Read the shape, the plans of all blocks and the changes.

    Raises:
        CheckpointError: the file is missing, damaged or made for other dense weights.
    """
    try:
        arrays = map_tensors(path)
        source = arrays["source_sha256"].tobytes().hex()
        if source != source_sha256:
            raise CheckpointError(f"{path} was made for the dense weights {source}; expected {source_sha256}")
        shape = CarveShape(*(int(size) for size in arrays["shape"]))
        plans = zip(arrays["permutation"], arrays["router"], arrays["scales"], strict=True)
        blocks = tuple(_plan(index, plan, shape, arrays) for index, plan in enumerate(plans))
        changes = tuple(_change(index, arrays) for index in range(len(blocks))) if "0.qkv.into" in arrays else ()
        final_norm = arrays["final_norm"].astype(np.float32) if "final_norm" in arrays else None
    except (OSError, BundleError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; install wdmoe again") from error
    return CarveArtefact(shape, blocks, changes, final_norm)


def _plan(index: int, plan: tuple[Array, Array, Array], shape: CarveShape, arrays: Mapping[str, Array]) -> BlockPlan:
    permutation, router, scales = plan
    deltas: tuple[LowRank, ...] = ()
    if f"{index}.experts.0.into" in arrays:
        deltas = tuple(restore(f"{index}.experts.{expert}", arrays) for expert in range(shape.experts))
    return BlockPlan(permutation.astype(np.int64), router.astype(np.float32), scales.astype(np.float32), deltas)


def _change(index: int, arrays: Mapping[str, Array]) -> BlockChange:
    return BlockChange(
        groups={group: restore(f"{index}.{group}", arrays) for group in GROUPS},
        norms={norm: arrays[f"{index}.{norm}"].astype(np.float32) for norm in NORMS},
    )
