"""A stage without its ends: what the kernels do is cut off its graph, and the weights for it are taken along.

residual, moe_out -> [combine, norm] -> attention -> [norm, router] -> hidden, router_logits
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from wdmoe.runtime.errors import BundleError

Floats = npt.NDArray[np.float32]
_ATTENDED = ("residual_out", "new_key", "new_value")


@dataclass(frozen=True, slots=True)
class NormWeights:
    """A root-mean-square norm: weights [d_model], and epsilon."""

    weight: Floats
    epsilon: float


@dataclass(frozen=True, slots=True)
class CutStage:
    """What is left of a stage, and what was cut off."""

    graph: (
        bytes | None
    )  # (token_ids | summed, normed), attention inputs -> residual_out, new_key, new_value; last: none
    before: NormWeights | None  # after the sum that the stage begins with; None: the first stage begins with tokens
    factor: float  # of moe_out in that sum
    after: NormWeights | None  # before the experts; None: the last stage has none
    router: Floats | None  # [n_experts, d_model]


def cut_stage(path: Path) -> CutStage:
    """Cut a stage of a bundle.

    Args:
        path: of the ONNX file; its weights lie beside it.

    Raises:
        BundleError: it is not a stage as wdmoe-export makes it.
    """
    model = onnx.load(str(path), load_external_data=False)
    try:
        return _cut(model, path.parent)
    except (KeyError, StopIteration, ValueError) as error:
        raise BundleError(
            f"{path}: not a stage that can be cut for a GPU ({error}); export the bundle again"
        ) from error


def _cut(model: Any, folder: Path) -> CutStage:
    graph = model.graph
    by_output = {name: node for node in graph.node for name in node.output}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    inputs = {value.name: value for value in graph.input}

    def norm_of(output: str) -> NormWeights:
        node = by_output[output]
        epsilon = next(attribute.f for attribute in node.attribute if attribute.name == "epsilon")
        return NormWeights(_read(node.input[1], by_output, weights, folder), epsilon)

    before, factor, cuts = None, 1.0, dict[str, str]()
    if "moe_out" in inputs:
        summed = next(node for node in graph.node if node.op_type == "Add" and node.input[0] == "residual")
        if (added := summed.input[1]) != "moe_out":  # a model that scales what it adds
            factor = float(onnx.numpy_helper.to_array(weights[by_output[added].input[1]]))
        normed = next(n for n in graph.node if n.op_type == "RMSNormalization" and n.input[0] == summed.output[0])
        before = norm_of(normed.output[0])
        cuts = {summed.output[0]: "summed", normed.output[0]: "normed"}
    if "residual_out" not in by_output:
        return CutStage(None, before, factor, None, None)
    width = next(value for value in graph.output if value.name == "residual_out").type.tensor_type.shape
    kept = _needed(graph.node, by_output, cuts)
    for node in kept:
        node.input[:] = [cuts.get(name, name) for name in node.input]
    used = {name for node in kept for name in node.input}
    shape = [dim.dim_param or dim.dim_value for dim in width.dim]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in cuts.values()]
    attended = helper.make_graph(
        kept,
        graph.name,
        [*ends, *(value for name, value in inputs.items() if name in used)],
        [value for value in graph.output if value.name in _ATTENDED],
        [tensor for name, tensor in weights.items() if name in used],
    )
    built = helper.make_model(attended, opset_imports=model.opset_import, ir_version=model.ir_version)
    router = _read(by_output["router_logits"].input[1], by_output, weights, folder)
    return CutStage(built.SerializeToString(), before, factor, norm_of("hidden"), router)


def _needed(nodes: Sequence[Any], by_output: Mapping[str, Any], cuts: Mapping[str, str]) -> list[Any]:
    """Return the nodes that attention needs, in their order, none before a cut."""
    wanted, found = list(_ATTENDED), set[str]()
    while wanted:
        name = wanted.pop()
        if name in found or name in cuts or name not in by_output:
            continue
        found.update(by_output[name].output)
        wanted.extend(by_output[name].input)
    return [node for node in nodes if found.intersection(node.output)]


def _read(name: str, by_output: Mapping[str, Any], weights: Mapping[str, Any], folder: Path) -> Floats:
    """Read a weight as float32, through the cast of a float16 one."""
    if name in by_output:
        name = by_output[name].input[0]
    weight: Floats = onnx.numpy_helper.to_array(weights[name], str(folder)).astype(np.float32)
    return weight
