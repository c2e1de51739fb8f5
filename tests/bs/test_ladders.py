"""Ladders against a plain walk down each of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from devices import random_model

from wdmoe.bs.airtime import Medium, load_of
from wdmoe.bs.policies import Context, parse_policy, select
from wdmoe.bs.policies.ladders import Ladders, make_ladders
from wdmoe.bs.policies.pairs import calls_of, droppable, make_pairs
from wdmoe.bs.routing import Ints, Routing, route


def walk(routing: Routing, owner: Ints, n_devices: int, allowance: float, rng: np.random.Generator) -> int:
    """Leave out pair after pair as each ladder says, and compare; return how many steps there were."""
    model, n_experts = random_model(rng, n_devices, "own"), len(owner)
    model = replace(model, tables=np.sqrt(model.tables.cumsum(axis=1)))  # each token fewer saves something else
    device = owner[routing.experts]
    pairs = make_pairs(device, routing.weights)
    load = load_of(routing.experts, np.ones(device.shape, np.bool_), device, n_experts, n_devices)
    may = droppable(pairs, protect=False)
    ladders = make_ladders(calls_of(routing.experts, device, n_experts, n_devices), pairs, may, load, model, allowance)
    steps = 0
    for number, who in enumerate(() if ladders is None else ladders.device.tolist()):
        assert ladders is not None
        begin, end = ladders.start[number : number + 2]
        drop, spent = np.zeros(device.shape, np.bool_), 0.0
        for at in range(begin, end - 1):
            left = load_of(routing.experts, pairs.keep_without(drop), device, n_experts, n_devices)
            alone_ms = 2 * model.way_ms + left.compute_ms(model) + left.rows * model.row_air_ms
            assert ladders.alone_ms[at] == pytest.approx(alone_ms[who] if left.rows[who] else 0.0)
            assert ladders.spent[at] == pytest.approx(spent, rel=1e-6)
            spent += float(pairs.importance.ravel()[ladders.lead[at]])
            drop.ravel()[ladders.lead[at]] = True
            steps += 1
    return steps


@pytest.mark.parametrize("allowance", [0.05, 3.0])
@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
@pytest.mark.parametrize("tokens", [2, 4, 30])
def test_each_rung_takes_what_is_left_on_the_device(tokens: int, top_k: int, allowance: float) -> None:
    steps = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        n_devices, n_experts = int(rng.integers(1, 4)), top_k + int(rng.integers(0, 3))
        owner = rng.integers(0, n_devices, n_experts)
        logits = rng.standard_normal((tokens, n_experts)).astype(np.float32)
        steps += walk(route(logits, top_k, normalise=True), owner, n_devices, allowance, rng)
    assert steps > 50 or top_k == 1


def test_pairs_of_several_experts_are_counted_in_the_order_of_the_ladder() -> None:
    experts = np.array([[0, 1, 2], [1, 2, 0], [0, 1, 2], [1, 2, 0]])  # on device 1 a pair begins in slot 1 or in slot 0
    weights = np.array([[0.44, 0.32, 0.24], [0.69, 0.23, 0.08], [0.64, 0.30, 0.06], [0.73, 0.22, 0.05]], np.float32)
    assert walk(Routing(experts, weights), np.array([0, 1, 1]), 2, 0.15, np.random.default_rng(0)) > 8


def test_what_can_all_be_afforded_is_left_out_to_the_end() -> None:
    none = np.zeros(1, np.int64)
    spent, alone_ms = np.array([0, 0.1, 0.2, np.inf]), np.array([4.0, 1.0, 0.0, -1.0])
    steps = np.array([0.1, 0.1, np.inf, np.inf])
    ladders = Ladders(none, none, np.array([0, 4]), np.zeros(4, np.int64), spent, alone_ms, steps, 0.1)
    for allowance, rung in ((0.05, 0), (0.15, 1), (1.0, 2)):
        assert ladders.bring_down(allowance, 40).rungs.tolist() == [rung]


@pytest.mark.parametrize("medium", ["own", "shared", "pooled"])
@pytest.mark.parametrize("tokens", [1, 2, 30])
def test_devices_that_need_no_air_are_unloaded_as_well(tokens: int, medium: Medium) -> None:
    rng = np.random.default_rng(0)
    none = np.zeros(3)
    model = random_model(rng, 3, medium).with_rates(none, none, medium)
    routing = route(rng.standard_normal((tokens, 6)).astype(np.float32), 2, normalise=True)
    policy = parse_policy("bottleneck:budget=0.4,protect=false")
    plan = select(routing, np.arange(6) % 3, np.ones(3), policy, Context(model=model))
    assert routing.weights[~plan.keep].sum() <= 0.4 * routing.weights.sum()
    assert not plan.keep.all() or tokens == 1
