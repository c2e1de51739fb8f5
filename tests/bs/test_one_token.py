"""One token in plain numbers is decided like many in arrays."""

from __future__ import annotations

import numpy as np
import pytest
from devices import random_model

from wdmoe.bs.airtime import Medium, few_finish_ms, latency_model, makespan
from wdmoe.bs.allocation import per_block
from wdmoe.bs.deciding import context_of, decide, load_of_plan, model_of, pairs_of_model
from wdmoe.bs.latency import DeviceLatency
from wdmoe.bs.one_token import RowModel, asked_of, block_ms
from wdmoe.bs.policies import Context, Sensitivity, parse_policy, select
from wdmoe.bs.policies.options import Options
from wdmoe.bs.policies.pairs import affordable_of_one, within_budget
from wdmoe.bs.routing import Ints, Routing, route

MEDIA: tuple[Medium, ...] = ("own", "shared", "pooled")
media = pytest.mark.parametrize("medium", MEDIA)


def devices(rng: np.random.Generator, n: int) -> list[DeviceLatency]:
    """Unlike devices, half of which were measured from two tokens on."""
    return [
        DeviceLatency(
            curve=((1 + k % 2, float(rng.uniform(0.2, 2))), (64, 9.0)),
            round_trip_ms=float(rng.uniform(0, 3)),
            correction=float(rng.uniform(0.5, 2)),
            row_link_ms=float(rng.uniform(0, 0.5)),
            up_part=float(rng.uniform(0.2, 0.8)),
            staging_ms=float(rng.uniform(0, 0.05)),
        )
        for k in range(n)
    ]


@media
def test_a_row_takes_what_the_latency_model_says(medium: Medium) -> None:
    known = devices(np.random.default_rng(0), 6)
    rows, arrays = RowModel(known, medium), latency_model(known, 1, medium)
    assert [rows.row(k) for k in range(rows.n_devices)] == [arrays.row(k) for k in range(6)]
    assert isinstance(model_of(known, 1, medium), RowModel) and not isinstance(model_of(known, 2, medium), RowModel)


@media
def test_a_block_takes_what_it_takes_for_several_devices(medium: Medium) -> None:
    rng = np.random.default_rng(1)
    for seed in range(200):
        model = random_model(rng, 5, medium)
        who = rng.permutation(5)[: 1 + seed % 4].tolist()
        asked = [asked_of(k, int(rng.integers(1, 3)), model) for k in who]
        assert block_ms(asked, medium) == pytest.approx(max(few_finish_ms(asked, medium)[0]), rel=1e-12)


@media
@pytest.mark.parametrize("top_k", [2, 5])
@pytest.mark.parametrize("name", ["exact", "round-robin", "ser", "top-cut:pairs=true", "wlr", "bottleneck:budget=0.5"])
def test_its_load_and_time_are_those_of_its_plan(name: str, top_k: int, medium: Medium) -> None:
    left_out = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        owner, known, policy = rng.integers(0, 4, 8), devices(rng, 4), parse_policy(name)
        holders = (owner[:, None] == np.arange(4)) | (rng.random((8, 4)) < 0.2)
        logits = rng.standard_normal((1, 8)).astype(np.float32)
        routing = route(logits, top_k, normalise=True)
        context = context_of(policy, seed, routing, logits, known, medium, holders=holders)
        found = decide(routing, owner, policy, context, model_of(known, 1, medium))

        arrays = latency_model(known, 1, medium)
        load = load_of_plan(found.plan, routing, owner, 4)
        for part in ("rows", "device", "tokens"):
            np.testing.assert_array_equal(getattr(found.load, part), getattr(load, part))
        block = makespan(load, arrays)
        assert found.block.total_ms == pytest.approx(block.total_ms, rel=1e-12)
        np.testing.assert_allclose(found.block.finish_ms, block.finish_ms, rtol=1e-12)
        assert (found.block.order is None) == (medium != "shared")
        if found.block.order is not None and block.order is not None:
            np.testing.assert_array_equal(found.block.order, block.order)
        assert (found.shares is None) == (medium != "pooled")
        if found.shares is not None:
            np.testing.assert_allclose(found.shares, per_block(load, arrays)[0], rtol=1e-12)
        asked = owner[routing.experts] if found.plan.devices is None else found.plan.devices
        assert pairs_of_model(found.plan, routing, owner, 4) == len(set(asked[0].tolist()))
        left_out += not found.plan.keep.all()
    assert left_out or name in ("exact", "round-robin")


