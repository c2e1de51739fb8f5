"""The carved model for training: every dense neuron is computed once, whatever experts it is in.

With overlapping experts the block is a dense one whose neurons are multiplied by what the chosen experts give them:
gate weights [tokens, experts] times scales [experts, neurons]. Low-rank changes stand beside all matrices, one more
beside the down projection of each expert.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from scripts.carving.dense import Block, Dense, attention, rms_norm, rope
from scripts.carving.planning import SoftPlan
from wdmoe.export.carve import BlockPlan, CarveShape
from wdmoe.export.carve_artefact import BlockChange
from wdmoe.export.low_rank import LowRank

RANKS = {"qkv": 12, "o": 12, "gate_up": 24, "down": 36}
EXPERT_RANK = 12
WANTED_MARGIN = 0.02  # in gate logits; a smaller one counts as a near tie, which training is to move apart


class StudentBlock(nn.Module):
    """What is trained of one block; the dense weights stay as they are."""

    def __init__(self, block: Block, plan: SoftPlan, shape: CarveShape) -> None:
        super().__init__()
        self.block, self.shape = block, shape
        self.router = nn.Parameter(plan.router.clone())
        self.scales = nn.Parameter(plan.scales.clone())
        self.shared = nn.Parameter(plan.shared.clone())
        self.input_norm = nn.Parameter(block.input_norm.clone())
        self.ffn_norm = nn.Parameter(block.ffn_norm.clone())
        self.into, self.out = nn.ParameterDict(), nn.ParameterDict()
        for group, rank in RANKS.items():
            outputs, inputs = getattr(block, group).shape
            self.into[group] = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
            self.out[group] = nn.Parameter(torch.zeros(outputs, rank))
        hidden, neurons = block.down.shape
        self.expert_into = nn.Parameter(torch.zeros(shape.experts * EXPERT_RANK, neurons))
        self.expert_out = nn.Parameter(torch.zeros(hidden, shape.experts * EXPERT_RANK))
        # Buffers: who is in which expert is saved and loaded with what is trained.
        self.register_buffer("is_member", (plan.scales > 0).float())
        self.register_buffer("is_shared", plan.shared.clone())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all that is trained as the forward pass takes it: bfloat16 but for router and norms."""
        found = {f"{group}_into": self.into[group].bfloat16() for group in RANKS}
        found |= {f"{group}_out": self.out[group].bfloat16() for group in RANKS}
        return found | {
            "router": self.router,
            "scales": (self.scales * self.is_member).bfloat16(),
            "shared": (self.shared * self.is_shared).bfloat16(),
            "input_norm": self.input_norm,
            "ffn_norm": self.ffn_norm,
            "expert_into": (self.expert_into * self.is_member.repeat_interleave(EXPERT_RANK, 0)).bfloat16(),
            "expert_out": self.expert_out.bfloat16(),
        }

    def plan(self) -> BlockPlan:
        """Return the plan as trained: gate weights sum to 1 here, `carve_block` multiplies by their number."""
        shared = self.is_shared.nonzero()[:, 0]
        members = [row.nonzero()[:, 0] for row in self.is_member]
        scales, into, out = self.scales.detach(), self.expert_into.detach(), self.expert_out.detach()
        routed = [scales[expert, own] / self.shape.experts_per_token for expert, own in enumerate(members)]
        ranks = [slice(expert * EXPERT_RANK, (expert + 1) * EXPERT_RANK) for expert in range(self.shape.experts)]
        return BlockPlan(
            torch.cat([shared, *members]).numpy(),
            self.router.detach().numpy(),
            torch.cat([self.shared.detach()[shared], *routed]).numpy(),
            tuple(
                LowRank(into[rank][:, own].numpy(), out[:, rank].numpy())
                for rank, own in zip(ranks, members, strict=True)
            ),
        )

    def change(self) -> BlockChange:
        """Return what training changed in the dense weights."""
        return BlockChange(
            {group: LowRank(self.into[group].detach().numpy(), self.out[group].detach().numpy()) for group in RANKS},
            {
                "input_layernorm": self.input_norm.detach().numpy(),
                "post_attention_layernorm": self.ffn_norm.detach().numpy(),
            },
        )


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

    def both(inputs: torch.Tensor, group: str, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(inputs, weight) + F.linear(F.linear(inputs, own[f"{group}_into"]), own[f"{group}_out"])

    qkv = both(rms_norm(rows, own["input_norm"], eps), "qkv", block.qkv)
    rows = rows + both(attention(qkv, cos, sin, heads, kv_heads), "o", block.o).float()
    inputs = rms_norm(rows, own["ffn_norm"], eps)
    logits = F.linear(inputs.float(), own["router"])
    best = logits.topk(top_k, -1)
    weights = torch.zeros_like(logits).scatter(-1, best.indices, best.values.softmax(-1))
    low = weights.bfloat16()
    gate, up = both(inputs, "gate_up", block.gate_up).chunk(2, -1)
    activations = F.silu(gate) * up
    factors = F.linear(low, own["scales"].t()) + own["shared"]
    of_experts = F.linear(activations, own["expert_into"]) * low.repeat_interleave(EXPERT_RANK, -1)
    out = both(activations * factors, "down", block.down) + F.linear(of_experts, own["expert_out"])
    return rows + out.float(), logits, weights


class Student(nn.Module):
    """The carved model; embedding and head are the dense model's."""

    def __init__(self, model: Dense, plans: list[SoftPlan], shape: CarveShape) -> None:
        super().__init__()
        self.dense, self.shape = model, shape
        pairs = zip(model.blocks, plans, strict=True)
        self.blocks = nn.ModuleList(StudentBlock(block, plan, shape) for block, plan in pairs)
        self.norm = nn.Parameter(model.norm.clone())
        self._run = torch.compile(student_block, dynamic=False)

    def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the normalised last hidden state of tokens [batch, tokens], the near ties and the uneven load.

        Near ties: the mean over tokens of how far a margin between the last chosen and the next expert falls short of
        `WANTED_MARGIN`. Uneven load: 1 where every expert is as likely and as often chosen as any other.
        """
        model, shape = self.dense, self.shape
        rows = F.embedding(batch, model.embedding).float()
        cos, sin = rope(model, batch.shape[1])
        ties, loads = torch.zeros(()), torch.zeros(())
        for own in self.blocks:
            rows, logits, weights = self._run(
                rows,
                own.block,
                own.tensors(),
                cos,
                sin,
                model.eps,
                model.heads,
                model.kv_heads,
                shape.experts_per_token,
            )
            best = logits.topk(min(shape.experts_per_token + 1, shape.experts), -1).values
            ties = ties + F.relu(1 - (best[..., shape.experts_per_token - 1] - best[..., -1]) / WANTED_MARGIN).mean()
            used = (weights > 0).float().mean((0, 1)) / shape.experts_per_token
            loads = loads + shape.experts * (used * logits.softmax(-1).mean((0, 1))).sum()
        blocks = len(self.blocks)
        return rms_norm(rows, self.norm, model.eps), ties / blocks, loads / blocks
