"""What a family file says about its checkpoints, in the words of the exporter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wdmoe.export.checkpoint import TensorName
from wdmoe.export.families.names import Naming, feed_forward
from wdmoe.runtime.manifest import ModelSpec

# What the query and key norms see: one head at a time, or the whole projection.
QkNorm = Literal["head", "projection"]


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Weights of one gated feed-forward: down (silu(gate x) * up x)."""

    gate: TensorName  # [d_ff, d_model]
    up: TensorName  # [d_ff, d_model]
    down: TensorName  # [d_model, d_ff]


@dataclass(frozen=True, slots=True)
class BlockNames:
    """Tensors of one block that stay at the base station."""

    input_norm: str  # [d_model]
    query: str  # [n_heads x head_dim, d_model]
    key: str  # [n_kv_heads x head_dim, d_model]
    value: str  # [n_kv_heads x head_dim, d_model]
    output: str  # [d_model, n_heads x head_dim]
    post_norm: str  # [d_model]
    router: str  # [n_experts, d_model]
    biases: tuple[str, str, str] | None  # of query, key and value
    output_bias: str | None  # [d_model]
    qk_norms: tuple[str, str] | None  # [head_dim] each, or [n_heads x head_dim] and [n_kv_heads x head_dim]
    shared: ExpertNames | None
    shared_gate: str | None  # [1, d_model]; its sigmoid scales the shared expert


@dataclass(frozen=True, slots=True)
class Multipliers:
    """Numbers that the graphs multiply by. They are constants of the graphs: the base station does not know them."""

    embedding: float = 1.0  # rows of the embedding
    attention: float | None = None  # scores before the softmax; None: 1 / sqrt(head_dim)
    residual: float = 1.0  # what attention and what the experts add to the residual
    logits: float = 1.0


NO_MULTIPLIERS = Multipliers()


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """A model as the exporter sees it: its shapes, a few numbers of its graphs, and the names of its tensors."""

    spec: ModelSpec
    naming: Naming
    norm_eps: float
    tied_head: bool  # the head is the embedding
    qkv_bias: bool = False
    output_bias: bool = False  # of the projection after attention
    qk_norm: QkNorm | None = None
    shared_ff: int = 0  # width of the shared expert; 0: the blocks have none
    multipliers: Multipliers = NO_MULTIPLIERS
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"

    def block(self, block: int) -> BlockNames:
        """Name the tensors of a block that stay at the base station."""
        prefix = f"model.layers.{block}"
        attention = f"{prefix}.self_attn"
        biases = (f"{attention}.q_proj.bias", f"{attention}.k_proj.bias", f"{attention}.v_proj.bias")
        shared = ExpertNames(*feed_forward(f"{prefix}.mlp.shared_expert")) if self.shared_ff else None
        return BlockNames(
            input_norm=f"{prefix}.input_layernorm.weight",
            query=f"{attention}.q_proj.weight",
            key=f"{attention}.k_proj.weight",
            value=f"{attention}.v_proj.weight",
            output=f"{attention}.o_proj.weight",
            post_norm=f"{prefix}.post_attention_layernorm.weight",
            router=f"{prefix}.{self.naming.router}",
            biases=biases if self.qkv_bias else None,
            output_bias=f"{attention}.o_proj.bias" if self.output_bias else None,
            qk_norms=(f"{attention}.q_norm.weight", f"{attention}.k_norm.weight") if self.qk_norm else None,
            shared=shared,
            shared_gate=f"{prefix}.mlp.shared_expert_gate.weight" if self.shared_ff else None,
        )

    def expert(self, block: int, expert: int) -> ExpertNames:
        """Say where the weights of a routed expert are: tensors of its own, or its rows of those of all experts."""
        spec = self.spec
        weights = self.naming.expert(expert, spec.n_experts, spec.d_ff, spec.d_model, below=f"model.layers.{block}.")
        return ExpertNames(*weights)
