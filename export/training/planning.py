"""Which neurons go where: experts are sets of neurons for clusters of tokens, and may overlap.

A neuron's importance for a token is its squared activation times the mean squared gradient of the model's own
next-token loss at it (the diagonal of the Fisher information), as a share of the token's total. The shared expert takes
the neurons of the largest mean, and the few with massive activations on a first token. Then, in turns: each expert takes
the neurons that matter most to its tokens, tokens go to the expert that covers most of their importance, loads being
kept even, and a softmax regression on the rows, the router to be, learns to tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch.nn import functional as F

from wdmoe.export.carve import CarveShape
from wdmoe.export.training.torch_dense import Dense, attention, rms_norm, rope_angles

MASSIVE_SHARE = (
    1 / 96
)  # of a block's neurons; on any one token the largest. In a routed expert a gate off 1 distorts all
TURNS = 8
ROUTER_STEPS = 40  # of each turn
SECOND_WEIGHT = 0.35  # how much a token counts for its second expert while neurons are dealt out
MEDIAN_RATIO = 3.0  # of the first to the second gate weight, where training starts
SCALE_RIDGE = 0.3
KEPT_TOKENS = 2  # of so many, one is kept to plan by
_AT_ONCE = 2  # windows
LOGIT_ROWS = 256  # whose logits are in memory at a time


@dataclass(frozen=True, slots=True)
class Calibration:
    """What one block saw and did on calibration text; bfloat16."""

    rows: torch.Tensor  # [tokens, hidden], the inputs
    activations: torch.Tensor  # [tokens, neurons], what goes into the down projection
    gradients: torch.Tensor  # [tokens, neurons], of the loss by the activations


@dataclass(frozen=True, slots=True)
class SoftPlan:
    """A plan before training."""

    router: torch.Tensor  # [experts, hidden]
    shared: torch.Tensor  # [neurons]: 1 for the neurons of the shared expert, else 0
    scales: torch.Tensor  # [experts, neurons]: factor on a neuron's output in each expert, 0 where it is not in it

    @staticmethod
    def empty(shape: CarveShape, hidden: int, neurons: int) -> SoftPlan:
        """Return the place for a plan that will be read from a file."""
        return SoftPlan(torch.zeros(shape.experts, hidden), torch.zeros(neurons), torch.zeros(shape.experts, neurons))


@final
class Calibrations:
    """The calibrations of all blocks, on the disk: they are larger than the model."""

    def __init__(self, folder: Path, blocks: int) -> None:
        """Keep files in a folder; what is there already under their names is removed."""
        self._folder, self._blocks = folder, blocks
        for block in range(blocks):
            self._remove(block)

    def add(self, block: int, part: Calibration) -> None:
        """Append what a block saw of some more text."""
        for field in fields(Calibration):
            values = getattr(part, field.name).contiguous().view(torch.int16).cpu().numpy()
            with self._path(block, field.name).open("ab") as file:
                values.tofile(file)

    def take(self, block: int, hidden: int, neurons: int) -> Calibration:
        """Read what a block saw, and remove it from the disk."""

        def read(name: str, width: int) -> torch.Tensor:
            values = np.fromfile(self._path(block, name), np.int16).reshape(-1, width)
            return torch.from_numpy(values).view(torch.bfloat16)

        found = Calibration(read("rows", hidden), read("activations", neurons), read("gradients", neurons))
        self._remove(block)
        return found

    def _path(self, block: int, name: str) -> Path:
        return self._folder / f"calibration-{block:05d}-{name}.bin"

    def _remove(self, block: int) -> None:
        for field in fields(Calibration):
            self._path(block, field.name).unlink(missing_ok=True)


def calibration_bytes(windows: int, tokens: int, blocks: int, hidden: int, neurons: int) -> int:
    """Return what `Calibrations` take."""
    return windows * tokens // KEPT_TOKENS * (hidden + 2 * neurons) * 2 * blocks


def calibrate(
    model: Dense, windows: torch.Tensor, kept: Calibrations, on_windows: Callable[[int], None] = lambda _done: None
) -> None:
    """Run the model over windows and keep what each block saw of every second token."""
    done = 0
    for batch in windows.split(_AT_ONCE):
        rows = F.embedding(batch, model.embedding).float().requires_grad_(True)
        cos, sin = rope_angles(model, batch.shape[1])
        seen = []
        for block in model.blocks:
            qkv = F.linear(rms_norm(rows, block.input_norm, model.eps, model.dtype), block.qkv, block.qkv_bias)
            rows = rows + F.linear(attention(qkv, cos, sin, model.heads, model.kv_heads), block.o).float()
            inputs = rms_norm(rows, block.ffn_norm, model.eps, model.dtype)
            gate, up = F.linear(inputs, block.gate_up).chunk(2, -1)
            activations = F.silu(gate) * up
            activations.retain_grad()
            seen.append((inputs, activations))
            rows = rows + F.linear(activations, block.down).float()
        last = rms_norm(rows, model.norm, model.eps, model.dtype)[:, :-1].flatten(0, 1)
        last.backward(_own_loss_gradient(last.detach(), model.head))
        for number, (inputs, activations) in enumerate(seen):
            tensors = (inputs, activations, activations.grad)
            kept.add(
                number, Calibration(*(tensor.detach().flatten(0, 1)[::KEPT_TOKENS].bfloat16() for tensor in tensors))
            )
        done += len(batch)
        on_windows(done)


def _own_loss_gradient(rows: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Return the gradient by rows [tokens, hidden] of the summed loss of tokens drawn from the model itself."""
    gradients = []
    with torch.no_grad():
        for part in rows.split(LOGIT_ROWS):
            odds = F.linear(part, head).float().softmax(-1)
            drawn = odds.multinomial(1)
            odds.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=odds.dtype))
            gradients.append(odds.to(head.dtype) @ head)
    return torch.cat(gradients)


