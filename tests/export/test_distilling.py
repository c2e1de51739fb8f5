"""The least-squares fit of a carved block."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from wdmoe.export.carve import BlockPlan, CarveShape, FfnWeights, FloatArray, carve_block, plan_block
from wdmoe.export.distilling import carved_down, fit_down, gate_factors, relative_error

HIDDEN = 12
SHAPE = CarveShape(shared=16, experts=4, expert_neurons=8, experts_per_token=2)


def normal(rng: np.random.Generator, *shape: int) -> FloatArray:
    return rng.standard_normal(shape).astype(np.float32)


def block(seed: int = 0) -> tuple[FfnWeights, BlockPlan, FloatArray]:
    rng = np.random.default_rng(seed)
    neurons = SHAPE.neurons
    dense = FfnWeights(normal(rng, neurons, HIDDEN), normal(rng, neurons, HIDDEN), normal(rng, HIDDEN, neurons))
    rows = normal(rng, 3000, HIDDEN)
    return dense, plan_block(dense, rows[:500], SHAPE, rng), rows


def test_gate_factors_are_the_shares_of_the_chosen_experts_times_k() -> None:
    _, plan, rows = block()
    factors = gate_factors(rows[:50], plan.router, SHAPE)
    logits = rows[:50] @ plan.router.T
    assert (factors[:, : SHAPE.shared] == 1).all()
    by_expert = factors[:, SHAPE.shared :].reshape(50, SHAPE.experts, SHAPE.expert_neurons)
    assert (by_expert == by_expert[..., :1]).all()
    for row, got in zip(logits, by_expert[..., 0], strict=True):
        chosen = np.argsort(-row)[:2]
        expected = np.zeros(SHAPE.experts)
        expected[chosen] = 2 * np.exp(row[chosen]) / np.exp(row[chosen]).sum()
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_the_fit_generalises_to_rows_that_it_has_not_seen() -> None:
    dense, plan, rows = block()
    fitted = fit_down(dense, plan, rows[:2500], np.zeros_like(rows[:2500]), SHAPE)
    before = relative_error(dense, plan, carved_down(dense, plan), rows[2500:], SHAPE)
    after = relative_error(dense, plan, fitted, rows[2500:], SHAPE)
    assert after < 0.95 * before


def test_what_carves_without_error_is_left_alone() -> None:
    dense, plan, rows = block()
    shape = replace(SHAPE, experts_per_token=SHAPE.experts)
    plan = replace(plan, router=np.zeros_like(plan.router))
    down = carved_down(dense, plan)
    assert relative_error(dense, plan, down, rows, shape) < 1e-5
    np.testing.assert_allclose(fit_down(dense, plan, rows, rows, shape), down, atol=1e-5)


def test_the_relative_error_is_that_of_the_tensors_that_carving_writes() -> None:
    dense, plan, rows = block()
    rows = rows[:40]
    tensors = carve_block(dense, plan, SHAPE)
    factors = gate_factors(rows, plan.router, SHAPE)[:, SHAPE.shared :: SHAPE.expert_neurons]

    def answer(name: str) -> FloatArray:
        parts = (tensors[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        weights = FfnWeights(*parts)
        result: FloatArray = weights.activations(rows) @ weights.down.T
        return result

    carved = answer("shared_expert") / 2
    for expert in range(SHAPE.experts):
        carved += answer(f"experts.{expert}") * factors[:, expert, None] / SHAPE.experts_per_token
    exact = dense.activations(rows) @ dense.down.T
    expected = np.sqrt((((carved - exact) ** 2).sum(1) / (exact**2).sum(1)).mean())
    assert relative_error(dense, plan, carved_down(dense, plan), rows, SHAPE) == pytest.approx(expected, rel=1e-4)


def test_a_token_counts_by_its_error_beside_the_stream() -> None:
    dense, plan, rows = block()
    # Two halves that pull apart: the second half's stream is so large that its errors hardly count.
    residual = np.zeros_like(rows)
    residual[1500:] = 1e4
    fitted = fit_down(dense, plan, rows, residual, SHAPE)
    alone = fit_down(dense, plan, rows[:1500], residual[:1500], SHAPE)
    np.testing.assert_allclose(fitted, alone, atol=1e-2 * np.abs(alone).max())
