"""`bottleneck`: unload the devices that finish last, least importance first, within a budget. Ours.

Before anything is left out, rows move to other holders of their experts while the block gets shorter; see `moving.py`.
For every device the pairs it may lose stand in a ladder, least important first, with the importance spent and the time
the device takes alone after each rung. Where experts have a fixed cost (reading the weights), the last row of an
expert is worth more than the others, so there are further ladders that empty some experts first.

On own links the block takes as long as its slowest device: the least T for which each device can be brought to T and
all that costs is within the budget is found by bisection. Where devices share the air, every row costs all of them
time: pairs go by importance per time on the air, and that is weighed against the ladders by the block's real time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from wdmoe.bs.airtime import LatencyModel, Load, linear_model, makespan
from wdmoe.bs.one_token import RowTimes, asked_of, block_ms
from wdmoe.bs.policies.ladders import Chosen, make_ladders
from wdmoe.bs.policies.moving import move_rows, move_token
from wdmoe.bs.policies.options import Context, Latencies, Options
from wdmoe.bs.policies.pairs import (
    Calls,
    Pairs,
    calls_of,
    droppable,
    importance_of_one,
    make_pairs,
    pairs_of_one,
    plan_of_one,
    plan_without,
    slot_importance,
    spare_last,
)
from wdmoe.bs.routing import Bools, Ints, Plan, Routing

_FEW = 6  # pairs of one token that are tried in all combinations
_ROUNDS = 2  # of a pooled band: what a row costs depends on the block time, which depends on the rows
_SHARES = (0.25, 0.5, 0.75, 1.0)  # of the budget, tried for devices that are late by themselves
_SOON_MS = 1e-12  # a time to divide by where a block takes none
_NEAR = 1.01  # to what cannot be beaten, to look no further
_AGAIN = 512  # tokens, up to which such rounds are made, and a second look where two pairs of one token compete
_STEPS = 40  # of a bisection: to 1e-12 of its range


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck(Options):
    """Leave out what makes the block shorter, until the budget is spent or nothing is gained."""

    protect: bool = True
    budget: tuple[float, ...] = (0.05,)


def select_bottleneck(routing: Routing, owner: Ints, row_ms: Latencies, policy: Bottleneck, context: Context) -> Plan:
    """Choose who is asked where several hold an expert, and the pairs to leave out."""
    if len(routing.experts) == 1:
        return _one_token(routing, owner, context.model or linear_model(row_ms, 1), policy, context)
    model = context.model or linear_model(row_ms, len(routing.experts))
    assert isinstance(model, LatencyModel)
    moved = None if context.holders is None else move_rows(routing.experts, owner, context.holders, model)
    if moved is None:
        return _leave_out(routing, owner[routing.experts], len(owner), model, policy, context)
    return replace(_leave_out(routing, moved, len(owner), model, policy, context), devices=moved)


def _leave_out(
    routing: Routing, device: Ints, n_experts: int, model: LatencyModel, policy: Bottleneck, context: Context
) -> Plan:
    """Choose the pairs to leave out, of tokens whose experts are asked of devices [tokens, k]."""
    importance = slot_importance(routing, policy, context)
    pairs = make_pairs(device, importance)
    costs, allowance = policy.costs(pairs.importance, importance, context)
    pairs = replace(pairs, importance=costs)
    calls = calls_of(routing.experts, device, n_experts, model.n_devices)
    unloaded = unload(calls, pairs, droppable(pairs, policy.protect), allowance, model)
    return replace(plan_without(routing, pairs, unloaded.drop, policy), load=unloaded.load)


@dataclass(frozen=True, slots=True)
class Unloaded:
    """What is left out of a block, and what is left."""

    drop: Bools  # [tokens, k], leads
    load: Load
    took_ms: float  # of the block, or on own links of its slowest device; predicted


def unload(calls: Calls, pairs: Pairs, may: Bools, allowance: float, model: LatencyModel) -> Unloaded:
    """Choose the leads of the pairs to leave out.

    Args:
        calls: of the block.
        pairs: of the block.
        may: [tokens, k], leads that may be left out, each by itself.
        allowance: for the sum of their importance.
        model: of the devices.
    """
    best: Unloaded | None = None
    for _ in range(2):
        found = _unload(calls, pairs, may, allowance, model)
        lost = pairs.without_any(found.drop)
        if len(lost):
            # Tokens that would lose all their pairs get the most important back, and it is no longer on offer.
            back = pairs.importance[lost].argmax(axis=1)
            may, drop = may.copy(), found.drop.copy()
            may[lost, back] = drop[lost, back] = False
            left = calls.load(pairs, drop)
            found = Unloaded(drop, left, makespan(left, model).total_ms)
        if best is None or found.took_ms < best.took_ms:
            best = found
        if len(lost) == 0:
            break
    assert best is not None
    return best


def _unload(calls: Calls, pairs: Pairs, may: Bools, allowance: float, model: LatencyModel) -> Unloaded:
    load, many = calls.load(pairs), len(may) > _AGAIN
    ladders = make_ladders(calls, pairs, may, load, model, allowance) if allowance > 0 else None

    def without(chosen: Chosen) -> tuple[Bools, Load]:
        assert ladders is not None
        drop = ladders.drop(chosen, may.shape)
        drop = spare_last(pairs, drop) if many else drop  # of few, the best to give back is looked for: see `unload`
        return drop, calls.load(pairs, drop)

    if ladders is not None and model.medium == "own":
        chosen = ladders.bring_down(allowance, _STEPS)
        return Unloaded(*without(chosen), ladders.slowest_ms(chosen))
    best = Unloaded(np.zeros(may.shape, np.bool_), load, makespan(load, model).total_ms)
    if ladders is None:
        return best

    def weigh(chosen: Chosen) -> tuple[float, float]:
        """Take what is chosen if it is the best so far; return its block time, and all time on the air."""
        nonlocal best
        drop, left = without(chosen)
        took_ms = makespan(left, model).total_ms
        if took_ms < best.took_ms * (1 - 1e-9):
            best = Unloaded(drop, left, took_ms)
        return took_ms, float((left.rows * model.row_air_ms).sum())

    t_ms, fixed_ms = best.took_ms, 2 * model.way_ms + load.compute_ms(model)
    for _ in range(_ROUNDS if model.medium == "pooled" and not many else 1):
        value = model.row_air_ms
        if model.medium == "pooled":
            value = value / np.maximum(t_ms - fixed_ms, max(1e-6 * t_ms, _SOON_MS))
        chosen = ladders.spend(ladders.top(), value, allowance, _STEPS)
        t_ms, air_ms = weigh(chosen)
    wired = bool((model.row_air_ms[load.rows > 0] == 0).any())  # some device has no part in what is divided
    # By price alone the air is used as little as the budget allows: on a shared channel no plan can beat that.
    if (t_ms > _NEAR * air_ms) if model.medium == "shared" else (ladders.may_empty or wired):
        for share in _SHARES:
            base = ladders.bring_down(share * allowance, _STEPS)
            if wired:
                weigh(base)
            further = ladders.spend(base, value, allowance, _STEPS)
            if further is not base:
                weigh(further)
    return best


def _one_token(routing: Routing, owner: Ints, model: RowTimes, policy: Bottleneck, context: Context) -> Plan:
    """Move a token's rows, then try all ways to leave out some of its least important pairs, in plain numbers."""
    experts: list[int] = routing.experts[0].tolist()
    device: list[int] = owner[routing.experts[0]].tolist()
    moved = None if context.holders is None else move_token(experts, device, context.holders, model)
    devices = None if moved is None else np.array([moved], np.int64)
    importance = importance_of_one(routing, policy, context)
    slots, of_pair = pairs_of_one(device if moved is None else moved, importance)
    costs, allowance = policy.costs_of_one(of_pair, importance, context)
    cost = {who: costs[mine[0]] for who, mine in slots.items()}
    protected = next(iter(slots)) if policy.protect else None
    on_offer = [who for who in slots if who != protected and cost[who] <= allowance]
    if not on_offer or len(slots) == 1:
        return plan_of_one(routing, (), policy, devices=devices)
    on_offer = sorted(on_offer, key=cost.__getitem__)[:_FEW]
    asked = {who: asked_of(who, len(mine), model) for who, mine in slots.items()}
    best: tuple[int, ...] = ()
    best_ms = block_ms(list(asked.values()), model.medium)
    for n in range(1, min(len(on_offer), len(slots) - 1) + 1):
        for out in combinations(on_offer, n):
            if sum([cost[who] for who in out]) > allowance:
                continue
            took_ms = block_ms([one for who, one in asked.items() if who not in out], model.medium)
            if took_ms < best_ms * (1 - 1e-9):
                best, best_ms = out, took_ms
    left_out = [slot for who in best for slot in slots[who]]
    return plan_of_one(routing, left_out, policy, devices=devices)
