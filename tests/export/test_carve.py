"""Carving on tiny synthetic blocks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from wdmoe.export.carve import (
    BlockPlan,
    CarveShape,
    FfnWeights,
    FloatArray,
    carve_block,
    carved_config,
    cluster_neurons,
    fit_router,
    plan_block,
    rank_neurons,
)
from wdmoe.export.low_rank import LowRank

HIDDEN = 12
SHAPE = CarveShape(shared=16, experts=4, expert_neurons=8, experts_per_token=2)


def normal(rng: np.random.Generator, *shape: int) -> FloatArray:
    return rng.standard_normal(shape).astype(np.float32)


def tiny_block(seed: int = 0) -> tuple[FfnWeights, FloatArray, np.random.Generator]:
    rng = np.random.default_rng(seed)
    neurons = SHAPE.neurons
    weights = FfnWeights(normal(rng, neurons, HIDDEN), normal(rng, neurons, HIDDEN), normal(rng, HIDDEN, neurons))
    return weights, normal(rng, 64, HIDDEN), rng


def run_dense(weights: FfnWeights, rows: FloatArray) -> FloatArray:
    gate = rows @ weights.gate.T
    result: FloatArray = np.asarray((gate / (1 + np.exp(-gate)) * (rows @ weights.up.T)) @ weights.down.T)
    return result


def run_carved(tensors: dict[str, FloatArray], rows: FloatArray, shape: CarveShape) -> FloatArray:
    """The block of Qwen2-MoE, with `norm_topk_prob`, token by token."""

    def ffn(name: str, row: FloatArray) -> FloatArray:
        parts = (tensors[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        result: FloatArray = run_dense(FfnWeights(*parts), row[None])[0]
        return result

    out = np.zeros_like(rows)
    for index, row in enumerate(rows):
        logits = tensors["gate.weight"] @ row
        chosen = np.argsort(-logits, kind="stable")[: shape.experts_per_token]
        weights = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
        shared_gate = 1 / (1 + np.exp(-(tensors["shared_expert_gate.weight"] @ row)[0]))
        out[index] = shared_gate * ffn("shared_expert", row)
        for expert, weight in zip(chosen, weights, strict=True):
            out[index] += weight * ffn(f"experts.{expert}", row)
    return out


def test_all_experts_with_equal_weights_are_the_dense_block() -> None:
    weights, rows, rng = tiny_block()
    shape = replace(SHAPE, experts_per_token=SHAPE.experts)
    plan = plan_block(weights, rows, shape, rng)
    plan = replace(plan, router=np.zeros_like(plan.router))
    carved = carve_block(weights, plan, shape)
    np.testing.assert_allclose(run_carved(carved, rows, shape), run_dense(weights, rows), rtol=1e-4, atol=1e-3)


def test_scales_multiply_the_output_of_their_neurons() -> None:
    weights, rows, rng = tiny_block()
    shape = replace(SHAPE, experts_per_token=SHAPE.experts)
    plan = plan_block(weights, rows, shape, rng)
    scales = rng.uniform(0.5, 2.0, SHAPE.neurons).astype(np.float32)
    carved = carve_block(weights, replace(plan, router=np.zeros_like(plan.router), scales=scales), shape)
    down = weights.down.copy()
    down[:, plan.permutation] *= scales
    expected = run_dense(replace(weights, down=down), rows)
    np.testing.assert_allclose(run_carved(carved, rows, shape), expected, rtol=1e-4, atol=1e-3)


def test_a_plan_is_a_permutation_and_the_same_for_the_same_seed() -> None:
    weights, rows, _ = tiny_block()
    plans = [plan_block(weights, rows, SHAPE, np.random.default_rng(7)) for _ in range(2)]
    assert sorted(plans[0].permutation) == list(range(SHAPE.neurons))
    assert plans[0].router.shape == (SHAPE.experts, HIDDEN)
    np.testing.assert_array_equal(plans[0].permutation, plans[1].permutation)
    np.testing.assert_array_equal(plans[0].router, plans[1].router)


def test_neurons_that_are_often_strong_come_first() -> None:
    contributions = np.ones((40, 16), np.float32)
    contributions[:, 11] = 9.0  # strong on every token
    contributions[:30, 3] = 8.0  # on most
    contributions[30:, 5] = 8.0  # on a few
    assert list(rank_neurons(contributions)[:3]) == [11, 3, 5]


def test_a_neuron_that_is_massive_on_one_token_comes_first() -> None:
    contributions = np.ones((40, 96), np.float32)
    contributions[:, 11] = 9.0
    contributions[0, 70] = 1000.0
    assert list(rank_neurons(contributions)[:2]) == [70, 11]


def test_clusters_are_of_one_size_and_join_what_fires_together() -> None:
    rng = np.random.default_rng(0)
    topic = np.repeat(np.arange(4), 6)
    fires = np.eye(4, dtype=np.float32)[rng.integers(0, 4, 400)]
    contributions = (fires[:, topic] + 0.1 * rng.random((400, 24))).astype(np.float32)
    clusters = cluster_neurons(contributions, 4, rng)
    assert list(np.bincount(clusters)) == [6, 6, 6, 6]
    assert all(len(set(clusters[topic == t])) == 1 for t in range(4))


def test_clusters_are_of_one_size_on_noise() -> None:
    rng = np.random.default_rng(3)
    assert list(np.bincount(cluster_neurons(rng.random((50, 40), np.float32), 5, rng))) == [8] * 5


def test_the_router_prefers_the_expert_with_the_larger_output() -> None:
    rng = np.random.default_rng(1)
    rows = normal(rng, 500, HIDDEN)
    truth = normal(rng, 4, HIDDEN)
    router = fit_router(rows, np.exp(rows @ truth.T))
    assert np.mean((rows @ router.T).argmax(axis=1) == (rows @ truth.T).argmax(axis=1)) > 0.95


@pytest.mark.parametrize("loudness", [0.1, 5.0])
def test_gate_logits_have_one_spread_however_the_norms_differ(loudness: float) -> None:
    rng = np.random.default_rng(2)
    rows = normal(rng, 500, HIDDEN)
    router = fit_router(rows, np.exp(loudness * rows @ normal(rng, 4, HIDDEN).T))
    assert np.median((rows @ router.T).std(axis=1)) == pytest.approx(0.18, rel=1e-3)


def test_one_extreme_token_hardly_turns_the_router() -> None:
    rng = np.random.default_rng(4)
    rows = normal(rng, 500, HIDDEN)
    norms = np.exp(rows @ normal(rng, 4, HIDDEN).T)
    usual = fit_router(rows, norms)
    norms[0] = [1e9, 1e-5, 1e9, 1e-5]
    assert np.linalg.norm(fit_router(rows, norms) - usual) < 0.05 * np.linalg.norm(usual)


def test_what_a_plan_does_not_fit_is_refused() -> None:
    weights, rows, rng = tiny_block()
    plan = plan_block(weights, rows, SHAPE, rng)
    outside = plan.permutation + 1
    with pytest.raises(ValueError, match="outside of the block's 48"):
        carve_block(weights, replace(plan, permutation=outside), SHAPE)
    with pytest.raises(ValueError, match="deals out 56"):
        carve_block(weights, plan, replace(SHAPE, shared=24))
    with pytest.raises(ValueError, match="deals out 56"):
        plan_block(weights, rows, replace(SHAPE, shared=24), rng)
    with pytest.raises(ValueError, match="router"):
        carve_block(weights, BlockPlan(plan.permutation, plan.router[:2], plan.scales), SHAPE)
    with pytest.raises(ValueError, match="changes 1 of 4 experts"):
        carve_block(weights, replace(plan, deltas=(LowRank(normal(rng, 1, 8), normal(rng, HIDDEN, 1)),)), SHAPE)
    with pytest.raises(ValueError, match="more experts per token"):
        CarveShape(shared=1, experts=2, expert_neurons=1, experts_per_token=3)


def test_a_neuron_in_several_experts_gets_their_gate_weights_together() -> None:
    weights, rows, rng = tiny_block()
    # Every routed expert holds the same 32 neurons, so that the gate weights of the chosen ones sum to 1 for each.
    shape = CarveShape(shared=16, experts=4, expert_neurons=32, experts_per_token=2)
    order = np.concatenate([np.arange(16), *[rng.permutation(np.arange(16, 48)) for _ in range(4)]])
    scales = np.ones(shape.neurons, np.float32)
    scales[16:] /= shape.experts_per_token
    carved = carve_block(weights, BlockPlan(order, normal(rng, 4, HIDDEN), scales), shape)
    np.testing.assert_allclose(run_carved(carved, rows, shape), run_dense(weights, rows), rtol=1e-4, atol=1e-3)


def test_a_delta_is_added_to_the_down_projection_of_its_expert_alone() -> None:
    weights, rows, rng = tiny_block()
    plan = plan_block(weights, rows, SHAPE, rng)
    deltas = tuple(LowRank(normal(rng, 3, 8), normal(rng, HIDDEN, 3)) for _ in range(SHAPE.experts))
    plain, moved = (carve_block(weights, one, SHAPE) for one in (plan, replace(plan, deltas=deltas)))
    for name, values in plain.items():
        expert = name.split(".")[1] if name.startswith("experts.") and "down" in name else None
        change = deltas[int(expert)].out @ deltas[int(expert)].into if expert else 0
        np.testing.assert_allclose(moved[name], values + change, rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_config_names_a_qwen2_moe_of_the_shape() -> None:
    config = carved_config({"model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 48}, SHAPE)
    assert config["model_type"] == "qwen2_moe"
    assert (config["hidden_size"], config["num_experts"], config["num_experts_per_tok"]) == (HIDDEN, 4, 2)
    assert (config["moe_intermediate_size"], config["shared_expert_intermediate_size"]) == (8, 16)
