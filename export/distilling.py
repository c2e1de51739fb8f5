"""Fits a carved block to the dense block that it was cut from, by least squares on calibration rows, in numpy.

The router chooses and weighs experts, so a neuron no longer reaches every token. What is left for the down projections
is a linear problem: with A [tokens, neurons] what the neurons hand on, gates included, and E [tokens, d_model] what the
dense block gives beyond A down^T, the best correction minimises |A X - E|^2 + r |X|^2. Gate, up and router stay.
"""

from __future__ import annotations

import numpy as np

from wdmoe.export.carve import BlockPlan, CarveShape, FfnWeights, FloatArray
from wdmoe.export.dense_forward import pieces_of

# Ridge, times the mean of A^T A's diagonal. SmolLM2-135M, 768 shared neurons, 8 experts, top-4, fitted on 14 k tokens: in
# the six blocks compared, 0.1 left a smaller error on held-out rows than 0.01 (block 10: 0.311 and 0.319, as cut 0.346).
# One scale for each neuron in place of whole columns, by the same least squares: 0.343.
_RIDGE = 0.1
_TINY = 1e-12


def gate_factors(rows: FloatArray, router: FloatArray, shape: CarveShape) -> FloatArray:
    """Return what each neuron is multiplied by, [tokens, neurons] in the plan's order, for rows [tokens, d_model].

    1 for the shared ones, k times the gate weight for those of the chosen experts, 0 for the rest.
    """
    logits = rows @ router.T
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, : shape.experts_per_token]
    best = np.take_along_axis(logits, chosen, axis=1)
    gates = np.exp(best - best[:, :1])
    gates *= shape.experts_per_token / gates.sum(axis=1, keepdims=True)
    by_expert = np.zeros_like(logits)
    np.put_along_axis(by_expert, chosen, gates, axis=1)
    shared = np.ones((len(rows), shape.shared), np.float32)
    return np.concatenate([shared, np.repeat(by_expert, shape.expert_neurons, axis=1)], axis=1)


def fit_down(
    dense: FfnWeights, plan: BlockPlan, rows: FloatArray, residual: FloatArray, shape: CarveShape
) -> FloatArray:
    """Return the down projection with which the carved block comes nearest to the dense one.

    Args:
        dense: the dense block.
        plan: how it is carved.
        rows: inputs of the block, [tokens, d_model].
        residual: what its output is added to, [tokens, d_model]. The error of a token counts by its size beside the
            sum: that is what the next norm sees of it.
        shape: of the block.

    Returns:
        [d_model, neurons], neurons in the plan's order, its scales included.
    """
    down = carved_down(dense, plan)
    neurons = shape.neurons
    gram = np.zeros((neurons, neurons), np.float32)
    wanted = np.zeros((neurons, rows.shape[1]), np.float32)
    for piece in pieces_of(len(rows), neurons):
        exact, gated = _both(dense, plan, rows[piece], shape)
        weight = 1 / np.maximum(np.linalg.norm(residual[piece] + exact, axis=1, keepdims=True), np.float32(_TINY))
        missing = (exact - gated @ down.T) * weight
        gated *= weight
        gram += gated.T @ gated
        wanted += gated.T @ missing
    gram[np.diag_indices(neurons)] += np.float32(_RIDGE * np.trace(gram) / neurons + _TINY)
    correction: FloatArray = np.linalg.solve(gram, wanted)
    return down + correction.T


def relative_error(dense: FfnWeights, plan: BlockPlan, down: FloatArray, rows: FloatArray, shape: CarveShape) -> float:
    """Return how far a carved block is from the dense one: |error| / |output| of each token, root mean square.

    Args:
        dense: the dense block.
        plan: how it is carved.
        down: down projection in the plan's order, its scales included.
        rows: inputs of the block, [tokens, d_model].
        shape: of the block.
    """
    total = 0.0
    for piece in pieces_of(len(rows), shape.neurons):
        exact, gated = _both(dense, plan, rows[piece], shape)
        error = ((exact - gated @ down.T) ** 2).sum(axis=1)
        total += float((error / np.maximum((exact**2).sum(axis=1), _TINY)).sum())
    return float(np.sqrt(total / len(rows)))


def carved_down(dense: FfnWeights, plan: BlockPlan) -> FloatArray:
    """Return the down projection [d_model, neurons] as the plan has it."""
    result: FloatArray = dense.down[:, plan.permutation] * plan.scales
    return result


def _both(dense: FfnWeights, plan: BlockPlan, rows: FloatArray, shape: CarveShape) -> tuple[FloatArray, FloatArray]:
    """Return what the dense block answers, and what the carved neurons hand on, in the plan's order."""
    activations = dense.activations(rows)
    gated = activations[:, plan.permutation] * gate_factors(rows, plan.router, shape)
    return activations @ dense.down.T, gated
