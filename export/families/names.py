"""What checkpoints call the tensors of their mixtures: as published, and as transformers 5 holds and may save them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from wdmoe.export.checkpoint import ExpertRows, TensorName

Three = tuple[TensorName, TensorName, TensorName]  # gate, up, down


@dataclass(frozen=True, slots=True)
class Separate:
    """Three tensors for each expert. Names are relative to `model.layers.B.`; {expert} stands for its number."""

    router: str  # [n_experts, d_model]
    gate: str  # [d_ff, d_model]
    up: str  # [d_ff, d_model]
    down: str  # [d_model, d_ff]

    @property
    def probe(self) -> str:
        """A tensor that tells this naming from others."""
        return self.gate.format(expert=0)

    def expert(self, expert: int, n_experts: int, d_ff: int, d_model: int, below: str) -> Three:
        """Name the expert's own tensors."""
        gate, up, down = (below + name.format(expert=expert) for name in (self.gate, self.up, self.down))
        return gate, up, down


@dataclass(frozen=True, slots=True)
class Fused:
    """Two tensors for all experts of a block; in the first, an expert's gate rows come before its up rows."""

    router: str  # [n_experts, d_model]
    gate_up: str  # [n_experts, 2 x d_ff, d_model]
    down: str  # [n_experts, d_model, d_ff]

    @property
    def probe(self) -> str:
        """A tensor that tells this naming from others."""
        return self.gate_up

    def expert(self, expert: int, n_experts: int, d_ff: int, d_model: int, below: str) -> Three:
        """Name the expert's rows of the two tensors."""
        gate_up, gate_up_shape = below + self.gate_up, (n_experts, 2 * d_ff, d_model)
        return (
            ExpertRows(gate_up, gate_up_shape, expert, 0, d_ff),
            ExpertRows(gate_up, gate_up_shape, expert, d_ff, 2 * d_ff),
            ExpertRows(below + self.down, (n_experts, d_model, d_ff), expert, 0, d_model),
        )


Naming = Separate | Fused


def feed_forward(prefix: str) -> tuple[str, str, str]:
    """Name gate, up and down of a feed-forward in the words of Llama and Qwen."""
    return f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight", f"{prefix}.down_proj.weight"


_MIXTRAL_EXPERT = "block_sparse_moe.experts.{expert}"
MIXTRAL = Separate(
    "block_sparse_moe.gate.weight",
    gate=f"{_MIXTRAL_EXPERT}.w1.weight",
    up=f"{_MIXTRAL_EXPERT}.w3.weight",
    down=f"{_MIXTRAL_EXPERT}.w2.weight",
)
QWEN = Separate("mlp.gate.weight", *feed_forward("mlp.experts.{expert}"))  # OLMoE uses it as well
QWEN_FUSED = Fused("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")  # and Mixtral this one
GRANITE = Fused(
    "block_sparse_moe.router.layer.weight",
    gate_up="block_sparse_moe.input_linear.weight",
    down="block_sparse_moe.output_linear.weight",
)
GRANITE_FUSED = Fused(
    "block_sparse_moe.router.weight",
    gate_up="block_sparse_moe.experts.gate_up_proj",
    down="block_sparse_moe.experts.down_proj",
)


def naming_of(tensors: Collection[str], namings: Sequence[Naming]) -> Naming:
    """Find the naming that a checkpoint uses; the first if none, so that what is missing gets its published name."""
    return next((naming for naming in namings if f"model.layers.0.{naming.probe}" in tensors), namings[0])
