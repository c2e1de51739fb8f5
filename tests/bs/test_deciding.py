from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from devices import random_model

from wdmoe.bs.airtime import Load, Medium, few_finish_ms, latency_model, load_of, makespan
from wdmoe.bs.deciding import choose, context_of, decide, row_times
from wdmoe.bs.latency import DeviceLatency
from wdmoe.bs.policies import POLICIES, Context, parse_policy
from wdmoe.bs.routing import Routing, route, softmax

OWNER = np.array([0, 0, 1, 1, 2, 2, 3, 3])
MEDIA: tuple[Medium, ...] = ("own", "pooled", "shared")


def drawn(seed: int, tokens: int) -> tuple[Routing, Context, np.random.Generator]:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((tokens, 8)).astype(np.float32)
    return route(logits, 2, normalise=True), Context(probabilities=softmax(logits)), rng


@pytest.mark.parametrize("tokens", [1, 50])
@pytest.mark.parametrize("medium", MEDIA)
@pytest.mark.parametrize("name", POLICIES)
def test_a_decision_is_whole(name: str, medium: Medium, tokens: int) -> None:
    routing, context, rng = drawn(tokens, tokens)
    model = random_model(rng, 4, medium)
    context = replace(context, model=model)
    exact = decide(routing, OWNER, parse_policy("exact"), context, model)
    found = decide(routing, OWNER, parse_policy(name), context, model)
    assert (found.shares is not None) == (medium == "pooled") and (found.block.order is not None) == (
        medium == "shared"
    )
    if found.shares is not None:
        assert found.shares.sum() == pytest.approx(1)
    assert found.block.total_ms == found.block.finish_ms.max() > 0
    assert found.load.rows.sum() <= exact.load.rows.sum()
    if name == "bottleneck":
        assert found.block.total_ms <= exact.block.total_ms * (1 + 1e-9)


@pytest.mark.parametrize("name", ["wlr:gamma=1.05", "capacity:factor=0.6"])
def test_further_rounds_never_make_a_block_longer(name: str) -> None:
    gained = 0
    for seed in range(20):
        routing, context, rng = drawn(seed, 40)
        model = random_model(rng, 4, "pooled")
        context = replace(context, model=model)
        once, twice, five = (
            decide(routing, OWNER, parse_policy(f"{name},rounds={rounds}"), context, model).block.total_ms
            for rounds in (1, 2, 5)
        )
        assert five <= twice <= once
        gained += five < once
    assert gained  # and it is not for nothing


@pytest.mark.parametrize("medium", ["own", "shared"])
def test_rounds_are_for_a_band_that_is_divided_for_each_block(medium: Medium) -> None:
    routing, context, rng = drawn(0, 40)
    context = replace(context, model=random_model(rng, 4, medium))
    once, thrice = (choose(routing, OWNER, parse_policy(name), context) for name in ("wlr", "wlr:rounds=3"))
    np.testing.assert_array_equal(once.keep, thrice.keep)


def test_what_a_policy_does_not_look_at_is_not_worked_out() -> None:
    routing, _, _ = drawn(0, 5)
    devices = [DeviceLatency(((1, 2.0), (64, 9.0)), 1.0)] * 4
    for name in (*POLICIES, "capacity:overflow=next"):
        policy = parse_policy(name)
        context = context_of(policy, 3, routing, np.zeros((5, 8), np.float32), devices, "shared")
        assert context.block == 3
        assert (context.model is not None) == (name.partition(":")[0] in ("wlr", "capacity", "bottleneck"))
        assert (context.probabilities is not None) == (name == "capacity:overflow=next")


@pytest.mark.parametrize("tokens", [1, 30])
def test_row_times_are_those_of_the_live_model(tokens: int) -> None:
    routing, _, rng = drawn(3, tokens)
    model = replace(random_model(rng, 4, "own"), staging_ms=np.zeros(4))
    counts = np.bincount(routing.experts.ravel(), minlength=8)
    for k, time_ms in enumerate(row_times(routing, OWNER, model)):
        calls = [int(n) for n in counts[k == OWNER] if n] or [1]
        alone = 2 * model.way_ms[k] + model.call_ms(np.full(len(calls), k), np.array(calls)).sum()
        assert time_ms == pytest.approx(alone / sum(calls) + model.row_air_ms[k])


def test_row_time_falls_with_load_and_an_idle_device_counts_one_row() -> None:
    model = latency_model([DeviceLatency(((1, 1.0), (11, 2.0)), 0.0)] * 2, 16)
    routing = Routing(np.zeros((11, 1), np.int64), np.ones((11, 1), np.float32))
    np.testing.assert_allclose(row_times(routing, np.array([0, 1, 1]), model), [2.0 / 11, 1.0])


@pytest.mark.parametrize("medium", ["own", "shared", "pooled"])
@pytest.mark.parametrize("seed", range(5))
def test_plain_numbers_give_what_arrays_give(medium: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for n in (3, 40):
        model = random_model(rng, n, medium)  # type: ignore[arg-type]
        experts = rng.integers(0, n, (12, 2))
        load = load_of(experts, rng.random((12, 2)) < 0.8, experts, n, n)
        loaded, asked = load.few(model)
        finish_ms, _ = few_finish_ms(asked, model.medium)
        more = Load(load.rows, *(np.append(a, np.zeros(20, np.int64)) for a in (load.device, load.tokens)))
        block = makespan(more, model)
        np.testing.assert_allclose(block.finish_ms[loaded], finish_ms, rtol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_the_load_of_one_token_is_counted_like_that_of_many(seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts, keep = np.array([rng.permutation(8)[:4]]), rng.random((1, 4)) < 0.7
    one = load_of(experts, keep, OWNER[experts], 8, 4)
    nobody = np.concatenate((keep, np.zeros((1, 4), np.bool_)))
    two = load_of(np.repeat(experts, 2, axis=0), nobody, OWNER[np.repeat(experts, 2, axis=0)], 8, 4)
    for name in ("rows", "device", "tokens"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