def twice(routing: Routing) -> Routing:
    return Routing(np.repeat(routing.experts, 2, axis=0), np.repeat(routing.weights, 2, axis=0))


@pytest.mark.parametrize("renormalise", ["true", "false"])
@pytest.mark.parametrize("protect", ["true", "false"])
@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
@pytest.mark.parametrize("name", ["ser:t=0.6", "top-cut:n=1", "top-cut:n=2,pairs=true", "wlr:gamma=9"])
def test_it_loses_what_it_would_among_others(name: str, top_k: int, protect: str, renormalise: str) -> None:
    lost = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        owner, norms = rng.integers(0, 4, 10), rng.uniform(0.5, 2, 10).astype(np.float32)
        routing = route(rng.standard_normal((1, 10)).astype(np.float32), top_k, normalise=True)
        row_ms = rng.uniform(1, 5, 4)
        for importance in ("weight", "norm"):
            policy = parse_policy(f"{name},protect={protect},renormalise={renormalise},importance={importance}")
            context = Context(norms=norms)
            one = select(routing, owner, row_ms, policy, context)
            two = select(twice(routing), owner, row_ms, policy, context)
            np.testing.assert_array_equal(one.keep[0], two.keep[0])
            np.testing.assert_array_equal(one.weights[0], two.weights[0])
            assert (one.theta, one.stopped) == (two.theta, two.stopped)
            lost += not one.keep.all()
    assert lost or top_k == 1 or (top_k == 2 and "n=2" in name)  # where nothing can go


def test_ties_go_as_among_others() -> None:
    """Where float32 finds equal what more digits would not."""
    halves, thirds = np.array([[0.5, 0.3]], np.float32), np.array([[0.5, 0.3, 0.2]], np.float32)
    for name, weights in (("ser:t=0.6", halves), ("top-cut:n=1,pairs=true", thirds)):
        routing = Routing(np.arange(weights.shape[1])[None], weights)
        one, two = (select(r, np.array([0, 1, 1]), np.ones(2), parse_policy(name)) for r in (routing, twice(routing)))
        np.testing.assert_array_equal(one.keep[0], two.keep[0])


@pytest.mark.parametrize("name", ["ser:loss=0.3", "wlr:budget=0.2", "top-cut"])
def test_its_costs_are_those_of_many(name: str) -> None:
    rng, policy = np.random.default_rng(0), parse_policy(name)
    assert isinstance(policy, Options)
    context = Context(sensitivity={"weight": Sensitivity(0.7, 0.1)})
    for k in range(1, 9):
        importance = rng.random((1, k)).astype(np.float32)
        costs, allowance = policy.costs(importance, importance, context)
        one = policy.costs_of_one(importance[0].tolist(), importance[0].tolist(), context)
        assert list(one[0]) == costs[0].tolist() and one[1] == pytest.approx(allowance, rel=1e-12)


def test_it_keeps_to_a_budget_as_many_do() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        k = int(rng.integers(1, 9))
        drop, importance = rng.random(k) < 0.7, rng.choice([0.125, 0.25, 0.5, rng.random()], k).astype(np.float32)
        allowance = float(rng.choice([0.0, 0.25, 0.75, 3.0, np.inf, rng.random()]))
        expected: Ints = np.flatnonzero(within_budget(drop, importance, allowance))
        out = affordable_of_one(np.flatnonzero(drop).tolist(), importance.tolist(), allowance)
        assert sorted(out) == expected.tolist()
