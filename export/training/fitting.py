"""Where training starts: low-rank changes of the down projections, in closed form, block by block.

Both models run side by side. In each block the student's residual stream is drawn to the dense model's by reduced-rank
ridge regression on what goes into the down projection, first of all neurons, then of each routed expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn import functional as F

from wdmoe.export.training.student import Student, StudentBlock, student_block
from wdmoe.export.training.torch_dense import Block, dense_block, rms_norm, rope_angles

RIDGE = 0.02  # of the mean square of a feature
EXPERT_SHARE = 0.5  # of what an expert's own fit would add: the other chosen expert corrects the same token


@torch.no_grad()
def fit_down(student: Student, windows: torch.Tensor, on_block: Callable[[int], None] = lambda _done: None) -> None:
    """Set the low-rank changes of all down projections from windows [n, tokens]."""
    model, shape = student.dense, student.shape
    cos, sin = rope_angles(model, windows.shape[1])
    wanted = F.embedding(windows, model.embedding).float()
    rows = wanted.clone()
    for number, own in enumerate(student.blocks):
        block, tensors = own.block, own.tensors()

        def carved(
            batch: torch.Tensor, block: Block = block, tensors: dict[str, torch.Tensor] = tensors
        ) -> torch.Tensor:
            result: torch.Tensor = student_block(
                batch, block, tensors, cos, sin, model.eps, model.heads, model.kv_heads, shape.experts_per_token
            )
            return result

        wanted = torch.cat(
            [dense_block(part, block, cos, sin, model.eps, model.heads, model.kv_heads) for part in wanted.split(4)]
        )
        before = torch.cat([carved(part)[0] for part in rows.split(4)])
        # Every token counts for its relative error: a first token's residual stream is a hundred times the others'.
        weight = 1 / wanted.flatten(0, 1).norm(dim=-1, keepdim=True)
        weight = (weight / weight.median()).clamp(max=2)
        _fit_block(own, _into_down(own, rows, student), (wanted - before).flatten(0, 1), weight)
        tensors = own.tensors()
        rows = torch.cat([carved(part, tensors=tensors)[0] for part in rows.split(4)])
        on_block(number + 1)


def _into_down(own: StudentBlock, rows: torch.Tensor, student: Student) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the activations [tokens, neurons] and gate weights [tokens, experts] of the student's block."""
    model, block, shape = student.dense, own.block, student.shape
    cos, sin = rope_angles(model, rows.shape[1])
    # The attention of an untrained student is the dense model's: a block without feed-forward part gives its output.
    still = replace(block, down=block.down * 0)
    after = torch.cat(
        [dense_block(part, still, cos, sin, model.eps, model.heads, model.kv_heads) for part in rows.split(4)]
    )
    inputs = rms_norm(after, own.ffn_norm, model.eps, model.dtype).flatten(0, 1)
    gate, up = F.linear(inputs, block.gate_up).chunk(2, -1)
    best = F.linear(inputs.float(), own.router).topk(shape.experts_per_token, -1)
    weights = best.values.new_zeros(len(inputs), shape.experts).scatter(-1, best.indices, best.values.softmax(-1))
    return F.silu(gate) * up, weights


def _fit_block(
    own: StudentBlock, inputs: tuple[torch.Tensor, torch.Tensor], residual: torch.Tensor, weight: torch.Tensor
) -> None:
    """Fit the change of one block to what is missing, `residual` [tokens, hidden]; tokens count by `weight`."""
    activations, gates = inputs
    factors = gates @ (own.scales * own.is_member) + own.shared
    features, residual = activations.float() * factors * weight, residual * weight
    into, out = reduced_rank(features, residual, own.into["down"].shape[0])
    residual = residual - features @ into.T @ out.T
    own.into["down"].copy_(into)
    own.out["down"].copy_(out)
    for expert, members in enumerate(own.is_member.bool()):
        chosen = gates[:, expert] > 0
        features = activations[chosen][:, members].float() * gates[chosen, expert, None] * weight[chosen]
        into, out = reduced_rank(features, residual[chosen], own.expert_rank)
        into = into * EXPERT_SHARE
        residual[chosen] -= features @ into.T @ out.T
        ranks = slice(expert * own.expert_rank, (expert + 1) * own.expert_rank)
        own.expert_into[ranks, members] = into
        own.expert_out[:, ranks] = out


def reduced_rank(features: torch.Tensor, wanted: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return into [rank, f] and out [hidden, rank] with features @ into.T @ out.T near wanted, of one size each."""
    gram = features.T @ features
    # The smallest number: of an expert that no token chose, all features are 0.
    gram += (RIDGE * gram.diagonal().mean() + 1e-12) * torch.eye(len(gram), device=gram.device)
    full = torch.linalg.solve(gram, features.T @ wanted)
    fitted = features @ full
    _, directions = torch.linalg.eigh(fitted.T @ fitted)
    out = directions[:, -rank:]
    into = (full @ out).T
    size = into.norm(dim=1).clamp(min=1e-12).sqrt()
    return into / size[:, None], out * size
