"""What every policy must hold, and the rules of those that are not `wlr` or `bottleneck`."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from wdmoe.bs.dispatch import split_by_device
from wdmoe.bs.policies import POLICIES, Capacity, Context, Exact, RoundRobin, Ser, TopCut, parse_policy, select
from wdmoe.bs.routing import Plan, Routing, pairs_used, route

OWNER = np.array([0, 0, 1, 1, 2, 2, 3, 3])
ROW_MS = np.array([1.0, 2.0, 4.0, 8.0])
LOSSY = [name for name in POLICIES if name not in ("exact", "round-robin")]


def random_routing(seed: int, tokens: int = 40, k: int = 3) -> tuple[Routing, np.ndarray]:
    logits = np.random.default_rng(seed).standard_normal((tokens, 8)).astype(np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return route(logits, k, normalise=True), probabilities


def chosen(text: str, seed: int, tokens: int = 40) -> tuple[Routing, Plan]:
    routing, probabilities = random_routing(seed, tokens)
    norms = np.random.default_rng(9).uniform(0.5, 2, 8).astype(np.float32)
    context = Context(block=1, norms=norms, probabilities=probabilities)
    return routing, select(routing, OWNER, ROW_MS, parse_policy(text), context)


def with_options(name: str, options: str) -> str:
    return f"{name}:{options}"


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("options", ["", "renormalise=false", "protect=true", "importance=norm", "budget=0.05"])
@pytest.mark.parametrize("seed", range(4))
def test_no_token_loses_its_last_expert_and_sums_are_kept(name: str, options: str, seed: int) -> None:
    routing, plan = chosen(with_options(name, options), seed, tokens=(1, 2, 40, 300)[seed])
    assert plan.keep.any(axis=1).all()
    assert (plan.weights[~plan.keep] == 0).all() and plan.weights.dtype == np.float32
    if "renormalise" in options:
        np.testing.assert_array_equal(plan.weights[plan.keep], routing.weights[plan.keep])
    else:
        np.testing.assert_allclose(plan.weights.sum(axis=1), routing.weights.sum(axis=1), rtol=1e-5)
    if "protect" in options:
        assert plan.keep[:, 0].all()
    if "budget" in options:
        left_out = routing.weights[~plan.keep].sum(dtype=np.float64)
        assert left_out <= 0.05 * routing.weights.sum(dtype=np.float64) * (1 + 1e-6)


@pytest.mark.parametrize("name", LOSSY)
def test_a_budget_takes_the_least_important_first_and_more_of_it_never_keeps_more(name: str) -> None:
    kept = [chosen(with_options(name, f"budget={share}"), 3)[1].keep for share in (0.0, 0.02, 0.1, 0.5, 1.0)]
    assert kept[0].all() and not kept[-1].all()
    assert all((later.sum() <= earlier.sum()) for earlier, later in pairwise(kept))


@pytest.mark.parametrize("name", LOSSY)
def test_the_order_of_the_devices_does_not_matter(name: str) -> None:
    routing, _ = random_routing(5)
    order = np.array([2, 0, 3, 1])
    policy = parse_policy(name)
    plan = select(routing, OWNER, ROW_MS, policy)
    turned = select(routing, np.argsort(order)[OWNER], ROW_MS[order], policy)
    np.testing.assert_array_equal(plan.keep, turned.keep)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_described_as_it_is_typed(name: str) -> None:
    assert parse_policy(name).describe() == name


@pytest.mark.parametrize(
    "text",
    [
        "ser:k_min=2,t=0.3",
        "top-cut:n=2,pairs=true,protect=true",
        "capacity:factor=1.5,overflow=next",
        "bottleneck:importance=norm,budget=0.1/0.2/0.05",
        "wlr:alpha=0.4,budget=0.1",
    ],
)
def test_options_can_be_typed_again(text: str) -> None:
    assert parse_policy(parse_policy(text).describe()) == parse_policy(text)
    assert parse_policy(text).describe() == text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("ser:k_min=0", "k_min is 0, expected at least 1"),
        ("ser:k_min=1.5", "expected a whole number"),
        ("ser:t=2", "t is 2.0, expected 0 to 1"),
        ("top-cut:n=0", "expected at least 1"),
        ("capacity:factor=0", "expected more than 0"),
        ("capacity:factor=nan", "expected more than 0"),
        ("capacity:overflow=away", "expected one of drop, next"),
        ("bottleneck:budget=0.1/2", "budget is 2.0, expected shares from 0 to 1"),
        ("bottleneck:budget=much", "expected a number, or one for each block"),
        ("bottleneck:importance=luck", "expected one of weight, norm"),
        ("round-robin:budget=1", "it has: none"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_policy(text)


def test_ser_keeps_what_is_near_the_top() -> None:
    routing = Routing(np.array([[0, 1, 2], [3, 4, 5]]), np.array([[0.5, 0.3, 0.2], [0.8, 0.15, 0.05]], np.float32))
    plan = select(routing, OWNER, ROW_MS, Ser(t=0.5))
    np.testing.assert_array_equal(plan.keep, [[True, True, False], [True, False, False]])
    plan = select(routing, OWNER, ROW_MS, Ser(t=0.5, k_min=2))
    np.testing.assert_array_equal(plan.keep, [[True, True, False], [True, True, False]])


def test_top_cut_counts_experts_or_pairs() -> None:
    routing = Routing(np.array([[2, 0, 1]]), np.array([[0.4, 0.35, 0.25]], np.float32))
    np.testing.assert_array_equal(select(routing, OWNER, ROW_MS, TopCut()).keep, [[True, False, False]])
    np.testing.assert_array_equal(select(routing, OWNER, ROW_MS, TopCut(n=2)).keep, [[True, True, False]])
    # Experts 0 and 1 are one pair on device 0, and together more than expert 2.
    np.testing.assert_array_equal(select(routing, OWNER, ROW_MS, TopCut(pairs=True)).keep, [[False, True, True]])
    protected = select(routing, OWNER, ROW_MS, TopCut(pairs=True, protect=True))
    np.testing.assert_array_equal(protected.keep, [[True, True, True]])


def test_capacity_caps_rows_by_speed_and_drops_the_least_important() -> None:
    routing, _ = random_routing(2, tokens=400, k=2)
    plan = select(routing, OWNER, ROW_MS, Capacity(factor=1.0))
    before = pairs_used(routing.experts, np.ones_like(plan.keep), OWNER, 4).sum(axis=0)
    after = pairs_used(routing.experts, plan.keep, OWNER, 4)
    cap = np.ceil(before.sum() * (1 / ROW_MS) / (1 / ROW_MS).sum())
    single = after.sum(axis=1) == 1
    assert (before > cap).any() and (after.sum(axis=0) < before)[before > cap].all()
    # What is over the cap is a token's last pair.
    for device in np.flatnonzero(after.sum(axis=0) > cap):
        assert single[after[:, device]].sum() >= after[:, device].sum() - cap[device]
    np.testing.assert_array_equal(after.sum(axis=0)[before <= cap], before[before <= cap])
    slow = OWNER[routing.experts] == 3
    assert routing.weights[slow & ~plan.keep].mean() < routing.weights[slow & plan.keep].mean()


def test_capacity_offers_the_excess_to_the_next_expert_that_has_room() -> None:
    routing, probabilities = random_routing(2, tokens=400, k=2)
    policy, context = Capacity(factor=1.0, overflow="next"), Context(probabilities=probabilities)
    dropped = select(routing, OWNER, ROW_MS, Capacity(factor=1.0))
    offered = select(routing, OWNER, ROW_MS, policy, context)
    assert offered.experts is not None
    replaced = offered.experts != routing.experts
    assert replaced.any() and (offered.keep[replaced]).all()
    np.testing.assert_array_equal(offered.keep & ~replaced, dropped.keep)
    assert all(len(set(experts)) == len(experts) for experts in offered.experts.tolist())
    used = pairs_used(offered.experts, offered.keep, OWNER, 4).sum(axis=0)
    before = pairs_used(routing.experts, np.ones_like(offered.keep), OWNER, 4).sum(axis=0)
    cap = np.ceil(before.sum() * (1 / ROW_MS) / (1 / ROW_MS).sum())
    assert (used <= np.maximum(cap, pairs_used(routing.experts, dropped.keep, OWNER, 4).sum(axis=0))).all()
    np.testing.assert_allclose(offered.weights.sum(axis=1), 1, rtol=1e-5)
    with pytest.raises(ValueError, match="needs the router's probabilities"):
        select(routing, OWNER, ROW_MS, policy)


def test_round_robin_deals_rows_to_all_holders_and_changes_no_weight() -> None:
    routing, _ = random_routing(1, tokens=60, k=2)
    holders = np.zeros((8, 4), np.bool_)
    holders[np.arange(8), OWNER] = True
    assert select(routing, OWNER, ROW_MS, RoundRobin(), Context(holders=holders)).devices is None
    holders[:4, 3] = True
    plan = select(routing, OWNER, ROW_MS, RoundRobin(), Context(holders=holders))
    assert plan.devices is not None and plan.keep.all()
    assert holders[routing.experts, plan.devices].all()
    for expert in range(4):
        dealt = Counter(plan.devices[routing.experts == expert].tolist())
        assert max(dealt.values()) - min(dealt.values()) <= 1 and len(dealt) == 2
    np.testing.assert_array_equal(plan.weights, select(routing, OWNER, ROW_MS, Exact()).weights)


def test_requests_go_where_the_plan_says() -> None:
    routing = Routing(np.array([[0, 2], [0, 4]]), np.array([[0.6, 0.4], [0.7, 0.3]], np.float32))
    keep = np.array([[True, True], [True, False]])
    plan = Plan(keep, routing.weights * keep, experts=np.array([[0, 5], [0, 4]]), devices=np.array([[0, 3], [3, 2]]))
    hidden = np.eye(2, 4, dtype=np.float32)
    first, second = split_by_device(0, routing, plan, OWNER, ("a", "b", "c", "d"), hidden, "fp32")
    assert (first.device, first.request.experts, first.rows.tolist()) == ("a", (0,), [0])
    assert (second.device, second.request.experts, second.rows.tolist()) == ("d", (0, 5), [0, 1])
    assert second.request.counts == (1, 1)
    np.testing.assert_allclose(np.frombuffer(second.request.weights, "<f4"), [0.7, 0.4])
    np.testing.assert_array_equal(np.frombuffer(second.request.index, "<u4"), [1, 0])
