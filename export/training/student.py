"""The carved model for training: every dense neuron is computed once, whatever experts it is in.

With overlapping experts the block is a dense one whose neurons are multiplied by what the chosen experts give them:
gate weights [tokens, experts] times scales [experts, neurons]. Low-rank changes stand beside all matrices, one more
beside the down projection of each expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from wdmoe.export.carve import BlockPlan, CarveShape
from wdmoe.export.carve_artefact import BlockChange
from wdmoe.export.low_rank import LowRank
from wdmoe.export.training.planning import SoftPlan
from wdmoe.export.training.torch_dense import Block, Dense, attention, rms_norm, rope_angles

FloatArray = npt.NDArray[np.float32]

# Ranks of the changes, times the rank that is asked for: those of the feed-forward matter most.
_RANK_FACTORS = {"qkv": 1, "o": 1, "gate_up": 2, "down": 3}
WANTED_MARGIN = 0.02  # in gate logits; a smaller one counts as a near tie, which training is to move apart


@dataclass(frozen=True, slots=True)
class StudentShape:
    """The shape of a student: of its experts, and of the changes of its matrices."""

    carved: CarveShape
    rank: int = 12  # of a change of the attention's matrices, and of one expert's own
    compiled: bool = True  # faster after the first minute; needs a C++ compiler
    recompute: bool = False  # of a block only its input is kept for the backward pass

    def rank_of(self, group: str, inputs: int, outputs: int) -> int:
        """Return the rank of the change of a matrix [outputs, inputs]; a matrix has no higher rank than its sides."""
        return min(_RANK_FACTORS[group] * self.rank, inputs, outputs)

    def expert_rank(self, hidden: int) -> int:
        """Return the rank of each expert's own change of its down projection."""
        return min(self.rank, self.carved.expert_neurons, hidden)


