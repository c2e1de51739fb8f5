from __future__ import annotations

import numpy as np
import pytest

from wdmoe.bs.policies import AUTO_LOSS, Bottleneck, Exact, Wlr, parse_policy, resolve_auto, select
from wdmoe.bs.routing import Routing, pairs_used, route

OWNER = np.array([0, 0, 1, 1, 2, 2, 3, 3])


def routing(tokens: int, k: int, seed: int = 0, spread: float = 1.0) -> Routing:
    logits = np.random.default_rng(seed).standard_normal((tokens, 8)).astype(np.float32) * spread
    return route(logits, k, normalise=True)


def wlr_by_the_book(routing: Routing, row_ms: np.ndarray, policy: Wlr) -> tuple[np.ndarray, float]:
    """The published loop, token by token, as reference for the vectorised one."""

    def ratio(pairs: list[dict[int, float]]) -> float:
        total = 0.0
        for device in range(len(row_ms)):
            weights = [p[device] for p in pairs if device in p]
            if weights:
                total += sum(weights) / (len(weights) * row_ms[device])
        return total

    start: list[dict[int, float]] = []
    for experts, weights in zip(routing.experts, routing.weights, strict=True):
        pairs: dict[int, float] = {}
        for expert, weight in zip(experts, weights, strict=True):
            pairs[OWNER[expert]] = pairs.get(OWNER[expert], 0.0) + float(weight)
        start.append(pairs)
    step = 0
    while True:
        theta = min(1.0, policy.alpha + step * policy.step)
        kept: list[dict[int, float]] = []
        for pairs in start:
            vector = np.array([pairs.get(k, 0.0) for k in range(len(row_ms))])
            similarity = vector @ row_ms / np.linalg.norm(vector) / np.linalg.norm(row_ms)
            minor = min(pairs, key=lambda k: (pairs[k], k))
            drop = len(pairs) > 1 and (similarity <= theta or theta >= 1)
            kept.append({k: w for k, w in pairs.items() if not (drop and k == minor)})
        if ratio(kept) / ratio(start) > policy.gamma or theta >= 1:
            used = np.array([[k in pairs for k in range(len(row_ms))] for pairs in kept])
            return used, theta
        step += 1


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("k", [2, 4])
def test_wlr_drops_what_the_published_loop_drops(seed: int, k: int) -> None:
    rng = np.random.default_rng(100 + seed)
    row_ms = rng.uniform(0.5, 5.0, 4)
    policy = Wlr(alpha=float(rng.uniform(0.2, 0.9)), gamma=float(rng.uniform(1.0, 1.2)))
    chosen = routing(17, k, seed)
    plan = select(chosen, OWNER, row_ms, policy)
    used, theta = wlr_by_the_book(chosen, row_ms, policy)
    np.testing.assert_array_equal(pairs_used(chosen.experts, plan.keep, OWNER, 4), used)
    assert plan.theta == pytest.approx(theta)


def test_exact_keeps_everything() -> None:
    chosen = routing(5, 4)
    plan = select(chosen, OWNER, np.ones(4), Exact())
    assert plan.keep.all()
    np.testing.assert_array_equal(plan.weights, chosen.weights)


@pytest.mark.parametrize("seed", range(5))
def test_wlr_leaves_every_token_an_expert_and_at_most_one_pair_less(seed: int) -> None:
    chosen = routing(50, 4, seed)
    plan = select(chosen, OWNER, np.array([1.0, 2.0, 4.0, 8.0]), Wlr())
    before = pairs_used(chosen.experts, np.ones_like(plan.keep), OWNER, 4).sum(axis=1)
    after = pairs_used(chosen.experts, plan.keep, OWNER, 4).sum(axis=1)
    assert (after >= 1).all()
    assert ((before - after == 0) | (before - after == 1)).all()


