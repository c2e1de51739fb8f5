"""`wlr`: weight-to-latency ratio, our reconstruction of WDMoE's selection (docs/architecture.md)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.bs.policies.options import Context, Latencies, Options, require
from wdmoe.bs.policies.pairs import (
    Pairs,
    importance_of_one,
    kept_weights,
    make_pairs,
    pairs_of_one,
    plan_of_one,
    slot_importance,
    within_budget,
)
from wdmoe.bs.policies.pairs import droppable as droppable_pairs
from wdmoe.bs.routing import Floats, Ints, Plan, Routing

_GAIN, _NO_GAIN = "gain reached", "theta at its end"  # why the search stopped


@dataclass(frozen=True, slots=True, kw_only=True)
class Wlr(Options):
    """Weight-to-latency ratio.

    alpha is the first threshold theta, `step` its increment, gamma the gain in WLR at which it stops. Where the band is
    divided for each block, selection and division take `rounds` turns, but for one token alone.
    """

    alpha: float = 0.5
    step: float = 0.05
    gamma: float = 1.05
    rounds: int = 1

    def __post_init__(self) -> None:
        """Refuse options under which the search would not end or mean nothing."""
        Options.__post_init__(self)
        require(self, "alpha", 0 <= self.alpha <= 1, "0 to 1 (a cosine of non-negative vectors)")
        require(self, "step", 0 < self.step <= 1, "more than 0 and at most 1")
        require(self, "gamma", self.gamma >= 1, "at least 1")
        require(self, "rounds", self.rounds >= 1, "at least 1")


def select_wlr(routing: Routing, owner: Ints, row_ms: Latencies, policy: Wlr, context: Context) -> Plan:
    """Raise theta until dropping the minor pairs of tokens with S <= theta gains gamma in WLR.

    S is the cosine between a token's weights by device and the devices' latencies: where it is low, the weight
    sits on fast devices, and the minor pair can go cheaply. Each theta starts again from the model's top-k, so a
    token loses at most its smallest pair. WLR = sum over devices of (weights of their pairs) / (rows x row_ms).
    """
    if len(routing.experts) == 1:
        return _one_token(routing, owner, policy, context)
    importance = slot_importance(routing, policy, context)
    pairs = make_pairs(owner[routing.experts], importance)
    similarity = _similarity(pairs, row_ms)
    droppable = droppable_pairs(pairs, protect=False)[:, 0]  # slot 0 is always a lead: of tokens with several pairs
    smallest: Ints = pairs.device[:, 0]
    minor: Floats = pairs.importance[:, 0]
    for slot in range(1, importance.shape[1]):
        device, weight = pairs.device[:, slot], pairs.importance[:, slot]
        less = pairs.lead[:, slot] & ((weight < minor) | ((weight == minor) & (device < smallest)))
        smallest, minor = np.where(less, device, smallest), np.where(less, weight, minor)
    if policy.protect:
        droppable &= pairs.device[:, 0] != smallest
    weight_by_device = np.bincount(pairs.device.ravel(), pairs.importance.ravel(), len(row_ms)).astype(np.float64)
    rows_by_device = np.bincount(pairs.device.ravel(), pairs.lead.ravel(), len(row_ms)).astype(np.int64)

    start = _wlr(weight_by_device, rows_by_device, row_ms)
    n_droppable = int(np.count_nonzero(droppable))
    lowest = float(similarity[droppable].min()) if n_droppable else np.inf
    drop, dropped, gained, step = np.zeros(len(minor), np.bool_), 0, False, 0
    while True:
        theta = min(1.0, policy.alpha + step * policy.step)
        if (theta >= lowest or theta >= 1.0) and dropped < n_droppable:  # else it is the same tokens as before
            # A cosine can come out a rounding above 1.
            drop = droppable & ((similarity <= theta) | (theta >= 1.0))
            before, dropped = dropped, int(np.count_nonzero(drop))
            if dropped != before:
                where = smallest[drop]
                left = weight_by_device - np.bincount(where, minor[drop], len(row_ms))
                rows = rows_by_device - np.bincount(where, minlength=len(row_ms))
                gained = _wlr(left, rows, row_ms) > policy.gamma * start
        if gained or theta >= 1.0:
            break
        step += 1
    drop = within_budget(drop, *policy.costs(minor, importance, context))
    keep = np.ones(importance.shape, np.bool_)
    for slot in range(importance.shape[1]):
        keep[:, slot] = ~(drop & (pairs.device[:, slot] == smallest))
    stopped = _GAIN if gained else _NO_GAIN
    return Plan(keep, kept_weights(routing, keep, policy.renormalise), theta, stopped)


def _one_token(routing: Routing, owner: Ints, policy: Wlr, context: Context) -> Plan:
    """Do the same for one token in plain numbers: its minor pair goes.

    That never raises a WLR in which every device has one row at most, so that theta runs to its end, whatever the latencies.
    """
    importance = importance_of_one(routing, policy, context)
    slots, of_pair = pairs_of_one(owner[routing.experts[0]].tolist(), importance)
    minor = min(slots, key=lambda device: (of_pair[slots[device][0]], device))
    lead = slots[minor][0]
    cost, allowance = policy.costs_of_one([of_pair[lead]], importance, context)
    stays = len(slots) == 1 or (policy.protect and lead == 0) or cost[0] > allowance
    return plan_of_one(routing, () if stays else slots[minor], policy, 1.0, _NO_GAIN)


def _similarity(pairs: Pairs, row_ms: Latencies) -> Latencies:
    """Return the cosine between each token's weights by device and the latencies of all devices: [tokens]."""
    dot, square = np.zeros(len(pairs.device)), np.zeros(len(pairs.device), np.float32)
    for slot in range(pairs.device.shape[1]):
        weight = pairs.importance[:, slot]
        dot += weight * row_ms[pairs.device[:, slot]]
        square += weight * weight
    similarity: Latencies = dot / (np.sqrt(square) * np.sqrt(row_ms.dot(row_ms)))
    return similarity


def _wlr(weight: npt.NDArray[np.floating], rows: Ints, row_ms: Latencies) -> float:
    busy = rows > 0
    return float((weight[busy] / (rows[busy] * row_ms[busy])).sum())