class StudentBlock(nn.Module):
    """What is trained of one block; the dense weights stay as they are."""

    def __init__(self, block: Block, plan: SoftPlan, shape: StudentShape) -> None:
        super().__init__()
        self.block, self.shape = block, shape.carved
        self.router = nn.Parameter(plan.router.clone())
        self.scales = nn.Parameter(plan.scales.clone())
        self.shared = nn.Parameter(plan.shared.clone())
        self.input_norm = nn.Parameter(block.input_norm.clone())
        self.ffn_norm = nn.Parameter(block.ffn_norm.clone())
        self.into, self.out = nn.ParameterDict(), nn.ParameterDict()
        for group in _RANK_FACTORS:
            outputs, inputs = getattr(block, group).shape
            rank = shape.rank_of(group, inputs, outputs)
            self.into[group] = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
            self.out[group] = nn.Parameter(torch.zeros(outputs, rank))
        hidden, neurons = block.down.shape
        self.expert_rank = shape.expert_rank(hidden)
        own_ranks = self.shape.experts * self.expert_rank
        self.expert_into = nn.Parameter(torch.zeros(own_ranks, neurons))
        self.expert_out = nn.Parameter(torch.zeros(hidden, own_ranks))
        # Buffers: saved and loaded with what is trained.
        self.register_buffer("is_member", (plan.scales > 0).float())
        self.register_buffer("is_shared", plan.shared.clone())
        self.register_buffer("router_size", plan.router.square().mean().sqrt())  # rms where training starts

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all that is trained as the forward pass takes it: as the dense matrices but for router and norms."""
        dtype = self.block.qkv.dtype
        found = {f"{group}_into": self.into[group].to(dtype) for group in _RANK_FACTORS}
        found |= {f"{group}_out": self.out[group].to(dtype) for group in _RANK_FACTORS}
        return found | {
            "router": self.router,
            "scales": (self.scales * self.is_member).to(dtype),
            "shared": (self.shared * self.is_shared).to(dtype),
            "input_norm": self.input_norm,
            "ffn_norm": self.ffn_norm,
            "expert_into": (self.expert_into * self.is_member.repeat_interleave(self.expert_rank, 0)).to(dtype),
            "expert_out": self.expert_out.to(dtype),
        }

    def plan(self) -> BlockPlan:
        """Return the plan as trained: gate weights sum to 1 here, `carve_block` multiplies by their number."""
        shared = self.is_shared.cpu().nonzero()[:, 0]
        members = [row.nonzero()[:, 0] for row in self.is_member.cpu()]
        scales, into, out = (part.detach().cpu() for part in (self.scales, self.expert_into, self.expert_out))
        routed = [scales[expert, own] / self.shape.experts_per_token for expert, own in enumerate(members)]
        ranks = [slice(expert * self.expert_rank, (expert + 1) * self.expert_rank) for expert in range(len(members))]
        return BlockPlan(
            torch.cat([shared, *members]).numpy(),
            _array(self.router),
            torch.cat([self.shared.detach().cpu()[shared], *routed]).numpy(),
            tuple(
                LowRank(into[rank][:, own].numpy(), out[:, rank].numpy())
                for rank, own in zip(ranks, members, strict=True)
            ),
        )

    def change(self) -> BlockChange:
        """Return what training changed in the dense weights."""
        return BlockChange(
            {group: LowRank(_array(self.into[group]), _array(self.out[group])) for group in _RANK_FACTORS},
            {"input_layernorm": _array(self.input_norm), "post_attention_layernorm": _array(self.ffn_norm)},
        )


def _array(values: torch.Tensor) -> FloatArray:
    result: FloatArray = values.detach().cpu().numpy()
    return result


def student_block(
    rows: torch.Tensor,
    block: Block,
    own: dict[str, torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    heads: int,
    kv_heads: int,
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the residual stream after a carved block, the gate logits and the gate weights [..., experts]."""

    def both(inputs: torch.Tensor, group: str, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(inputs, weight, bias) + F.linear(F.linear(inputs, own[f"{group}_into"]), own[f"{group}_out"])

    dtype = block.qkv.dtype
    qkv = both(rms_norm(rows, own["input_norm"], eps, dtype), "qkv", block.qkv, block.qkv_bias)
    rows = rows + both(attention(qkv, cos, sin, heads, kv_heads), "o", block.o).float()
    inputs = rms_norm(rows, own["ffn_norm"], eps, dtype)
    logits = F.linear(inputs.float(), own["router"])
    best = logits.topk(top_k, -1)
    weights = torch.zeros_like(logits).scatter(-1, best.indices, best.values.softmax(-1))
    low = weights.to(dtype)
    expert_rank = own["expert_out"].shape[1] // logits.shape[-1]
    gate, up = both(inputs, "gate_up", block.gate_up).chunk(2, -1)
    activations = F.silu(gate) * up
    factors = F.linear(low, own["scales"].t()) + own["shared"]
    of_experts = F.linear(activations, own["expert_into"]) * low.repeat_interleave(expert_rank, -1)
    out = both(activations * factors, "down", block.down) + F.linear(of_experts, own["expert_out"])
    return rows + out.float(), logits, weights


class Student(nn.Module):
    """The carved model; embedding and head are the dense model's."""

    def __init__(self, model: Dense, plans: Sequence[SoftPlan] | None, shape: StudentShape) -> None:
        """Set up what is trained; without plans it is to be read from a file."""
        super().__init__()
        self.dense, self.shape = model, shape.carved
        hidden, neurons = model.blocks[0].down.shape
        plans = plans or [SoftPlan.empty(shape.carved, hidden, neurons)] * len(model.blocks)
        pairs = zip(model.blocks, plans, strict=True)
        self.blocks = nn.ModuleList(StudentBlock(block, plan, shape) for block, plan in pairs)
        self.norm = nn.Parameter(model.norm.clone())
        self.to(model.device)
        self.compiled, self._recompute = shape.compiled, shape.recompute
        self._run = torch.compile(student_block, dynamic=False) if shape.compiled else student_block

    def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the normalised last hidden state of tokens [batch, tokens], the near ties and the uneven load.

        Near ties: the mean over tokens of how far a margin between the last chosen and the next expert falls short of
        `WANTED_MARGIN`. Uneven load: 1 where every expert is as likely and as often chosen as any other.
        """
        model, shape = self.dense, self.shape
        rows = F.embedding(batch, model.embedding).float()
        cos, sin = rope_angles(model, batch.shape[1])
        # Compiled for training alone: judging a few windows takes less time than compiling for them.
        run = self._run if torch.is_grad_enabled() else student_block
        ties, loads = (torch.zeros((), device=model.device) for _ in range(2))
        for own in self.blocks:
            given = (
                rows, own.block, own.tensors(), cos, sin, model.eps, model.heads, model.kv_heads,
                shape.experts_per_token,
            )  # fmt: skip
            if self._recompute and torch.is_grad_enabled():
                rows, logits, weights = checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                rows, logits, weights = run(*given)
            best = logits.topk(shape.experts_per_token + 1, -1).values
            ties = ties + F.relu(1 - (best[..., -2] - best[..., -1]) / WANTED_MARGIN).mean()
            used = (weights > 0).float().mean((0, 1)) / shape.experts_per_token
            loads = loads + shape.experts * (used * logits.softmax(-1).mean((0, 1))).sum()
        blocks = len(self.blocks)
        return rms_norm(rows, self.norm, model.eps, model.dtype), ties / blocks, loads / blocks
