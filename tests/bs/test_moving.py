"""Rows that move to replicas: never to the block's harm, near the best of all divisions, and nothing else changes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from devices import random_model

from wdmoe.bs.airtime import LatencyModel, Medium, load_of, makespan
from wdmoe.bs.policies import Bottleneck, Context, RoundRobin, select
from wdmoe.bs.policies.moving import move_rows, move_token
from wdmoe.bs.routing import Bools, Ints, Plan, Routing, route

MEDIA: tuple[Medium, ...] = ("own", "shared", "pooled")
media = pytest.mark.parametrize("medium", MEDIA)


def block_ms(experts: Ints, device: Ints, n_experts: int, model: LatencyModel, keep: Bools | None = None) -> float:
    keep = np.ones(experts.shape, np.bool_) if keep is None else keep
    load = load_of(experts, keep, device, n_experts, model.n_devices)
    return makespan(load, model).total_ms


def placed(rng: np.random.Generator, n_experts: int, n_devices: int, copies: float) -> tuple[Ints, Bools]:
    owner = rng.integers(0, n_devices, n_experts)
    holders = rng.random((n_experts, n_devices)) < copies
    holders[np.arange(n_experts), owner] = True
    return owner, holders


@media
@pytest.mark.parametrize("tokens", [1, 3])
def test_it_is_never_worse_and_near_the_best_of_all_divisions(medium: Medium, tokens: int) -> None:
    over, could = [], 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        experts = route(rng.standard_normal((tokens, 4), np.float32), 2, normalise=True).experts
        owner, holders = placed(rng, 4, 3, 0.5)
        model = random_model(rng, 3, medium)
        if tokens == 1:
            moved = move_token(experts[0].tolist(), owner[experts[0]].tolist(), holders, model)
            found = None if moved is None else np.array([moved])
        else:
            found = move_rows(experts, owner, holders, model)
        device = owner[experts] if found is None else found
        assert holders[experts, device].all()
        before_ms, found_ms = (block_ms(experts, one, 4, model) for one in (owner[experts], device))
        assert found_ms < before_ms if found is not None else found_ms == before_ms
        ways = product(*(np.flatnonzero(holders[e]).tolist() for e in experts.ravel()))
        best_ms = min(block_ms(experts, np.array(way).reshape(experts.shape), 4, model) for way in ways)
        over.append(found_ms / best_ms)
        could += best_ms < 0.98 * before_ms
    assert min(over) > 1 - 1e-9 and could > 15
    assert np.mean(over) < (1.001 if tokens == 1 else 1.05), np.mean(over)


@media
@pytest.mark.parametrize("tokens", [200, 600])
def test_many_rows_are_divided_better_than_dealt_out_evenly(medium: Medium, tokens: int) -> None:
    gained, beside_dealing = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        routing = route(rng.standard_normal((tokens, 8), np.float32), 2, normalise=True)
        owner, holders = placed(rng, 8, 4, 0.6)
        model = random_model(rng, 4, medium, up_to=2 * tokens)
        found = move_rows(routing.experts, owner, holders, model)
        dealt = select(routing, owner, np.ones(4), RoundRobin(), Context(holders=holders)).devices
        assert dealt is not None
        before_ms, dealt_ms, found_ms = (
            block_ms(routing.experts, owner[routing.experts] if device is None else device, 8, model)
            for device in (None, dealt, found)
        )
        gained.append(found_ms / before_ms)
        beside_dealing.append(found_ms / dealt_ms)
    assert max(gained) <= 1 and np.mean(gained) < 0.93
    assert max(beside_dealing) < 1.1 and np.mean(beside_dealing) < 0.95


def took(routing: Routing, owner: Ints, policy: Bottleneck, context: Context) -> tuple[Plan, float]:
    plan = select(routing, owner, np.empty(0), policy, context)
    asked = owner[routing.experts] if plan.devices is None else plan.devices
    assert isinstance(context.model, LatencyModel)
    return plan, block_ms(routing.experts, asked, len(owner), context.model, plan.keep)


@media
@pytest.mark.parametrize("tokens", [1, 20])
def test_bottleneck_moves_first_and_leaves_out_then(medium: Medium, tokens: int) -> None:
    helped = 0
    for seed in range(15):
        rng = np.random.default_rng(seed)
        routing = route(rng.standard_normal((tokens, 8), np.float32), 2, normalise=True)
        owner, holders = placed(rng, 8, 4, 0.5)
        model = random_model(rng, 4, medium)

        known, unknown = Context(model=model, holders=holders), Context(model=model)
        nothing, moved_ms = took(routing, owner, Bottleneck(budget=(0.0,)), known)
        _, alone_ms = took(routing, owner, Bottleneck(budget=(0.0,)), unknown)
        both, both_ms = took(routing, owner, Bottleneck(budget=(0.2,)), known)
        assert nothing.keep.all()
        np.testing.assert_array_equal(nothing.weights, routing.weights)
        assert moved_ms <= alone_ms and both_ms <= moved_ms * (1 + 1e-9)
        assert routing.weights[~both.keep].sum() <= 0.2 * routing.weights.sum() * (1 + 1e-6)
        if both.devices is not None:  # a pair goes whole, and nobody is asked for what it does not hold
            assert holders[routing.experts, both.devices].all()
            for t in range(tokens):
                assert all(len(set(both.keep[t, both.devices[t] == k].tolist())) == 1 for k in both.devices[t])
        helped += moved_ms < alone_ms
    assert helped > 5


def test_where_nobody_else_holds_anything_nothing_moves() -> None:
    rng = np.random.default_rng(0)
    experts, owner = route(rng.standard_normal((9, 8), np.float32), 2, normalise=True).experts, np.arange(8) % 4
    assert move_rows(experts, owner, owner[:, None] == np.arange(4), random_model(rng, 4, "own")) is None
