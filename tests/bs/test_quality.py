from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from inprocess import open_system

from wdmoe.bs.evaluation import PairedDifference
from wdmoe.bs.policies import Exact, Wlr
from wdmoe.bs.quality import (
    ACCURACY_SETS,
    ComparingScorer,
    Divergence,
    Quality,
    QualityBar,
    TextLikelihood,
    judge,
    kl_divergence,
)
from wdmoe.bs.questions import Choice, Question
from wdmoe.bs.records import Record, summarise
from wdmoe.bs.scoring import DistributedScorer

QUESTIONS = [
    Question("a/0", (Choice((1, 2, 3), (4, 5)), Choice((1, 2, 3), (6, 7, 8)))),
    Question("a/1", (Choice((9, 10), (11,)), Choice((12, 10), (11,)))),
]
POSITIONS = (1 + 1 + 2) + 2  # the first tokens of both answers of a/0 are predicted at one place


def test_kl_equals_the_sum_over_the_vocabulary() -> None:
    rng = np.random.default_rng(0)
    exact, other = rng.normal(size=(2, 70, 50)).astype(np.float32) * 5
    p, q = (np.exp(logits.astype(np.float64)) for logits in (exact, other))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    assert kl_divergence(exact, other) == pytest.approx((p * np.log(p / q)).sum(1), rel=1e-6, abs=1e-6)
    assert (kl_divergence(exact, exact) == 0).all()


def test_kl_neither_overflows_nor_sees_a_constant() -> None:
    exact = np.array([[500.0, -500.0, 0.0], [1.0, 2.0, 3.0]], np.float32)
    assert kl_divergence(exact, exact + np.float32(64)) == pytest.approx([0.0, 0.0], abs=1e-12)
    assert kl_divergence(exact[:1], exact[:1, ::-1]) == pytest.approx([500.0])


def test_divergence_counts_positions() -> None:
    divergence = Divergence()
    assert math.isnan(divergence.mean)
    for values in ([0.1, 0.3], [], [0.2]):
        divergence.add(np.array(values))
    assert (divergence.positions, divergence.mean, divergence.largest) == pytest.approx((3, 0.2, 0.3))


def test_text_likelihood_is_of_a_token() -> None:
    text = TextLikelihood(tokens=10, exact=-10 * math.log(40.0), policy=-10 * math.log(42.0))
    assert (text.exact_perplexity, text.policy_perplexity) == pytest.approx((40.0, 42.0))
    assert text.ratio == pytest.approx(1.05)


def test_exact_and_policies_answer_question_by_question(bundle: Path) -> None:
    with open_system(bundle) as system:
        window = system.manifest.model.sliding_window
        scorer = ComparingScorer(system.pipeline, [Exact(), Wlr(alpha=1.0)], window)
        announced: list[int] = []
        answers = scorer.score(QUESTIONS, lambda number, _: announced.append(number))
        exact = DistributedScorer(system.pipeline, Exact(), 1, window).score(QUESTIONS)
        wlr = DistributedScorer(system.pipeline, Wlr(alpha=1.0), 1, window).score(QUESTIONS)
    assert announced == [0, 1]
    assert [scorer.answers["exact"][question.name] for question in QUESTIONS] == answers == exact
    for question, expected in zip(QUESTIONS, wlr, strict=True):
        name = next(name for name in scorer.answers if name != "exact")
        assert scorer.answers[name][question.name].log_likelihoods == pytest.approx(expected.log_likelihoods, abs=1e-4)
        assert scorer.divergences[name].positions == POSITIONS and scorer.divergences[name].mean > 0
        assert [record.name for record in scorer.records[name]] == ["a/0", "a/1"]
    assert (scorer.divergences["exact"].positions, scorer.divergences["exact"].largest) == (POSITIONS, 0.0)


def quality(ratio: float = 1.0, divergence: float = 0.0, points: float = 0.0, rows: int = 5000) -> Quality:
    return Quality(
        "some",
        TextLikelihood(1, 0.0, -math.log(ratio)),
        Divergence(1, divergence, divergence),
        PairedDifference("acc", rows, points, 0.5),
        (),
        summarise([Record("q", 1)]),
    )


@pytest.mark.parametrize(
    ("measured", "missed"),
    [
        (quality(), []),
        (quality(ratio=1.0199, divergence=0.02, points=-0.0199), []),
        (quality(ratio=1.0201), ["perplexity ratio"]),
        (quality(divergence=0.0201), ["mean KL, nats"]),
        (quality(points=-0.0201), ["acc, lower 95 % end"]),  # - 1.96 x 0.5
        (quality(rows=4999), ["rows behind it"]),
        (replace(quality(), divergence=Divergence()), ["mean KL, nats"]),
        (replace(quality(), accuracy=PairedDifference("acc", 5000, 0.0, math.nan)), ["acc, lower 95 % end"]),
    ],
)
def test_each_criterion_is_held_against_its_bound(measured: Quality, missed: list[str]) -> None:
    assert [criterion.name for criterion in judge(measured, QualityBar()) if not criterion.reached] == missed


def test_the_command_names_the_five_sets() -> None:
    from wdmoe.bs.cli_quality import _DATASETS

    assert _DATASETS == ACCURACY_SETS
