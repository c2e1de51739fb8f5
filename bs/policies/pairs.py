"""Pairs (token, device), the unit that costs and so the unit that may be left out, and what is left when some are.

A token's row travels once to a device that holds one or more of its experts, and one weighted sum comes back. Arrays
here are [tokens, k], by the slots of the model's top-k: a pair stands in the slot of its first expert, its lead, so
that nothing grows with the number of devices. Slot 0 is the token's top expert and always a lead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wdmoe.bs.airtime import Load
from wdmoe.bs.policies.options import Context, Options
from wdmoe.bs.routing import Bools, Floats, Ints, Plan, Routing, everything


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs of one block."""

    device: Ints  # [tokens, k], of each slot
    lead: Bools  # [tokens, k], whether a slot is a lead
    importance: Floats  # [tokens, k], of the pair at its lead, 0 elsewhere
    further: Ints  # slots that are no leads, flat
    their_lead: Ints  # and the lead of each of them, flat

    def keep_without(self, drop: Bools) -> Bools:
        """Return [tokens, k] what is kept when the pairs of some leads are left out."""
        keep: Bools = np.logical_not(drop, order="C")
        keep.ravel()[self.further] = keep.ravel()[self.their_lead]
        return keep

    def lead_of(self) -> Ints:
        """Return [tokens, k] the slot of the lead of each slot's pair."""
        tokens, k = self.device.shape
        lead_of = np.tile(np.arange(k), tokens)
        lead_of[self.further] = self.their_lead % k
        return lead_of.reshape(tokens, k)

    def without_any(self, drop: Bools) -> Ints:
        """Return the tokens that would lose all their pairs."""
        tokens = np.flatnonzero(drop[:, 0])
        for slot in range(1, self.lead.shape[1]):
            tokens = tokens[drop[tokens, slot] | ~self.lead[tokens, slot]]
        return tokens


