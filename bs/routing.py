"""From router logits to who gets what: the model's own choice of experts, and a policy's plan for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from wdmoe.bs.airtime import Load

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
_SHORT = 32  # experts, up to which numpy finds the largest far sooner down columns than along rows


@dataclass(frozen=True, slots=True)
class Routing:
    """The model's own top-k of one block."""

    experts: Ints  # [tokens, k], descending in weight
    weights: Floats  # [tokens, k], as the model would use them


@dataclass(frozen=True, slots=True)
class Plan:
    """What a policy made of a routing."""

    keep: Bools  # [tokens, k], False: this expert is not asked for this token
    weights: Floats  # [tokens, k], what outputs are multiplied with; 0 where not kept
    theta: float | None = None  # where the policy has one: its final threshold
    stopped: str | None = None  # and why it stopped there
    experts: Ints | None = None  # [tokens, k], where the policy asks for others than the model chose
    devices: Ints | None = None  # [tokens, k], where it asks others than the owners: who is asked for each expert
    load: Load | None = None  # where the policy has counted it: what all this asks of each device

    def dropped_mass(self, routing: Routing) -> float:
        """Return the gate weight of what the model chose and the plan does not ask for."""
        lost = ~self.keep if self.experts is None else ~self.keep | (self.experts != routing.experts)
        return float(routing.weights[lost].sum())


def route(router_logits: Floats, top_k: int, normalise: bool) -> Routing:
    """Choose experts as the model does: softmax over all, the k largest, scaled to sum to one if the model says so.

    Args:
        router_logits: [tokens, n_experts].
        top_k: experts of one token.
        normalise: whether the chosen weights are scaled to sum to one.
    """
    if len(router_logits) == 1:
        return _route_row(router_logits[0], top_k, normalise)
    probabilities = softmax(router_logits)
    # A copy, and not a view of wider rows: whoever reads it does so many times.
    experts = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k].copy()
    weights = probabilities[np.arange(len(experts))[:, None], experts]  # take_along_axis takes twice as long
    if normalise:
        weights = weights / weights.sum(axis=1, keepdims=True)
    return Routing(experts, weights)


def softmax(router_logits: Floats) -> Floats:
    """Return the router's probabilities over all experts, [tokens, n_experts]."""
    short = router_logits.shape[1] <= _SHORT
    most = router_logits.T.copy().max(axis=0)[:, None] if short else router_logits.max(axis=1, keepdims=True)
    shifted = np.exp(router_logits - most)
    probabilities: Floats = shifted / shifted.sum(axis=1, keepdims=True)
    return probabilities


def _route_row(router_logits: Floats, top_k: int, normalise: bool) -> Routing:
    """Route one token, to the same bits: without a second dimension numpy takes half the time."""
    shifted = np.exp(router_logits - np.maximum.reduce(router_logits))
    probabilities = shifted / np.add.reduce(shifted)
    experts = (-probabilities).argsort(kind="stable")[:top_k]
    weights = probabilities[experts]
    if normalise:
        weights = weights / np.add.reduce(weights)
    return Routing(experts[None], weights[None])


def small_ints(keys: Ints) -> npt.NDArray[np.integer]:
    """Return keys, none of them negative, in the type that sorts fastest: numpy sorts 16 bits by radix."""
    return keys.astype(np.int16) if len(keys) and int(keys.max()) < 1 << 15 else keys


@lru_cache(maxsize=64)
def everything(tokens: int, k: int) -> Bools:
    """Return True [tokens, k], to be read only: for one token making it takes as long as all else that `exact` does."""
    keep = np.ones((tokens, k), np.bool_)
    keep.flags.writeable = False
    return keep


def pairs_used(experts: Ints, keep: Bools, owner: Ints, n_devices: int) -> Bools:
    """Say which devices each token's row travels to: [tokens, n_devices]."""
    used = np.zeros((len(experts), n_devices), np.bool_)
    token, slot = np.nonzero(keep)
    used[token, owner[experts[token, slot]]] = True
    return used
