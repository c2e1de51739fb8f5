"""The ONNX graphs of a bundle, node by node. Inputs, outputs and shapes: docs/bundle-format.md.

Weights are never inside: an initializer is a byte range of a safetensors file in the graph's own folder.

int8 and int4 experts run on `MatMulNBits` with int8 accumulation, the kernel of ONNX Runtime that is fast and keeps weights
as stored; `DequantizeLinear` and its float32 kernel for int8 expand a matrix at every call. That kernel rounds rows to int8,
a scale for each block, which costs a hundredth of a result. So a row goes in twice, as what int8 holds of it exactly and as the
rest: a ten-thousandth, for twice the rows and still the same bytes of weights. Where int4 weights meet rows as they come, it
goes in once: beside what those weights have lost, a sixth, a hundredth is nothing. What goes into `down_proj` is always in two.
Its outliers cost the most, and golden rows can be such as int8 holds, but what becomes of them inside cannot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from onnx import TensorProto, helper

from wdmoe.export.families import ModelLayout
from wdmoe.export.weights import Weight
from wdmoe.runtime.quantised import GROUP, SCALE_SUFFIX

STATION_OPSET = 23
EXPERT_OPSET = 17  # parsed by every TensorRT that runs on a Jetson
_IR_VERSIONS = {STATION_OPSET: 10, EXPERT_OPSET: 8}  # old enough for onnxruntime 1.23
_ONNX_TYPES = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "U8": TensorProto.UINT8}
_INT8_BLOCKS = (128, 64, 32, 16)  # weights that the kernel takes at once; the largest that divides a row
_INT8_LARGEST = 127.0
_SMALLEST = 1e-30  # so that a row of zeros is not divided by zero
_MICROSOFT = "com.microsoft"  # the operators of ONNX Runtime beyond the standard
_INT8_ACCUMULATION = 4  # accuracy_level of MatMulNBits

Dims = Sequence[int | str]


class _Graph:
    """A graph under construction. `add` returns the name of the node's first output."""

    def __init__(self, name: str, opset: int, weights: Mapping[str, Weight]) -> None:
        self._name, self._opset, self._weights = name, opset, weights
        self._nodes: list[Any] = []
        self._made: set[str] = set()  # results of nodes
        self._initializers: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def input(self, name: str, shape: Dims, onnx_type: int = TensorProto.FLOAT) -> str:
        """Declare an input."""
        self._inputs.append(helper.make_tensor_value_info(name, onnx_type, shape))
        return name

    def output(self, name: str, shape: Dims, onnx_type: int = TensorProto.FLOAT) -> None:
        """Declare an output, the result of the node that has this name."""
        self._outputs.append(helper.make_tensor_value_info(name, onnx_type, shape))

    def add(self, operator: str, inputs: Sequence[str], *outputs: str, **attributes: Any) -> str:
        """Append a node."""
        self._nodes.append(helper.make_node(operator, list(inputs), list(outputs), **attributes))
        self._made.update(outputs)
        return outputs[0]

    def weight(self, name: str) -> str:
        """Use a weight; float16 is cast to float32 first, as every graph computes in float32."""
        weight = self._weights[name]
        if name not in self._initializers:
            self._initializers[name] = _external(name, weight)
            if weight.span.dtype == "F16":
                self.add("Cast", [name], f"{name}_f32", to=TensorProto.FLOAT)
        return f"{name}_f32" if weight.span.dtype == "F16" else name

    def gathered(self, name: str, indices: str, output: str) -> str:
        """Take rows of a weight; of a float16 one only those are cast, where a cast of all of it would be folded."""
        weight = self._weights[name]
        self._initializers[name] = _external(name, weight)
        if weight.span.dtype != "F16":
            return self.add("Gather", [name, indices], output, axis=0)
        rows = self.add("Gather", [name, indices], f"{output}_f16", axis=0)
        return self.add("Cast", [rows], output, to=TensorProto.FLOAT)

    def integers(self, name: str, values: Sequence[int]) -> str:
        """Use a small constant."""
        self._initializers[name] = helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
        return name

    def number(self, name: str, value: float) -> str:
        """Use a float32."""
        self._initializers[name] = helper.make_tensor(name, TensorProto.FLOAT, [], [value])
        return name

    def linear(self, rows: str, weight: str, output: str, bias: str | None = None, factor: float = 1.0) -> str:
        """Multiply rows by a weight [out, in] and a number, and add a bias."""
        inputs = [rows, self.weight(weight)] + ([self.weight(bias)] if bias is not None else [])
        return self.add("Gemm", inputs, output, transB=1, alpha=None if factor == 1 else factor)

    def scaled(self, rows: str, factor: float) -> str:
        """Multiply rows by a number."""
        if factor == 1:
            return rows
        return self.add("Mul", [rows, self.number(f"{rows}_factor", factor)], f"{rows}_scaled")

    def quantised_linear(self, rows: str, columns: int, weight: str, output: str, as_they_come: bool) -> str:
        """Multiply rows [n, columns], as they come to the expert or made in it, by an int8 or int4 weight [out, columns]."""
        stored = self._weights[weight].span
        n_out, bits = stored.shape[0], 8 if len(stored.shape) == 2 else 4
        if bits == 8:
            width = stored.shape[1]
            block = next(size for size in _INT8_BLOCKS if width % size == 0)
        else:
            width, block = stored.shape[1] * GROUP, GROUP
        self._initializers[weight] = _external(
            weight, self._weights[weight], (n_out, width // block, block * bits // 8)
        )
        scale, padded_rows = self.weight(weight + SCALE_SUFFIX), self._padded(rows, columns, width)
        kernel = {"K": width, "N": n_out, "bits": bits, "block_size": block, "accuracy_level": _INT8_ACCUMULATION}
        if bits == 8:  # the kernel wants one for each block; folded when the graph is opened
            column = self.add("Unsqueeze", [scale, self.integers("scale_axis", [1])], f"{scale}_column")
            across = self.integers(f"across_{width // block}", [1, width // block])
            scale = self.add("Tile", [column, across], f"{scale}_blocks")
        if bits == 4 and as_they_come:
            return self.add("MatMulNBits", [padded_rows, weight, scale], output, domain=_MICROSOFT, **kernel)
        two = self._in_two(padded_rows, width, block)
        both = self.add("MatMulNBits", [two, weight, scale], f"{output}_two", domain=_MICROSOFT, **kernel)
        self.add("Split", [both], f"{output}_coarse", f"{output}_fine", axis=0)
        return self.add("Add", [f"{output}_coarse", f"{output}_fine"], output)

    def _padded(self, rows: str, columns: int, width: int) -> str:
        """Widen rows [n, columns] to [n, width], zeros behind."""
        if width == columns:
            return rows
        padded = f"{rows}_padded"
        if padded not in self._made:
            self.add("Pad", [rows, self.integers(f"pad_{width - columns}", [0, 0, 0, width - columns])], padded)
        return padded

    def _in_two(self, rows: str, width: int, block: int) -> str:
        """Split rows [n, width] in what int8 holds and the rest, blocks as the kernel's: [2 n, width]."""
        two = f"{rows}_in_two_{block}"
        if two in self._made:
            return two
        blocks = self.integers(f"blocks_{width}", [0, width // block, block])
        values = self.add("Reshape", [rows, blocks], f"{two}_blocks")
        size = self.add("ReduceMax", [self.add("Abs", [values], f"{two}_abs")], f"{two}_size", axes=[2], keepdims=1)
        step = self.add("Mul", [size, self.number("int8_step", 1 / _INT8_LARGEST)], f"{two}_step")
        step = self.add("Max", [step, self.number("smallest", _SMALLEST)], f"{two}_safe_step")
        integers = self.add("Round", [self.add("Div", [values, step], f"{two}_steps")], f"{two}_integers")
        coarse = self.add("Mul", [integers, step], f"{two}_coarse")
        fine = self.add("Sub", [values, coarse], f"{two}_fine")
        stacked = self.add("Concat", [coarse, fine], f"{two}_stacked", axis=0)
        return self.add("Reshape", [stacked, self.integers(f"flat_{width}", [0, width])], two)

    def rms_norm(self, rows: str, weight: str, output: str, epsilon: float) -> str:
        """Scale rows to unit mean square, then by the norm's weight."""
        inputs = [rows, self.weight(weight)]
        return self.add("RMSNormalization", inputs, output, axis=-1, epsilon=epsilon, stash_type=TensorProto.FLOAT)

    def feed_forward(self, rows: str, output: str) -> str:
        """Run one expert: down_proj (silu(gate_proj rows) * up_proj rows)."""
        shapes = {name: self._weights[name].span.shape for name in ("gate_proj", "down_proj")}
        d_ff, d_model = shapes["gate_proj"][0], shapes["down_proj"][0]
        gate = self._project(rows, d_model, "gate_proj", "gate", as_they_come=True)
        up = self._project(rows, d_model, "up_proj", "up", as_they_come=True)
        swish = self.add("Mul", [gate, self.add("Sigmoid", [gate], "gate_sigmoid")], "gate_silu")
        return self._project(self.add("Mul", [swish, up], "inner"), d_ff, "down_proj", output)

    def _project(self, rows: str, columns: int, weight: str, output: str, as_they_come: bool = False) -> str:
        if self._weights[weight].span.dtype == "U8":
            return self.quantised_linear(rows, columns, weight, output, as_they_come)
        return self.linear(rows, weight, output)

    def build(self) -> onnx.ModelProto:
        """Finish the model."""
        graph = helper.make_graph(
            self._nodes, self._name, self._inputs, self._outputs, list(self._initializers.values())
        )
        opsets = [helper.make_opsetid("", self._opset)]
        if any(node.domain == _MICROSOFT for node in self._nodes):
            opsets.append(helper.make_opsetid(_MICROSOFT, 1))
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=_IR_VERSIONS[self._opset], producer_name="wdmoe"
        )


def stage_graph(layout: ModelLayout, block: int, weights: Mapping[str, Weight]) -> onnx.ModelProto:
    """Build stage l: the sum of block l-1, then attention and router of block l; the last one ends in the final norm.

    Args:
        layout: the model.
        block: l.
        weights: of this stage, and `embedding` for the first.
    """
    spec, multipliers = layout.spec, layout.multipliers
    d_model = spec.d_model
    graph = _Graph(f"stage_{block:02d}", STATION_OPSET, weights)
    if block == 0:
        tokens = graph.input("token_ids", ["N"], TensorProto.INT64)
        embedded = graph.gathered("embedding", tokens, "embedded")
        residual = graph.scaled(embedded, multipliers.embedding)
    else:
        before, moe_out = graph.input("residual", ["N", d_model]), graph.input("moe_out", ["N", d_model])
        residual = graph.add("Add", [before, graph.scaled(moe_out, multipliers.residual)], "summed")
    if block == spec.n_blocks:
        graph.rms_norm(residual, "final_norm", "hidden", layout.norm_eps)
        graph.output("hidden", ["N", d_model])
        return graph.build()

    attended = _attention(graph, layout, residual, has_bias="bqkv" in weights)
    projected = graph.linear(attended, "wo", "projected", "bo" if "bo" in weights else None)
    graph.add("Add", [residual, graph.scaled(projected, multipliers.residual)], "residual_out")
    hidden = graph.rms_norm("residual_out", "post_norm", "hidden", layout.norm_eps)
    graph.linear(hidden, "router", "router_logits")
    graph.output("residual_out", ["N", d_model])
    graph.output("hidden", ["N", d_model])
    graph.output("router_logits", ["N", spec.n_experts])
    graph.output("new_key", ["N", spec.kv_dim])
    graph.output("new_value", ["N", spec.kv_dim])
    return graph.build()


def shared_graph(layout: ModelLayout, block: int, weights: Mapping[str, Weight]) -> onnx.ModelProto:
    """Build the shared expert of a block, scaled by its sigmoid gate where it has one."""
    d_model = layout.spec.d_model
    graph = _Graph(f"shared_{block:02d}", STATION_OPSET, weights)
    hidden = graph.input("hidden", ["N", d_model])
    if "shared_gate" in weights:
        ungated = graph.feed_forward(hidden, "ungated")
        scale = graph.add("Sigmoid", [graph.linear(hidden, "shared_gate", "scale_logit")], "scale")
        graph.add("Mul", [ungated, scale], "shared_out")
    else:
        graph.feed_forward(hidden, "shared_out")
    graph.output("shared_out", ["N", d_model])
    return graph.build()


def head_graph(layout: ModelLayout, weights: Mapping[str, Weight]) -> onnx.ModelProto:
    """Build the head. Its log-softmax is the base station's: ONNX Runtime's sums lose digits over a large vocabulary."""
    spec = layout.spec
    graph = _Graph("head", STATION_OPSET, weights)
    hidden = graph.input("hidden", ["M", spec.d_model])
    weight = "embedding" if layout.tied_head else "head"
    graph.linear(hidden, weight, "logits", factor=layout.multipliers.logits)
    graph.output("logits", ["M", spec.vocab_size])
    return graph.build()


def expert_graph(d_model: int, weights: Mapping[str, Weight]) -> onnx.ModelProto:
    """Build the graph of one routed expert."""
    graph = _Graph("expert", EXPERT_OPSET, weights)
    graph.feed_forward(graph.input("rows", ["n", d_model]), "out")
    graph.output("out", ["n", d_model])
    return graph.build()


def _attention(graph: _Graph, layout: ModelLayout, residual: str, has_bias: bool) -> str:
    """Append attention over cached and new tokens; its result is [N, n_heads x head_dim], before the projection.

    Tokens are flat rows everywhere but inside the Attention operator: there, each lane is a batch entry of its own, so
    that lanes cost nothing to each other. Only there is a shorter lane padded.
    """
    spec = layout.spec
    half = spec.head_dim // 2
    cos, sin = graph.input("cos", ["N", half]), graph.input("sin", ["N", half])
    past_key = graph.input("past_key", ["B", "P", spec.kv_dim])
    past_value = graph.input("past_value", ["B", "P", spec.kv_dim])
    mask = graph.input("mask", ["B", 1, "L", "P+L"])
    lanes = graph.input("lanes", ["B", "L"], TensorProto.INT64)
    back = graph.input("back", ["N"], TensorProto.INT64)

    # RotaryEmbedding wants a batch axis; to it, all tokens are one sequence.
    axis = graph.integers("batch_axis", [0])
    angles = [graph.add("Unsqueeze", [name, axis], f"{name}_batched") for name in (cos, sin)]

    def rotated(name: str, output: str, n_heads: int) -> str:
        batched = graph.add("Unsqueeze", [name, axis], f"{name}_batched")
        turned = graph.add("RotaryEmbedding", [batched, *angles], f"{output}_batched", num_heads=n_heads)
        return graph.add("Squeeze", [turned, axis], output)

    def in_lanes(name: str) -> str:
        return graph.add("Gather", [name, lanes], f"{name}_lanes", axis=0)

    normed = graph.rms_norm(residual, "input_norm", "normed", layout.norm_eps)
    qkv = graph.linear(normed, "wqkv", "qkv", "bqkv" if has_bias else None)
    sizes = graph.integers("qkv_sizes", [spec.n_heads * spec.head_dim, spec.kv_dim, spec.kv_dim])
    graph.add("Split", [qkv, sizes], "query", "key", "new_value", axis=1)
    query = rotated(_qk_norm(graph, layout, "query", spec.n_heads), "rotated_query", spec.n_heads)
    key = rotated(_qk_norm(graph, layout, "key", spec.n_kv_heads), "new_key", spec.n_kv_heads)
    attended = graph.add(
        "Attention",
        [
            in_lanes(query),
            graph.add("Concat", [past_key, in_lanes(key)], "keys", axis=1),
            graph.add("Concat", [past_value, in_lanes("new_value")], "values", axis=1),
            mask,
        ],
        "attended_lanes",
        q_num_heads=spec.n_heads,
        kv_num_heads=spec.n_kv_heads,
        scale=layout.multipliers.attention,  # None: 1 / sqrt(head_dim)
    )
    flat = graph.integers("flat_shape", [-1, spec.n_heads * spec.head_dim])
    return graph.add("Gather", [graph.add("Reshape", [attended, flat], "attended_flat"), back], "attended", axis=0)


def _qk_norm(graph: _Graph, layout: ModelLayout, rows: str, n_heads: int) -> str:
    """Norm queries or keys [N, n_heads x head_dim] where the model does, each head by itself or all at once."""
    if layout.qk_norm is None:
        return rows
    weight, normed = f"{rows}_norm", f"{rows}_normed"
    if layout.qk_norm == "projection":
        return graph.rms_norm(rows, weight, normed, layout.norm_eps)
    dim = layout.spec.head_dim
    heads = graph.add("Reshape", [rows, graph.integers(f"{rows}_by_head", [0, n_heads, dim])], f"{rows}_heads")
    by_head = graph.rms_norm(heads, weight, f"{normed}_heads", layout.norm_eps)
    return graph.add("Reshape", [by_head, graph.integers(f"{rows}_flat", [0, n_heads * dim])], normed)


def _external(name: str, weight: Weight, shape: Sequence[int] | None = None) -> TensorProto:
    dims = weight.span.shape if shape is None else shape
    tensor = TensorProto(name=name, data_type=_ONNX_TYPES[weight.span.dtype], dims=dims)
    tensor.data_location = TensorProto.EXTERNAL
    place = {"location": weight.file, "offset": weight.span.offset_bytes, "length": weight.span.size_bytes}
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
