from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inprocess import open_system

from wdmoe.bs.evaluation import PairedDifference, load_task
from wdmoe.bs.policies import Exact, Wlr
from wdmoe.bs.quality import (
    ACCURACY_SETS,
    Compared,
    ComparingScorer,
    Divergence,
    Finished,
    Part,
    Quality,
    QualityBar,
    TextLikelihood,
    judge,
    kl_divergence,
    measure_quality,
)
from wdmoe.bs.questions import Answer, Choice, Question
from wdmoe.bs.records import BlockRecord, Record, summarise
from wdmoe.bs.results import read_finished, write_finished
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
    part = scorer.part
    assert [part.exact[question.name] for question in QUESTIONS] == answers == exact
    (compared,) = (compared for name, compared in part.policies.items() if name != "exact")
    for question, expected in zip(QUESTIONS, wlr, strict=True):
        assert compared.answers[question.name].log_likelihoods == pytest.approx(expected.log_likelihoods, abs=1e-4)
    assert compared.divergence.positions == POSITIONS and compared.divergence.mean > 0
    assert [record.name for record in compared.records] == ["a/0", "a/1"]
    itself = part.policies["exact"]
    assert list(itself.answers.values()) == answers
    assert (itself.divergence.positions, itself.divergence.largest) == (POSITIONS, 0.0)


def test_what_is_finished_is_not_done_again(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bundle / "bs" / "tokenizer.json"))
    tasks, text = [load_task("piqa-sample")], [Question("text/0", (Choice((1,), (2, 3, 4, 5)),))]
    options: dict[str, Any] = {"max_length": 512, "window": None, "batch": 2, "limit": 3}
    stages: list[int] = []
    with open_system(bundle) as system:
        done = Finished()
        first = measure_quality(
            system.pipeline, [Wlr()], tasks, text, tokenizer, **options, finished=done,
            on_finished=lambda finished: stages.append(len(finished.likelihoods) + len(finished.parts)),
        )  # fmt: skip
        steps: list[str] = []
        monkeypatch.setattr(system.pipeline, "run", None)
        again = measure_quality(
            system.pipeline, [Wlr()], tasks, text, tokenizer, **options, finished=done, on_step=steps.append
        )
    assert stages == [1, 2, 3] and steps == []
    assert again == first and first[0].accuracy.rows == 3


def test_what_is_finished_can_be_kept_and_is_refused_elsewhere(tmp_path: Path) -> None:
    answer = Answer((-1.5, -0.25), (False, True))
    record = Record("a/0", 7, blocks=[BlockRecord(4, 2, 3, 1.0, 0.25, None, None)])
    compared = Compared({"a/0": answer}, Divergence(3, 0.5, 0.25), [record])
    finished = Finished({"exact": -10.0, "wlr": -11.0}, {"digest": Part({"a/0": answer}, {"wlr": compared})})
    path, now = tmp_path / "q.json.unfinished", {"wire": "fp32", "policies": ["wlr"]}
    assert read_finished(path, now) == (Finished(), None)
    write_finished(path, now, finished)
    assert read_finished(path, now) == (finished, None)
    assert read_finished(path, now | {"wire": "fp16"}) == (Finished(), "wire was 'fp32' and is 'fp16'")
    path.write_text("half of")
    assert read_finished(path, now)[0] == Finished() and "cannot be read" in str(read_finished(path, now)[1])


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
