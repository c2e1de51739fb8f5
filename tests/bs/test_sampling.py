from __future__ import annotations

import numpy as np
import pytest

from wdmoe.bs.sampling import Sampling, sample
from wdmoe.runtime.errors import EngineError

LOGITS = np.array([1.0, 3.0, 0.5, 2.5, -4.0], np.float32)


def probabilities(temperature: float = 1.0) -> np.ndarray:
    weights = np.exp(LOGITS.astype(np.float64) / temperature)
    return weights / weights.sum()  # type: ignore[no-any-return]


def drawn(sampling: Sampling, draws: int) -> np.ndarray:
    rng = sampling.rng()
    return np.bincount([sample(LOGITS, sampling, rng) for _ in range(draws)], minlength=len(LOGITS))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_come_as_often_as_softmax_says(temperature: float) -> None:
    draws = 20_000
    counts = drawn(Sampling(temperature, seed=1), draws)
    expected = probabilities(temperature) * draws
    enough = expected >= 5
    chi_square = float((np.square(counts - expected)[enough] / expected[enough]).sum())
    assert chi_square < 18.5  # the 0.1 % point with 4 degrees of freedom
    assert counts[~enough].sum() < 30


@pytest.mark.parametrize(("top_p", "kept"), [(1e-9, 1), (0.5, 1), (0.56, 2), (0.9, 3), (0.999, 4), (1.0, 5)])
def test_top_p_keeps_the_fewest_tokens_that_make_it_up(top_p: float, kept: int) -> None:
    order = np.argsort(-LOGITS)
    assert probabilities()[order[:kept]].sum() >= min(top_p, 1 - 1e-12)
    assert kept == 1 or probabilities()[order[: kept - 1]].sum() < top_p
    counts = drawn(Sampling(1.0, top_p, seed=2), 20_000)
    assert set(np.flatnonzero(counts)) == set(order[:kept])
    share = probabilities()[order[:kept]] / probabilities()[order[:kept]].sum()
    np.testing.assert_allclose(counts[order[:kept]] / 20_000, share, atol=0.012)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(1.0, 1e-12), Sampling(1e-300), Sampling(1e30, 1e-12)], ids=str
)
def test_no_room_for_chance_is_greedy_and_ties_go_to_the_smaller_id(sampling: Sampling) -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        logits = rng.standard_normal(320).astype(np.float32)
        assert sample(logits, sampling, rng) == logits.argmax()
    tied = np.array([0, 7, 7, 1], np.float32)
    assert sample(tied, Sampling(1.0, 1e-12), rng) == sample(tied, Sampling(), rng) == 1


def test_the_same_seed_draws_the_same_tokens() -> None:
    first, second = (Sampling(1.0, seed=5).rng() for _ in range(2))
    draws = [[sample(LOGITS, Sampling(1.0), rng) for _ in range(50)] for rng in (first, second)]
    assert draws[0] == draws[1]


def test_greedy_moves_no_random_numbers() -> None:
    rng = np.random.default_rng(0)
    sample(LOGITS, Sampling(), rng)
    assert rng.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_choose_nothing(bad: float) -> None:
    with pytest.raises(EngineError, match="not all finite"):
        sample(np.array([0, bad], np.float32), Sampling(), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", -0.1, "temperature is -0.1"),
        ("temperature", float("nan"), "temperature is nan"),
        ("top_p", 0.0, "top-p is 0.0"),
        ("top_p", 1.5, "top-p is 1.5"),
        ("max_tokens", 0, "max-tokens is 0"),
        ("stop", ("", "x"), "stop string is empty"),
        ("seed", -1, "seed is -1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(field: str, value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sampling(**{field: value})  # type: ignore[arg-type]
