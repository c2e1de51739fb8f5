"""`capacity`: a cap on the rows of each device, in proportion to its speed (after Capacity-Aware Inference, 2503.05066)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wdmoe.bs.policies.exact import select_exact
from wdmoe.bs.policies.options import Context, Latencies, Options, require
from wdmoe.bs.policies.pairs import (
    Pairs,
    by_device,
    droppable,
    make_pairs,
    plan_without,
    slot_importance,
    spare_last,
    sums,
    within_budget,
)
from wdmoe.bs.routing import Bools, Floats, Ints, Plan, Routing, small_ints

OVERFLOW = ("drop", "next")


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity(Options):
    """Cap each device's rows at `factor` times its share of all rows by speed.

    Excess goes least important first: it is left out, or with overflow=next the token is offered to its next expert.
    Where the band is divided for each block, selection and division take `rounds` turns, but for one token alone.
    """

    factor: float = 1.2
    overflow: str = "drop"
    rounds: int = 1

    def __post_init__(self) -> None:
        """Refuse options that mean nothing."""
        Options.__post_init__(self)
        require(self, "factor", self.factor > 0, "more than 0")
        require(self, "overflow", self.overflow in OVERFLOW, f"one of {', '.join(OVERFLOW)}")
        require(self, "rounds", self.rounds >= 1, "at least 1")


def select_capacity(routing: Routing, owner: Ints, row_ms: Latencies, policy: Capacity, context: Context) -> Plan:
    """Take from every device what exceeds its cap.

    The cap is ceil(factor x rows x speed / sum of speeds), at least 1, with speed = 1 / row_ms: speeds at the present load, so that
    fixed costs count as if they were spread over the rows. A token's last pair stays, whatever the cap.
    """
    if len(routing.experts) == 1:
        return select_exact(routing)  # no cap is less than the one row that a device has
    importance = slot_importance(routing, policy, context)
    pairs = make_pairs(owner[routing.experts], importance)
    rows = np.bincount(pairs.device[pairs.lead], minlength=len(row_ms))
    speed = 1 / row_ms
    # The rounding keeps a share that is whole from being raised by one.
    cap = np.ceil(np.round(policy.factor * rows.sum() * speed / speed.sum(), 9)).clip(1).astype(np.int64)
    drop = _excess(pairs, droppable(pairs, policy.protect), rows - cap)
    drop = spare_last(pairs, drop)
    drop = within_budget(drop, *policy.costs(pairs.importance, importance, context))
    if policy.overflow == "drop" or not drop.any():
        return plan_without(routing, pairs, drop, policy)
    return _offer(routing, pairs, drop, owner, cap - rows, policy, context)


def _excess(pairs: Pairs, may: Bools, too_many: Ints) -> Bools:
    """Choose the least important pairs of each device that has too many."""
    at = np.flatnonzero(may & (too_many > 0)[pairs.device])
    at, device = by_device(at, pairs.device.ravel()[at], pairs.importance.ravel()[at], ends=at[:0])
    rank = _rank(device, len(too_many))  # among those of its device
    drop = np.zeros(may.size, np.bool_)
    drop[at[rank < too_many[device]]] = True
    return drop.reshape(may.shape)


def _offer(
    routing: Routing, pairs: Pairs, drop: Bools, owner: Ints, room: Ints, policy: Capacity, context: Context
) -> Plan:
    """Ask, for each pair left out, the token's best expert outside its top-k, if that expert's device has room.

    One expert stands in for the whole pair, with its own router probability in place of the weight.

    Raises:
        ValueError: the router's probabilities are not known.
    """
    if context.probabilities is None:
        raise ValueError(f"{policy.describe()}: needs the router's probabilities over all experts")
    tokens, slots = np.nonzero(drop)
    others, each = context.probabilities[tokens], np.arange(len(tokens))
    for slot in range(routing.experts.shape[1]):
        others[each, routing.experts[tokens, slot]] = -1.0
    # A token that loses several pairs offers them to its first, second, ... next expert.
    nth = each - np.searchsorted(tokens, tokens)
    n_others = others.shape[1] - routing.experts.shape[1]
    stand_in, waiting = np.empty(len(tokens), np.int64), each
    for turn in range(int(nth.max(initial=-1)) + 1):
        best = others[waiting].argmax(axis=1)
        others[waiting, best] = -1.0
        mine = nth[waiting] == turn
        stand_in[waiting[mine]] = best[mine]
        waiting = waiting[~mine]
    at_hand = nth < n_others
    # First come, first served, the most probable first; a device that is over its cap has no room at all.
    probability: Floats = context.probabilities[tokens, stand_in]
    order = np.argsort(-probability, kind="stable")
    order = order[at_hand[order]]
    order = order[np.argsort(small_ints(owner[stand_in[order]]), kind="stable")]
    device = owner[stand_in[order]]
    accepted = order[_rank(device, len(room)) < room[device]]

    keep = pairs.keep_without(drop)
    experts, weights = routing.experts.copy(), np.where(keep, routing.weights, np.float32(0))
    # Weights may have been scaled to sum to one: by the same factor, so that the stand-in's fits them.
    scale = routing.weights[:, 0] / context.probabilities[np.arange(len(experts)), routing.experts[:, 0]]
    experts[tokens[accepted], slots[accepted]] = stand_in[accepted]
    weights[tokens[accepted], slots[accepted]] = probability[accepted] * scale[tokens[accepted]]
    keep[tokens[accepted], slots[accepted]] = True
    if policy.renormalise:
        left = sums(weights)
        left[left == 0] = 1
        weights *= (sums(routing.weights) / left)[:, None]
    return Plan(keep, weights.astype(np.float32), experts=experts)


def _rank(device: Ints, n_devices: int) -> Ints:
    """Count, of entries sorted by device, which one of its device each is."""
    counts = np.bincount(device, minlength=n_devices)
    rank: Ints = np.arange(len(device)) - (np.cumsum(counts) - counts)[device]
    return rank