def plan_softly(seen: Calibration, down: torch.Tensor, shape: CarveShape, generator: torch.Generator) -> SoftPlan:
    """Decide how to carve one block with this down projection [hidden, neurons]; all on the CPU."""
    rows, activations, gradients = seen.rows.float(), seen.activations.float(), seen.gradients.float().square()
    tokens, neurons = activations.shape
    limit = torch.quantile(gradients.flatten()[:: _quantile_step(gradients.numel())], 0.999)
    importance = activations.square() * gradients.clamp(max=limit).mean(0)
    importance = importance / importance.sum(1, keepdim=True).clamp(min=1e-30)
    rank = importance.mean(0)
    massive = min(round(neurons * MASSIVE_SHARE), shape.shared)
    rank[(activations.abs() * down.float().norm(dim=0)).amax(0).topk(massive).indices] = math.inf
    is_shared = torch.zeros(neurons, dtype=torch.bool)
    is_shared[rank.topk(shape.shared).indices] = True
    rest = (~is_shared).nonzero()[:, 0]
    routed = importance[:, rest]

    size = rows.square().mean().sqrt()
    rows = rows / size
    weights = F.one_hot(_first_clusters(routed, shape.experts, generator), shape.experts).float()
    router = torch.zeros(shape.experts, rows.shape[1])
    for _ in range(TURNS):
        members = _members(weights, routed, shape)
        assigned = _evenly(routed @ members.T)
        router = _fit(router, rows, F.one_hot(assigned, shape.experts).float())
        best = (rows @ router.T).topk(2, -1).indices
        parts = torch.tensor([1 - SECOND_WEIGHT, SECOND_WEIGHT]).expand(tokens, 2)
        weights = torch.zeros(tokens, shape.experts).scatter(1, best, parts)
    members = _members(weights, routed, shape)
    values, best = (rows @ router.T).topk(shape.experts_per_token, -1)
    spread = (values[:, 0] - values[:, -1]).median().item()
    sharpness = math.log(MEDIAN_RATIO) / max(spread, 1e-6)
    weights = torch.zeros(tokens, shape.experts).scatter(1, best, (values * sharpness).softmax(-1))
    scales = torch.zeros(shape.experts, neurons)
    scales[:, rest] = _scales(weights, routed, members)
    return SoftPlan(router * (sharpness / size), is_shared.float(), scales)


def _quantile_step(count: int) -> int:
    """Return a step that leaves enough elements for a quantile, and no more than torch takes (16 million)."""
    return max(1, min(997, count // 10_000), count // 10_000_000)


def _members(weights: torch.Tensor, routed: torch.Tensor, shape: CarveShape) -> torch.Tensor:
    """Give each expert the neurons that matter most to its tokens: ones and zeros, [experts, routed neurons]."""
    most = (weights.T @ routed).topk(shape.expert_neurons, 1).indices
    return torch.zeros(shape.experts, routed.shape[1]).scatter(1, most, 1.0)


def _first_clusters(routed: torch.Tensor, clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Cluster tokens by spherical k-means in the leading directions of their importance."""
    features = routed.sqrt()
    features = features - features.mean(0)
    left, values, _ = torch.svd_lowrank(features, q=min(24, *features.shape))
    features = F.normalize(left * values, dim=1)
    centres = features[torch.randperm(len(features), generator=generator)[:clusters]]
    assigned = _evenly(features @ centres.T)
    for _ in range(15):
        centres = F.normalize(torch.stack([features[assigned == one].sum(0) for one in range(clusters)]), dim=1)
        assigned = _evenly(features @ centres.T)
    return assigned


def _evenly(score: torch.Tensor) -> torch.Tensor:
    """Assign each token [tokens, experts] to the expert of the best score less a price that rises with its load."""
    tokens, experts = score.shape
    price, step = torch.zeros(experts), score.std() * 0.5
    for turn in range(60):
        load = torch.bincount((score - price).argmax(1), minlength=experts) / tokens * experts
        price = price + step * (load - 1).clamp(-1, 1) * 0.93**turn
    return (score - price).argmax(1)


def _fit(router: torch.Tensor, rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the router after some steps of softmax regression."""
    router = router.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([router], lr=0.02)
    for step in range(ROUTER_STEPS):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / ROUTER_STEPS)
        loss = -(wanted * (rows @ router.T).log_softmax(-1)).sum(-1).mean() + 3e-4 * router.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return router.detach()


def _scales(weights: torch.Tensor, routed: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Fit, neuron by neuron, factors in the experts it is in, so that it comes out once in total: ridge to 1.2."""
    experts, neurons = members.shape
    within = members.T.bool()  # [neurons, experts]
    pairs = (weights[:, :, None] * weights[:, None]).flatten(1)
    # What is no member has nothing to do with the others, and comes out as 0.
    gram = (routed.T @ pairs).view(neurons, experts, experts) * (within[:, :, None] & within[:, None])
    wanted = (routed.T @ weights) * within
    count = within.sum(1).clamp(min=1)
    ridge = SCALE_RIDGE * gram.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) / count[:, None] + 1e-12
    gram += torch.diag_embed(torch.where(within, ridge, torch.ones(())))
    solved = torch.linalg.solve(gram, wanted + 1.2 * ridge * within)
    return (solved.clamp(0.3, 2.5) * within).T.contiguous()
