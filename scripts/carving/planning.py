"""Which neurons go where: experts are sets of neurons for clusters of tokens, and may overlap.

A neuron's importance for a token is its squared activation times the mean squared gradient of the model's own
next-token loss at it (the diagonal of the Fisher information), as a share of the token's total. The shared expert takes
the neurons of the largest mean, and the few with massive activations on a first token. Then, in turns: each expert takes
the neurons that matter most to its tokens, tokens go to the expert that covers most of their importance, loads being
kept even, and a softmax regression on the rows, the router to be, learns to tell them apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from scripts.carving.dense import Dense, attention, rms_norm, rope
from wdmoe.export.carve import CarveShape

MASSIVE_NEURONS = 16  # of a block; on any one token the largest. In a routed expert a gate weight off 1 distorts all
TURNS = 8
ROUTER_STEPS = 40  # of each turn
SECOND_WEIGHT = 0.35  # how much a token counts for its second expert while neurons are dealt out
MEDIAN_RATIO = 3.0  # of the first to the second gate weight, where training starts
SCALE_RIDGE = 0.3


@dataclass(frozen=True, slots=True)
class Calibration:
    """What one block saw and did on calibration text."""

    rows: torch.Tensor  # [tokens, hidden], the inputs
    activations: torch.Tensor  # [tokens, neurons], what goes into the down projection
    gradients: torch.Tensor  # [tokens, neurons], of the loss by the activations


@dataclass(frozen=True, slots=True)
class SoftPlan:
    """A plan before training."""

    router: torch.Tensor  # [experts, hidden]
    shared: torch.Tensor  # [neurons]: 1 for the neurons of the shared expert, else 0
    scales: torch.Tensor  # [experts, neurons]: factor on a neuron's output in each expert, 0 where it is not in it


def calibrate(model: Dense, windows: torch.Tensor) -> list[Calibration]:
    """Run the model over windows and return what each block saw, every second token of it."""
    kept: list[list[Calibration]] = [[] for _ in model.blocks]
    for batch in windows.split(2):
        rows = F.embedding(batch, model.embedding).float().requires_grad_(True)
        cos, sin = rope(model, batch.shape[1])
        seen = []
        for block in model.blocks:
            qkv = F.linear(rms_norm(rows, block.input_norm, model.eps), block.qkv)
            rows = rows + F.linear(attention(qkv, cos, sin, model.heads, model.kv_heads), block.o).float()
            inputs = rms_norm(rows, block.ffn_norm, model.eps)
            gate, up = F.linear(inputs, block.gate_up).chunk(2, -1)
            activations = F.silu(gate) * up
            activations.retain_grad()
            seen.append((inputs, activations))
            rows = rows + F.linear(activations, block.down).float()
        logits = F.linear(rms_norm(rows, model.norm, model.eps)[:, :-1].flatten(0, 1), model.embedding).float()
        with torch.no_grad():
            drawn = torch.distributions.Categorical(logits=logits).sample()
        F.cross_entropy(logits, drawn, reduction="sum").backward()
        for parts, (inputs, activations) in zip(kept, seen, strict=True):
            tensors = (inputs, activations, activations.grad)
            parts.append(Calibration(*(tensor.detach().flatten(0, 1)[::2].clone() for tensor in tensors)))
    return [
        Calibration(*(torch.cat([getattr(part, name) for part in parts]) for name in Calibration.__slots__))
        for parts in kept
    ]


def plan_softly(seen: Calibration, down: torch.Tensor, shape: CarveShape, generator: torch.Generator) -> SoftPlan:
    """Decide how to carve one block with this down projection [hidden, neurons]."""
    rows, activations, gradients = seen.rows.float(), seen.activations.float(), seen.gradients.float().square()
    tokens, neurons = activations.shape
    limit = torch.quantile(gradients.flatten()[::997], 0.999)
    importance = activations.square() * gradients.clamp(max=limit).mean(0)
    importance = importance / importance.sum(1, keepdim=True).clamp(min=1e-30)
    rank = importance.mean(0)
    rank[(activations.abs() * down.float().norm(dim=0)).amax(0).topk(MASSIVE_NEURONS).indices] = math.inf
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
    sharpness = math.log(MEDIAN_RATIO) / (values[:, 0] - values[:, -1]).median().item()
    weights = torch.zeros(tokens, shape.experts).scatter(1, best, (values * sharpness).softmax(-1))
    scales = torch.zeros(shape.experts, neurons)
    scales[:, rest] = _scales(weights, routed, members)
    return SoftPlan(router * (sharpness / size), is_shared.float(), scales)


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
    scales = torch.zeros_like(members)
    for neuron in range(members.shape[1]):
        experts = members[:, neuron].nonzero()[:, 0]
        if not len(experts):
            continue
        part, counts = weights[:, experts], routed[:, neuron : neuron + 1]
        gram, wanted = (part * counts).T @ part, (part * counts).sum(0)
        ridge = SCALE_RIDGE * gram.diagonal().mean() + 1e-12
        solved = torch.linalg.solve(gram + ridge * torch.eye(len(experts)), wanted + 1.2 * ridge)
        scales[experts, neuron] = solved.clamp(0.3, 2.5)
    return scales
