"""Carves the dense feed-forward blocks of a Llama-family model into Mixture-of-Experts blocks, in numpy.

The most often needed neurons become a shared expert, the rest goes into routed experts. `plan_block` decides from
calibration rows by who fires together, `carve_block` cuts the weights by a plan. The result has the layout of a
Qwen2-MoE block. By a plan of `plan_block`, with every expert chosen and equal gate weights, it is the dense block; a
plan made otherwise may put a neuron into several experts, or into none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.export.low_rank import LowRank

FloatArray = npt.NDArray[np.float32]
IndexArray = npt.NDArray[np.int64]

# A neuron counts for a token if it is among this share of the token's neurons with the largest contributions.
_STRONG_SHARE = 1 / 8
# This share of the neurons, those with the largest contribution to any single token, is shared whatever their rank.
# A few neurons give the first token of a text an output up to 3,000 times that of other tokens: on too few tokens to
# rank high, but in a routed expert a gate weight a little off 1 distorts all that follows.
_MASSIVE_SHARE = 1 / 96
# Standard deviation over the experts of the median token's gate logits. Less makes ties that rounding decides;
# more lets the loudest expert speak for all chosen ones, where the dense block gave the plain sum of all.
_LOGIT_SPREAD = 0.18
# A token whose log norms spread over the experts more than this times the median token's is fitted as if by that much.
_SPREAD_LIMIT = 2.0


@dataclass(frozen=True, slots=True)
class CarveShape:
    """How the neurons of one feed-forward block are dealt out."""

    shared: int  # neurons of the shared expert
    experts: int  # routed experts
    expert_neurons: int  # neurons of each routed expert
    experts_per_token: int

    def __post_init__(self) -> None:
        if min(self.shared, self.experts, self.expert_neurons, self.experts_per_token) < 1:
            raise ValueError(f"{self} has a size below 1; a Qwen2-MoE block has a shared and routed experts")
        if self.experts_per_token > self.experts:
            raise ValueError(f"{self} chooses more experts per token than there are")

    @property
    def neurons(self) -> int:
        """Places for neurons in all experts together; as many as the dense block has unless experts overlap."""
        return self.shared + self.experts * self.expert_neurons


@dataclass(frozen=True, slots=True)
class FfnWeights:
    """The three matrices of a gated feed-forward block: down(silu(gate x) * up x)."""

    gate: FloatArray  # [neurons, hidden]
    up: FloatArray  # [neurons, hidden]
    down: FloatArray  # [hidden, neurons]

    def activations(self, rows: FloatArray) -> FloatArray:
        """Return what each neuron hands to `down`, [tokens, neurons], for rows [tokens, hidden]."""
        gate = rows @ self.gate.T
        # silu(gate) = gate * sigmoid(gate), with the sigmoid as a tanh so that nothing overflows.
        result: FloatArray = gate * (0.5 + 0.5 * np.tanh(0.5 * gate)) * (rows @ self.up.T)
        return result


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """All that carving adds to the dense weights of one block."""

    permutation: IndexArray  # [neurons]: dense neuron at each place; shared ones first, then expert by expert
    router: FloatArray  # [experts, hidden]
    scales: FloatArray  # [neurons], in permuted order: factor on each neuron's output
    deltas: tuple[LowRank, ...] = ()  # added to the down projection of each routed expert; none if empty


def carve_block(weights: FfnWeights, plan: BlockPlan, shape: CarveShape) -> dict[str, FloatArray]:
    """Return the tensors of a Qwen2-MoE block, named as published below `model.layers.N.mlp.`.

    The gate weights of the chosen k experts sum to 1 where the dense block sums with weight 1 each, so k goes into
    their down projections. The shared expert's own gate is zero, a sigmoid of 0.5, so 2 goes into its.

    Raises:
        ValueError: the plan does not fit the weights.
    """
    neurons, hidden = weights.gate.shape
    if plan.permutation.shape != (shape.neurons,):
        raise ValueError(f"the plan names {len(plan.permutation)} neurons; {shape} deals out {shape.neurons}")
    if plan.permutation.min() < 0 or plan.permutation.max() >= neurons:
        raise ValueError(f"the plan names a neuron outside of the block's {neurons}")
    if plan.router.shape != (shape.experts, hidden) or plan.scales.shape != (shape.neurons,):
        raise ValueError(
            f"the plan has router {plan.router.shape} and scales {plan.scales.shape}; "
            f"expected {(shape.experts, hidden)} and {(shape.neurons,)}"
        )
    if len(plan.deltas) not in {0, shape.experts}:
        raise ValueError(f"the plan changes {len(plan.deltas)} of {shape.experts} experts; expected all or none")

    gate, up = weights.gate[plan.permutation], weights.up[plan.permutation]
    down = weights.down[:, plan.permutation] * plan.scales
    tensors = {"gate.weight": plan.router, "shared_expert_gate.weight": np.zeros((1, hidden), np.float32)}

    def cut(name: str, places: slice, factor: float) -> None:
        tensors[f"{name}.gate_proj.weight"] = gate[places]
        tensors[f"{name}.up_proj.weight"] = up[places]
        # A copy: a slice of columns is not contiguous, and writers of safetensors store memory as it lies.
        tensors[f"{name}.down_proj.weight"] = np.ascontiguousarray(down[:, places] * np.float32(factor))

    cut("shared_expert", slice(0, shape.shared), 2.0)
    for expert in range(shape.experts):
        start = shape.shared + expert * shape.expert_neurons
        cut(f"experts.{expert}", slice(start, start + shape.expert_neurons), float(shape.experts_per_token))
        if plan.deltas:
            tensors[f"experts.{expert}.down_proj.weight"] += plan.deltas[expert].matrix()
    return tensors


def carved_config(dense: Mapping[str, Any], shape: CarveShape) -> dict[str, Any]:
    """Return the config.json of the Qwen2-MoE checkpoint that a dense Llama config turns into."""
    return {
        **dense,
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.experts_per_token,
        "moe_intermediate_size": shape.expert_neurons,
        "shared_expert_intermediate_size": shape.shared,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": True,
        "use_sliding_window": False,
    }


def plan_block(weights: FfnWeights, rows: FloatArray, shape: CarveShape, rng: np.random.Generator) -> BlockPlan:
    """Decide how to carve one block from calibration rows [tokens, hidden], the inputs it saw; scales start at 1.

    Raises:
        ValueError: the shape does not deal out each of the block's neurons once.
    """
    if weights.gate.shape[0] != shape.neurons:
        raise ValueError(f"the block has {weights.gate.shape[0]} neurons; {shape} deals out {shape.neurons}")
    activations = weights.activations(rows)
    contributions = np.abs(activations) * np.linalg.norm(weights.down, axis=0)
    ranked = rank_neurons(contributions)
    shared, routed = np.sort(ranked[: shape.shared]), np.sort(ranked[shape.shared :])
    clusters = cluster_neurons(contributions[:, routed], shape.experts, rng)
    groups = [routed[clusters == expert] for expert in range(shape.experts)]
    norms = np.stack([_output_norms(activations, weights.down, group) for group in groups], axis=1)
    return BlockPlan(
        permutation=np.concatenate([shared, *groups]),
        router=fit_router(rows, norms),
        scales=np.ones(shape.neurons, np.float32),
    )


def rank_neurons(contributions: FloatArray) -> IndexArray:
    """Return the neurons of contributions [tokens, neurons]: the massive few first, then by how often they are strong.

    Massive are those with the largest contribution to any one token; strong, those among a token's largest.
    """
    strong = max(1, round(contributions.shape[1] * _STRONG_SHARE))
    winners = np.argpartition(-contributions, strong - 1, axis=1)[:, :strong]
    counts = np.bincount(winners.ravel(), minlength=contributions.shape[1])
    massive = np.zeros(contributions.shape[1], bool)
    massive[np.argsort(-contributions.max(axis=0))[: round(len(massive) * _MASSIVE_SHARE)]] = True
    # Ties go to the larger mean, so that the order does not hang on the sort.
    return np.lexsort((-contributions.mean(axis=0), -counts, ~massive)).astype(np.int64)


def cluster_neurons(contributions: FloatArray, clusters: int, rng: np.random.Generator, rounds: int = 30) -> IndexArray:
    """Deal neurons into clusters of one size by co-activation: balanced spherical k-means.

    Args:
        contributions: [tokens, neurons]; neurons that are strong on the same tokens go together.
        clusters: number of clusters; must divide the number of neurons.
        rng: picks the neurons that the clusters start from.
        rounds: at most this many, fewer once nothing moves.

    Returns:
        The cluster of each neuron, [neurons].
    """
    neurons = contributions.shape[1]
    if neurons % clusters:
        raise ValueError(f"{neurons} neurons do not make {clusters} clusters of one size")
    features = (contributions - contributions.mean(axis=0)).T
    features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    centres = features[_spread_start(features, clusters, rng)]
    assigned = np.full(neurons, -1, np.int64)
    for _ in range(rounds):
        previous, assigned = assigned, _assign_evenly(features @ centres.T)
        if np.array_equal(previous, assigned):
            break
        centres = np.stack([features[assigned == cluster].sum(axis=0) for cluster in range(clusters)])
        centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    return assigned


def fit_router(rows: FloatArray, norms: FloatArray, ridge: float = 1e-2) -> FloatArray:
    """Return a router [experts, hidden] whose logits rank the experts as the output norms [tokens, experts] do.

    Ridge regression on the log norms, less each token's mean, as the softmax does not see it; the penalty is `ridge`
    times the mean square of a row's elements, per token. The logits of all blocks are brought to one spread.
    """
    targets = np.log(norms + 1e-6)
    targets -= targets.mean(axis=1, keepdims=True)
    spread = targets.std(axis=1, keepdims=True)
    targets *= np.minimum(1.0, _SPREAD_LIMIT * np.median(spread) / np.maximum(spread, 1e-12))
    gram = (rows.T @ rows).astype(np.float64)
    gram += np.eye(len(gram)) * (ridge * np.trace(gram) / len(gram))
    router = np.linalg.solve(gram, (rows.T @ targets).astype(np.float64)).T
    router *= _LOGIT_SPREAD / max(float(np.median((rows @ router.T).std(axis=1))), 1e-12)
    return np.ascontiguousarray(router, dtype=np.float32)


def _output_norms(activations: FloatArray, down: FloatArray, group: IndexArray) -> FloatArray:
    norms: FloatArray = np.linalg.norm(activations[:, group] @ down[:, group].T, axis=1)
    return norms


def _spread_start(features: FloatArray, clusters: int, rng: np.random.Generator) -> IndexArray:
    """Pick starting neurons far apart, as k-means++ does."""
    chosen = [int(rng.integers(len(features)))]
    nearest = features @ features[chosen[0]]
    for _ in range(clusters - 1):
        odds = np.maximum(1.0 - nearest, 0.0).astype(np.float64) ** 2
        odds[chosen] = 0.0
        odds = odds / odds.sum() if odds.sum() > 0 else np.full(len(odds), 1 / len(odds))
        chosen.append(int(rng.choice(len(features), p=odds)))
        nearest = np.maximum(nearest, features @ features[chosen[-1]])
    return np.asarray(chosen, np.int64)


def _assign_evenly(similarity: FloatArray) -> IndexArray:
    """Give each neuron a cluster, all of one size: best pairs first, then swaps while a swap of two helps."""
    neurons, clusters = similarity.shape
    room = [neurons // clusters] * clusters
    assigned = np.full(neurons, -1, np.int64)
    left = neurons
    for pair in np.argsort(-similarity, axis=None, kind="stable"):
        neuron, cluster = divmod(int(pair), clusters)
        if assigned[neuron] < 0 and room[cluster]:
            assigned[neuron] = cluster
            room[cluster] -= 1
            left -= 1
            if not left:
                break
    # gain[a, c]: what it brings if neuron a moves to cluster c. The best swap of two clusters is that of their two
    # neurons that gain most, so only the best of each cluster need be known.
    gain = similarity - np.take_along_axis(similarity, assigned[:, None], axis=1)
    best = np.empty((clusters, clusters), np.int64)  # [of, to]: the neuron that gains most
    changed: Sequence[int] = range(clusters)
    for _ in range(neurons):
        for cluster in changed:
            members = np.flatnonzero(assigned == cluster)
            best[cluster] = members[gain[members].argmax(axis=0)]
        one_way = gain[best, np.arange(clusters)]
        first, second = divmod(int(np.argmax(one_way + one_way.T)), clusters)
        if one_way[first, second] + one_way[second, first] <= 1e-7:
            break
        swapped = [best[first, second], best[second, first]]
        assigned[swapped] = second, first
        gain[swapped] = similarity[swapped] - np.take_along_axis(
            similarity[swapped], assigned[swapped][:, None], axis=1
        )
        changed = (first, second)
    return assigned