def test_wlr_drops_the_minor_pair_on_a_slow_device_before_the_major_one() -> None:
    weights = np.array([[0.9, 0.1], [0.1, 0.9]], np.float32)
    chosen = Routing(np.array([[0, 6], [0, 6]]), weights)  # device 0 is fast, device 3 slow
    plan = select(chosen, OWNER, np.array([1.0, 1.0, 1.0, 10.0]), Wlr(alpha=0.5, gamma=1.0))
    np.testing.assert_array_equal(plan.keep, [[True, False], [True, True]])


def test_renormalising_keeps_the_sum_of_a_tokens_weights() -> None:
    chosen = routing(30, 4)
    kept = select(chosen, OWNER, np.ones(4), Wlr(alpha=1.0))
    np.testing.assert_allclose(kept.weights.sum(axis=1), chosen.weights.sum(axis=1), rtol=1e-5)
    raw = select(chosen, OWNER, np.ones(4), Wlr(alpha=1.0, renormalise=False))
    np.testing.assert_array_equal(raw.weights[raw.keep], chosen.weights[raw.keep])
    assert (raw.weights[~raw.keep] == 0).all()


def test_wlr_says_why_it_stopped() -> None:
    chosen = routing(30, 4)
    assert select(chosen, OWNER, np.ones(4), Wlr(gamma=100.0)).stopped == "theta at its end"
    assert select(chosen, OWNER, np.ones(4), Wlr(alpha=1.0, gamma=1.0)).stopped is not None


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("exact", Exact()),
        ("wlr", Wlr()),
        ("wlr:alpha=0.4,renormalise=false", Wlr(alpha=0.4, renormalise=False)),
        ("wlr:gamma=1.2", Wlr(gamma=1.2)),
    ],
)
def test_policies_are_read_as_typed_and_described_so_that_they_can_be_typed_again(
    text: str, policy: Exact | Wlr
) -> None:
    assert parse_policy(text) == policy
    assert parse_policy(policy.describe()) == policy


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("fastest", "unknown policy 'fastest', expected one of exact, wlr"),
        ("wlr:theta=1", "no option 'theta'; it has: alpha"),
        ("exact:alpha=1", "no option 'alpha'; it has: none"),
        ("wlr:alpha=high", "expected a number"),
        ("wlr:alpha=2", "expected 0 to 1"),
        ("wlr:alpha=nan", "expected 0 to 1"),
        ("wlr:step=0", "expected more than 0"),
        ("wlr:gamma=0.9", "at least 1"),
        ("wlr:renormalise=maybe", "expected true or false"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_policy(text)


def test_auto_keeps_to_a_loss_where_blocks_are_known_and_to_a_budget_elsewhere() -> None:
    assert parse_policy(resolve_auto("auto", calibrated=True)) == Bottleneck(loss=AUTO_LOSS, renormalise=False)
    assert resolve_auto("auto", calibrated=False) == "bottleneck"
    for text in ("exact", "wlr:alpha=0.4", "automatic"):
        assert resolve_auto(text, calibrated=True) == text


@pytest.mark.parametrize("text", ["auto:", "auto:loss=0.02", "auto:renormalise=true"])
def test_auto_takes_no_options(text: str) -> None:
    with pytest.raises(ValueError, match=f"policy auto takes no options, got '{text}'; name the policy"):
        resolve_auto(text, calibrated=True)


def test_routing_chooses_as_softmax_and_topk_do() -> None:
    logits = np.array([[1.0, 3.0, 2.0, 3.0]], np.float32)
    chosen = route(logits, 2, normalise=False)
    np.testing.assert_array_equal(chosen.experts, [[1, 3]])
    expected = np.exp(3.0) / np.exp(logits).sum()
    np.testing.assert_allclose(chosen.weights, [[expected, expected]], rtol=1e-6)
    np.testing.assert_allclose(route(logits, 2, normalise=True).weights, [[0.5, 0.5]], rtol=1e-6)
