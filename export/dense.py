"""A dense checkpoint of the Llama family (llama, mistral, qwen2), and the Qwen2-MoE checkpoint that it can become.

What the carved checkpoint would have to say and cannot is refused here, before anything is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from wdmoe.export.carve import CarveShape, FfnWeights, FloatArray, carved_config
from wdmoe.export.checkpoint import Checkpoint, check_floats, wrong_shape
from wdmoe.export.conversion import to_float32
from wdmoe.export.families import FAMILIES, Config, ModelLayout
from wdmoe.export.families.names import feed_forward
from wdmoe.export.weights import stage_parts
from wdmoe.runtime.errors import CheckpointError

DENSE_TYPES = ("llama", "mistral", "qwen2")
_TYPE = "qwen2_moe"
# What the dense families take for fields that a config leaves out. Qwen2-MoE would take others.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},  # as many key-value heads as heads
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
}
_SHARED_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"}
_ROPE_THETA = 10_000.0
# Neurons of an expert should divide by this: torch's grouped product of 16-bit matrices takes no others, and it is what
# transformers runs experts with unless told otherwise.
WIDTH_STEP = 8
_DROPPED = ("auto_map", "pretraining_tp", "attention_bias", "mlp_bias")  # of the dense family alone, and idle


@dataclass(frozen=True)
class DenseModel:
    """A dense checkpoint that was found fit to be carved."""

    checkpoint: Checkpoint
    neurons: int  # of a dense block
    shape: CarveShape
    config: dict[str, Any]  # config.json of the carved checkpoint
    layout: ModelLayout  # of the carved checkpoint; what is not feed-forward has the same names in both

    def matrix(self, name: str) -> FloatArray:
        """Read a tensor as float32."""
        span = self.checkpoint.span(name)
        values = np.empty(span.shape, np.float32)
        row = 0
        for piece in self.checkpoint.pieces(name):
            values[row : row + len(piece)] = to_float32(piece, span.dtype)
            row += len(piece)
        return values

    def feed_forward(self, block: int) -> FfnWeights:
        """Read the feed-forward of a block."""
        return FfnWeights(*(self.matrix(name) for name in ffn_names(block)))

    @property
    def copied(self) -> tuple[tuple[str, ...], ...]:
        """Tensors that stay as they are: those of each block, and last those outside of the blocks."""
        layout = self.layout
        inside = tuple(
            tuple(name for part in stage_parts(layout, block) if part.name != "router" for name, _ in part.sources)
            for block in range(layout.spec.n_blocks)
        )
        head = () if layout.tied_head else (layout.head,)
        return (*inside, (layout.embedding, layout.final_norm, *head))


def ffn_names(block: int) -> tuple[str, str, str]:
    """Name gate, up and down of a dense block."""
    return feed_forward(f"model.layers.{block}.mlp")


def dense_model(
    checkpoint: Checkpoint,
    *,
    experts: int = 8,
    top_k: int = 2,
    shared: int | None = None,
    overlap: bool = False,
    expert_neurons: int | None = None,
) -> DenseModel:
    """Check a dense checkpoint.

    Args:
        checkpoint: of the dense model.
        experts: routed experts of a block.
        top_k: experts of a token.
        shared: neurons of the shared expert; None: half of the block's, or as few more as make experts of a good width;
            a third where experts overlap.
        overlap: whether a neuron may be in several experts, or in none.
        expert_neurons: neurons of a routed expert, where they overlap; None: as many as leave a third of the block
            idle on a token.

    Raises:
        CheckpointError: it cannot be carved; names the field or tensor, and what to do.
        ValueError: the neurons cannot be dealt out like this; names what can.
    """
    config = checkpoint.config
    where = checkpoint.folder / "config.json"
    if checkpoint.model_type in FAMILIES:
        raise CheckpointError(f"{where}: {checkpoint.model_type} is a mixture of experts already; export it as it is")
    if checkpoint.model_type not in DENSE_TYPES:
        raise CheckpointError(
            f"{where}: model_type {checkpoint.model_type!r} cannot be carved; a dense model of one of these can: "
            f"{', '.join(DENSE_TYPES)}"
        )
    _check_attention(config, f"{where}")
    fields = Config(config, checkpoint.json("generation_config.json") or {}, checkpoint.names)
    neurons = fields.count("intermediate_size")
    if overlap:
        shape = overlapping_shape(neurons, experts, top_k, shared, expert_neurons)
    else:
        shape = carve_shape(neurons, experts, top_k, shared)
    carved = _carved_config(config, shape)
    layout = FAMILIES[_TYPE](Config(carved, fields.generation, checkpoint.names), checkpoint.folder.resolve().name)
    model = DenseModel(checkpoint, neurons, shape, carved, layout)
    _check_tensors(model)
    return model


def carve_shape(neurons: int, experts: int, top_k: int, shared: int | None) -> CarveShape:
    """Deal out the neurons of a block.

    Raises:
        ValueError: they cannot be dealt out like this; names what can.
    """
    if top_k > experts:
        raise ValueError(f"--top-k {top_k} is more than the {experts} experts")
    if experts + 1 > neurons:
        raise ValueError(f"--experts {experts}: a block has {neurons} neurons, and the shared expert needs one")
    if shared is None:
        width = max(1, (neurons - neurons // 2) // experts)
        shared = neurons - (width - width % WIDTH_STEP if width > WIDTH_STEP else width) * experts
    routed = neurons - shared
    if shared < 1 or routed < experts or routed % experts:
        fewer = neurons - max(1, min(-(-routed // experts), (neurons - 1) // experts)) * experts
        more = fewer + experts if fewer + experts < neurons else fewer
        raise ValueError(
            f"--shared {shared}: the other {routed} of a block's {neurons} neurons do not divide among {experts} "
            f"experts; give --shared {fewer if fewer == more else f'{fewer} or {more}'}"
        )
    return CarveShape(shared, experts, routed // experts, top_k)


def overlapping_shape(
    neurons: int, experts: int, top_k: int, shared: int | None, expert_neurons: int | None
) -> CarveShape:
    """Size experts that may have neurons in common; unless told otherwise, two thirds of a block work on a token.

    Raises:
        ValueError: there are no such experts; names what can be.
    """
    if not 2 <= top_k < experts:
        raise ValueError(
            f"--top-k {top_k} of --experts {experts}: a router is trained by how it weighs the chosen experts, so at "
            "least 2 and not all of them must be chosen; see --distil layer for other shapes"
        )
    shared = _good_width(neurons // 3) if shared is None else shared
    if expert_neurons is None:
        expert_neurons = _good_width((neurons * 2 // 3 - shared) // top_k)
    if shared < 1 or shared + expert_neurons > neurons:
        raise ValueError(
            f"--shared {shared} and --expert-neurons {expert_neurons}: a block has {neurons} neurons, and the shared "
            f"expert and one routed expert have none in common; give --shared {neurons // 3} --expert-neurons "
            f"{max(1, neurons // 3 // top_k)}, or another pair that fits"
        )
    return CarveShape(shared, experts, expert_neurons, top_k)


def _good_width(width: int) -> int:
    return width - width % WIDTH_STEP if width > WIDTH_STEP else max(1, width)


def _check_attention(config: Mapping[str, Any], where: str) -> None:
    """Refuse what Qwen2-MoE, or its export, has no place for."""
    if config.get("attention_bias") or config.get("mlp_bias"):
        field = "attention_bias" if config.get("attention_bias") else "mlp_bias"
        raise CheckpointError(
            f"{where}: {field} is true; a Qwen2-MoE checkpoint has no place for a bias of o_proj or of the "
            "feed-forward, so such a model cannot be carved. Take one without these biases"
        )
    slides = config.get("sliding_window") if config.get("model_type") == "mistral" else None
    if config.get("model_type") == "qwen2" and config.get("use_sliding_window"):
        slides = config.get("sliding_window", 4096)
    longest = config.get("max_position_embeddings")
    if slides and not (isinstance(longest, int) and longest <= slides):
        field = "use_sliding_window to false" if config.get("model_type") == "qwen2" else "sliding_window to null"
        raise CheckpointError(
            f"{where}: attention slides over {slides} positions of {longest}, which the carved checkpoint cannot say. "
            f"If your texts are no longer than that, set {field} and max_position_embeddings to {slides} in a copy of "
            "config.json: up to there the model is the same"
        )


def _carved_config(dense: Mapping[str, Any], shape: CarveShape) -> dict[str, Any]:
    """Write down what the dense family takes for granted, and leave out what only it knows."""
    family = str(dense["model_type"])
    given = {name: value for name, value in dense.items() if value is not None and name not in _DROPPED}
    full = {**_SHARED_DEFAULTS, **_DEFAULTS[family], **given}
    full.setdefault("num_key_value_heads", full.get("num_attention_heads"))
    rope = full.get("rope_parameters") or {}
    if "rope_theta" not in full:
        full["rope_theta"] = rope.get("rope_theta", _ROPE_THETA) if isinstance(rope, dict) else _ROPE_THETA
    full.pop("sliding_window", None)
    # qkv_bias: Qwen2 always has these biases, the others never do.
    return {**carved_config(full, shape), "qkv_bias": family == "qwen2"}


def _check_tensors(model: DenseModel) -> None:
    """Check that the checkpoint has every tensor in the shape that its config implies, and none besides."""
    checkpoint, layout = model.checkpoint, model.layout
    spec, neurons = layout.spec, model.neurons
    expected: dict[str, tuple[int, ...]] = {layout.embedding: (spec.vocab_size, spec.d_model)}
    if not layout.tied_head:
        expected[layout.head] = (spec.vocab_size, spec.d_model)
    for block in range(spec.n_blocks + 1):
        for part in stage_parts(layout, block):
            if part.name != "router":
                expected.update((str(name), shape) for name, shape in part.sources)
    for block in range(spec.n_blocks):
        gate, up, down = ffn_names(block)
        expected |= {gate: (neurons, spec.d_model), up: (neurons, spec.d_model), down: (spec.d_model, neurons)}
    for name, shape in expected.items():
        if (found := checkpoint.span(name).shape) != shape:
            raise wrong_shape(checkpoint.folder, name, found, shape)
    check_floats(checkpoint, sorted(expected))
    known = {*expected, layout.head} if layout.tied_head else {*expected}
    extra = sorted(name for name in checkpoint.names - known if not name.endswith("rotary_emb.inv_freq"))
    if extra:
        raise CheckpointError(
            f"{checkpoint.folder}: tensor {extra[0]} is not understood for a {checkpoint.model_type} model "
            f"({len(extra)} such); carving without it would give wrong answers"
        )
