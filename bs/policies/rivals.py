"""Rivals that know no latency: `ser` and `top-cut`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wdmoe.bs.policies.options import Context, Options, require
from wdmoe.bs.policies.pairs import (
    affordable_of_one,
    importance_of_one,
    kept_weights,
    make_pairs,
    pairs_of_one,
    plan_of_one,
    plan_without,
    slot_importance,
    within_budget,
)
from wdmoe.bs.routing import Ints, Plan, Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class Ser(Options):
    """Smart expert reduction (ik_llama.cpp): keep the k_min top experts, further ones only if p > t x p_top."""

    k_min: int = 1
    t: float = 0.4

    def __post_init__(self) -> None:
        """Refuse options that mean nothing."""
        Options.__post_init__(self)
        require(self, "k_min", self.k_min >= 1, "at least 1")
        require(self, "t", 0 <= self.t <= 1, "0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class TopCut(Options):
    """Only the n most important experts of each token, or with `pairs` its n most important pairs (token, device)."""

    n: int = 1
    pairs: bool = False

    def __post_init__(self) -> None:
        """Refuse options that mean nothing."""
        Options.__post_init__(self)
        require(self, "n", self.n >= 1, "at least 1")


def select_ser(routing: Routing, policy: Ser, context: Context) -> Plan:
    """Leave experts out one by one: one that shares its device with a kept one saves compute but no bytes."""
    if len(routing.experts) == 1:
        few = importance_of_one(routing, policy, context)
        least = np.float32(policy.t) * np.float32(few[0])  # rounded as for many
        out = [slot for slot in range(policy.k_min, len(few)) if few[slot] <= least]
        return plan_of_one(routing, affordable_of_one(out, *policy.costs_of_one(few, few, context)), policy)
    importance = slot_importance(routing, policy, context)
    drop = importance <= policy.t * importance[:, :1]
    drop[:, : policy.k_min] = False
    keep = ~within_budget(drop, *policy.costs(importance, importance, context))
    return Plan(keep, kept_weights(routing, keep, policy.renormalise))


def select_top_cut(routing: Routing, owner: Ints, policy: TopCut, context: Context) -> Plan:
    """Rank what each token has by importance and leave out all from rank n on."""
    if len(routing.experts) == 1:
        return _cut_one(routing, owner, policy, context)
    importance = slot_importance(routing, policy, context)
    pairs = make_pairs(owner[routing.experts], importance) if policy.pairs else None
    ranked = importance if pairs is None else pairs.importance
    rank = np.argsort(np.argsort(-ranked, axis=1, kind="stable"), axis=1, kind="stable")
    drop = rank >= policy.n
    if policy.protect:
        drop[:, 0] = False
    if pairs is not None:
        drop &= pairs.lead
    drop = within_budget(drop, *policy.costs(ranked, importance, context))
    if pairs is not None:
        return plan_without(routing, pairs, drop, policy)
    return Plan(~drop, kept_weights(routing, ~drop, policy.renormalise))


def _cut_one(routing: Routing, owner: Ints, policy: TopCut, context: Context) -> Plan:
    """Do the same for one token in plain numbers."""
    importance = ranked = importance_of_one(routing, policy, context)
    slots = {slot: [slot] for slot in range(len(importance))}
    if policy.pairs:
        by_device, ranked = pairs_of_one(owner[routing.experts[0]].tolist(), importance)
        slots = {mine[0]: mine for mine in by_device.values()}
    out = sorted(slots, key=lambda slot: -ranked[slot])[policy.n :]
    if policy.protect and 0 in out:
        out.remove(0)
    leads = affordable_of_one(out, *policy.costs_of_one(ranked, importance, context))
    return plan_of_one(routing, [slot for lead in leads for slot in slots[lead]], policy)
