from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from devices import random_model

from wdmoe.bs.airtime import Load, few_finish_ms, load_of, makespan
from wdmoe.bs.allocation import Radio, uniform
from wdmoe.bs.deciding import Division, decide, make_band, row_times
from wdmoe.bs.policies import POLICIES, Context, parse_policy
from wdmoe.bs.routing import Routing, route

OWNER = np.array([0, 0, 1, 1, 2, 2, 3, 3])
DIVISIONS: tuple[Division, ...] = ("uniform", "per-block", "shared")


def drawn(seed: int, tokens: int) -> tuple[Routing, Context, np.random.Generator]:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((tokens, 8)).astype(np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return route(logits, 2, normalise=True), Context(probabilities=probabilities), rng


@pytest.mark.parametrize("tokens", [1, 50])
@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("name", POLICIES)
def test_a_decision_is_whole(name: str, division: Division, tokens: int) -> None:
    routing, context, rng = drawn(tokens, tokens)
    devices = random_model(rng, 4, "own")
    radio = Radio(20e6, 65_536.0, rng.uniform(2, 6, 4), rng.uniform(2, 6, 4))
    exact = decide(routing, OWNER, parse_policy("exact"), make_band(devices, radio), division, context)
    found = decide(routing, OWNER, parse_policy(name), make_band(devices, radio), division, context)
    assert (found.shares_hz is None) == (division == "shared") == (found.block.order is not None)
    if found.shares_hz is not None:
        assert found.shares_hz.sum() == pytest.approx(radio.bandwidth_hz)
    assert found.block.total_ms == found.block.finish_ms.max() > 0
    assert found.load.rows.sum() <= exact.load.rows.sum()
    if name == "bottleneck":
        assert found.block.total_ms <= exact.block.total_ms * (1 + 1e-9)


@pytest.mark.parametrize("name", ["wlr", "capacity"])
def test_further_rounds_never_make_a_block_longer(name: str) -> None:
    for seed in range(10):
        routing, context, rng = drawn(seed, 40)
        devices, radio = random_model(rng, 4, "own"), Radio(20e6, 65_536.0, *rng.uniform(1, 6, (2, 4)))
        once, thrice = (
            decide(
                routing, OWNER, parse_policy(name), make_band(devices, radio), "per-block", context, rounds
            ).block.total_ms
            for rounds in (1, 3)
        )
        assert thrice <= once


def test_a_fixed_division_is_taken_as_it_is() -> None:
    routing, context, rng = drawn(0, 20)
    devices, radio = random_model(rng, 4, "own"), Radio(20e6, 65_536.0, *rng.uniform(1, 6, (2, 4)))
    fixed = decide(routing, OWNER, parse_policy("exact"), make_band(devices, radio), uniform(radio), context)
    same = decide(routing, OWNER, parse_policy("exact"), make_band(devices, radio), "uniform", context)
    assert fixed.block.total_ms == same.block.total_ms


@pytest.mark.parametrize("tokens", [1, 30])
def test_row_times_are_those_of_the_live_model(tokens: int) -> None:
    routing, _, rng = drawn(3, tokens)
    model = replace(random_model(rng, 4, "own"), staging_ms=np.zeros(4))
    counts = np.bincount(routing.experts.ravel(), minlength=8)
    for k, time_ms in enumerate(row_times(routing, OWNER, model)):
        calls = [int(n) for n in counts[k == OWNER] if n] or [1]
        alone = 2 * model.way_ms[k] + model.call_ms(np.full(len(calls), k), np.array(calls)).sum()
        assert time_ms == pytest.approx(alone / sum(calls) + model.row_air_ms[k])


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