@dataclass(frozen=True, slots=True)
class Calls:
    """The expert calls of one block with nothing left out."""

    experts: Ints  # [tokens, k]
    n_experts: int
    of_slot: Ints  # [tokens x k], the call that each slot is part of: device x n_experts + expert
    tokens: Ints  # [K x n_experts], of each call

    def load(self, pairs: Pairs, drop: Bools | None = None) -> Load:
        """Return what is asked of each device when the pairs of some leads are left out.

        Args:
            pairs: of the block.
            drop: [tokens, k], leads.
        """
        tokens, further = (self.tokens, pairs.further) if drop is None else self.left(pairs, drop)
        n_devices = len(tokens) // self.n_experts
        made = np.flatnonzero(tokens)
        device = made // self.n_experts
        rows = np.bincount(device, tokens[made], n_devices).astype(np.int64)
        if len(further):  # experts of a pair beside its first, for which no row travels
            rows -= np.bincount(self.of_slot[further] // self.n_experts, minlength=n_devices)
        return Load(rows, device, tokens[made])

    def left(self, pairs: Pairs, drop: Bools) -> tuple[Ints, Ints]:
        """Return the tokens of each call without the pairs of some leads, and the slots that are kept and are no leads, flat."""
        if 2 * np.count_nonzero(drop) > drop.size:  # what is kept is sooner counted
            further = pairs.further[~drop.ravel()[pairs.their_lead]]
            kept = np.concatenate((np.flatnonzero(pairs.lead > drop), further))
            return np.bincount(self.of_slot[kept], minlength=len(self.tokens)), further
        left_out, further = np.flatnonzero(drop), pairs.further
        if len(further):
            gone = drop.ravel()[pairs.their_lead]
            left_out = np.concatenate((left_out, further[gone]))
            further = further[~gone]
        return self.tokens - np.bincount(self.of_slot[left_out], minlength=len(self.tokens)), further


def calls_of(experts: Ints, device: Ints, n_experts: int, n_devices: int) -> Calls:
    """Count the calls of experts [tokens, k], asked of devices [tokens, k]."""
    of_slot = (device * n_experts + experts).ravel()
    return Calls(experts, n_experts, of_slot, np.bincount(of_slot, minlength=n_devices * n_experts))


def slot_importance(routing: Routing, options: Options, context: Context) -> Floats:
    """Return the importance of each expert for each token, [tokens, k].

    Raises:
        ValueError: norms are asked for and there are none.
    """
    if options.importance == "weight":
        return routing.weights
    if context.norms is None:
        raise ValueError(
            f"{options.describe()}: this bundle has no norms calibrated on a text; make them with wdmoe-export calibrate, or take importance=weight"
        )
    return routing.weights * context.norms[routing.experts]


def make_pairs(device: Ints, importance: Floats) -> Pairs:
    """Group slots by device.

    Args:
        device: [tokens, k], of each slot.
        importance: [tokens, k], of each slot.
    """
    k = device.shape[1]
    lead, total = np.ones(device.size, np.bool_), importance.ravel().copy()
    further, their_lead = [], []
    for slot in range(1, k):  # column by column: numpy is slow along so short an axis
        free = np.ones(len(device), np.bool_)  # whose slot has no lead yet
        for earlier in range(slot):  # the first one found leads
            same = (device[:, slot] == device[:, earlier]) & free
            tokens, free = np.flatnonzero(same), free & ~same
            slots, leads = tokens * k + slot, tokens * k + earlier
            lead[slots] = False
            total[leads] += total[slots]
            total[slots] = 0
            further.append(slots)
            their_lead.append(leads)
    none = np.empty(0, np.int64)
    return Pairs(
        device,
        lead.reshape(device.shape),
        total.reshape(importance.shape),
        np.concatenate((none, *further)),
        np.concatenate((none, *their_lead)),
    )


def by_device(at: Ints, device: Ints, importance: Floats, ends: Ints) -> tuple[Ints, Ints]:
    """Sort slots by device, then by importance, then as they are.

    Args:
        at: flat, ascending.
        device: of each.
        importance: of each, not negative.
        ends: devices after whose last slot an entry of no slot is wanted, as often as they are named.

    Returns:
        The slots, and the device of each.
    """
    last = max(int(device.max(initial=0)), int(ends.max(initial=0)))
    if (len(at) and int(at[-1]) >= 1 << 16) or last >= 1 << 15:
        device = np.concatenate((device, ends))
        order = np.lexsort((np.concatenate((importance, np.full(len(ends), np.inf))), device))
        return np.concatenate((at, np.zeros_like(ends)))[order], device[order]
    # In one number: those of a float32 that is not negative stand in the order of its bits.
    keys = device.astype(np.int64, copy=False) << 48
    keys |= importance.astype(np.float32, copy=False).view(np.int32).astype(np.int64) << 16
    keys |= at
    keys = np.concatenate((keys, ends << 48 | 0x7FFFFFFF0000))
    keys.sort()
    return keys & 0xFFFF, keys >> 48


def droppable(pairs: Pairs, protect: bool) -> Bools:
    """Say which leads may be left out alone: of tokens with several pairs, and not the top expert's if protected."""
    may = pairs.lead.copy()
    may[:, 0] = False if protect or may.shape[1] == 1 else np.logical_or.reduce(may.T[1:])
    return may


def spare_last(pairs: Pairs, drop: Bools) -> Bools:
    """Give every token that would lose all its pairs its most important one back."""
    lost = pairs.without_any(drop)
    if len(lost):
        drop = drop.copy()
        drop[lost, pairs.importance[lost].argmax(axis=1)] = False
    return drop


def within_budget(drop: Bools, importance: Floats, allowance: float) -> Bools:
    """Leave out only the least important of what was to be left out, up to an allowance.

    Args:
        drop: what was to be left out, of any shape.
        importance: of each, of the same shape.
        allowance: for the sum of their importance.
    """
    if allowance == math.inf:
        return drop
    at = np.flatnonzero(drop)
    of_each = importance.ravel()[at].astype(np.float64)
    order = np.argsort(of_each, kind="stable")
    affordable = int(np.searchsorted(np.cumsum(of_each[order]), allowance, side="right"))
    within = np.zeros(drop.size, np.bool_)
    within[at[order[:affordable]]] = True
    return within.reshape(drop.shape)


def kept_weights(routing: Routing, keep: Bools, renormalise: bool) -> Floats:
    """Return what outputs are multiplied with: 0 where not kept, the rest scaled to the sum of all if asked to."""
    weights = np.where(keep, routing.weights, np.float32(0))
    if renormalise:
        left = sums(weights)
        left[left == 0] = 1  # weights may be too small for float32
        scale = sums(routing.weights) / left
        for slot in range(weights.shape[1]):
            weights[:, slot] *= scale
    return weights


def sums(weights: Floats) -> Floats:
    """Sum along the slots: up to 7 numpy adds one after the other as well, but far slower."""
    k = weights.shape[1]
    if k > 7:
        sums: Floats = weights.sum(axis=1)
        return sums
    total = weights[:, 0].copy()
    for slot in range(1, k):
        total += weights[:, slot]
    return total


def plan_without(routing: Routing, pairs: Pairs, drop: Bools, options: Options, stopped: str | None = None) -> Plan:
    """Make the plan that leaves out the pairs of some leads."""
    keep = pairs.keep_without(drop)
    return Plan(keep, kept_weights(routing, keep, options.renormalise), stopped=stopped)


def importance_of_one(routing: Routing, options: Options, context: Context) -> list[float]:
    """Return the importance of each expert of one token; see `slot_importance`."""
    importance: list[float] = slot_importance(routing, options, context)[0].tolist()
    return importance


def pairs_of_one(devices: Sequence[int], importance: Sequence[float]) -> tuple[dict[int, list[int]], list[float]]:
    """Return the slots of each device, the first of which is the lead, and the importance of each pair at its lead, else 0."""
    slots: dict[int, list[int]] = {}
    for slot, device in enumerate(devices):
        slots.setdefault(device, []).append(slot)
    if len(slots) == len(devices):
        return slots, list(importance)
    of_pair = [0.0] * len(devices)
    for first, *others in slots.values():
        total = importance[first]
        for slot in others:
            total = float(np.float32(total + importance[slot]))  # rounded as for many
        of_pair[first] = total
    return slots, of_pair


def affordable_of_one(out: Sequence[int], costs: Sequence[float], allowance: float) -> Sequence[int]:
    """Return the slots that may be left out of those that were to be; see `within_budget`."""
    spent, few = 0.0, []
    for slot in sorted(out, key=lambda slot: costs[slot]):
        spent += costs[slot]
        if spent > allowance:
            break
        few.append(slot)
    return few


def plan_of_one(
    routing: Routing,
    out: Sequence[int],
    options: Options,
    theta: float | None = None,
    stopped: str | None = None,
    devices: Ints | None = None,
) -> Plan:
    """Make the plan that leaves out some slots of one token, but not all."""
    shape = routing.experts.shape
    if not out:
        return Plan(everything(*shape), routing.weights, theta, stopped, devices=devices)
    if shape[1] == 2:
        return _plan_of_two(routing, 1 - out[0], options, theta, stopped, devices)
    keep = everything(*shape).copy()
    for slot in out:
        keep[0, slot] = False
    return Plan(keep, kept_weights(routing, keep, options.renormalise), theta, stopped, devices=devices)


def _plan_of_two(
    routing: Routing, stays: int, options: Options, theta: float | None, stopped: str | None, devices: Ints | None
) -> Plan:
    """Keep one of two slots: what `kept_weights` does, to the bit, without arrays."""
    weights, left = np.zeros((1, 2), np.float32), routing.weights[0, stays]
    if options.renormalise and left:
        left = left * ((routing.weights[0, 0] + routing.weights[0, 1]) / left)
    weights[0, stays] = left
    return Plan(_ONE_OF_TWO[stays], weights, theta, stopped, devices=devices)


_ONE_OF_TWO = (np.array([[True, False]]), np.array([[False, True]]))
for _keep in _ONE_OF_TWO:
    _keep.flags.writeable = False
