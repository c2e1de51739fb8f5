"""How far a policy is from exact: perplexity ratio, divergence on answer tokens, pooled paired accuracy.

All three come from the same pipeline in the same run. For choice questions exact and every policy answer one
microbatch before the next is asked, so that only its logits are ever held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.bs.config import InFlight
from wdmoe.bs.evaluation import Evaluation, LoadedTask, PairedDifference, evaluate, paired_difference, pooled_difference
from wdmoe.bs.microbatch import Result, answers_of, in_batches, pack_questions
from wdmoe.bs.pipeline import Pipeline
from wdmoe.bs.policies import Exact, Policy
from wdmoe.bs.questions import Answer, Choice, Question, Scorer
from wdmoe.bs.records import Record, Summary, summarise
from wdmoe.bs.routing import Floats
from wdmoe.bs.scoring import DistributedScorer

ACCURACY_SETS = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande")
PERPLEXITY_SET = "wikitext2"


@dataclass(frozen=True, slots=True)
class QualityBar:
    """What a policy has to reach."""

    perplexity_ratio: float = 1.02  # at most
    divergence: float = 0.02  # mean KL in nats, at most
    points: float = -1.0  # lower end of the 95 % interval of the paired accuracy difference, at least
    rows: int = 5000  # behind that interval, at least


@dataclass(frozen=True, slots=True)
class TextLikelihood:
    """The same tokens of running text, read exactly and under a policy."""

    tokens: int
    exact: float  # sum of log-probabilities, natural logarithm
    policy: float

    @property
    def exact_perplexity(self) -> float:
        """Perplexity of a token, exactly."""
        return math.exp(-self.exact / self.tokens)

    @property
    def policy_perplexity(self) -> float:
        """Perplexity of a token under the policy."""
        return math.exp(-self.policy / self.tokens)

    @property
    def ratio(self) -> float:
        """The policy's perplexity over the exact one."""
        return math.exp((self.exact - self.policy) / self.tokens)


@dataclass(slots=True)
class Divergence:
    """KL(exact || policy) over the whole vocabulary, wherever a token of an answer is predicted."""

    positions: int = 0  # what two choices share counts once
    total: float = 0.0  # nats
    largest: float = 0.0

    @property
    def mean(self) -> float:
        """Nats a position."""
        return self.total / self.positions if self.positions else math.nan

    def add(self, values: npt.NDArray[np.float64]) -> None:
        """Count some positions."""
        self.join(Divergence(len(values), float(values.sum()), float(values.max(initial=0.0))))

    def join(self, other: Divergence) -> None:
        """Count another's positions, too."""
        self.positions += other.positions
        self.total += other.total
        self.largest = max(self.largest, other.largest)


@dataclass(slots=True)
class Compared:
    """How one policy answered some questions."""

    answers: dict[str, Answer] = field(default_factory=dict)  # by question name
    divergence: Divergence = field(default_factory=Divergence)  # from exact
    records: list[Record] = field(default_factory=list)  # of its microbatches


@dataclass(slots=True)
class Part:
    """How exact and every policy answered one data set."""

    exact: dict[str, Answer]  # by question name
    policies: dict[str, Compared]


@dataclass(slots=True)
class Finished:
    """What of a comparison is done, so that a later start need not do it again."""

    likelihoods: dict[str, float] = field(default_factory=dict)  # of the text, by policy
    parts: dict[str, Part] = field(default_factory=dict)  # by the digest of their rows


@dataclass(frozen=True, slots=True)
class Quality:
    """One policy against exact."""

    policy: str
    text: TextLikelihood
    divergence: Divergence
    accuracy: PairedDifference  # all rows of all data sets together
    evaluations: tuple[tuple[Evaluation, Evaluation], ...]  # exact and policy, for each data set
    summary: Summary  # of its choice questions, one at a time

    def by_dataset(self) -> dict[str, PairedDifference]:
        """Compare each data set by itself."""
        return {exact.dataset: paired_difference(policy, exact) for exact, policy in self.evaluations}


@dataclass(frozen=True, slots=True)
class Criterion:
    """One part of the verdict."""

    name: str
    value: float
    bound: float
    at_most: bool  # the bound is the largest value that passes; otherwise the smallest

    @property
    def reached(self) -> bool:
        """Whether the policy passes; a value that is not a number does not."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound


def judge(quality: Quality, bar: QualityBar) -> list[Criterion]:
    """Hold a policy against the bar; it passes where every criterion is reached."""
    return [
        Criterion("perplexity ratio", quality.text.ratio, bar.perplexity_ratio, at_most=True),
        Criterion("mean KL, nats", quality.divergence.mean, bar.divergence, at_most=True),
        Criterion("acc, lower 95 % end", quality.accuracy.interval_points[0], bar.points, at_most=False),
        Criterion("rows behind it", quality.accuracy.rows, bar.rows, at_most=False),
    ]


class ComparingScorer:
    """A `Scorer` that answers exactly; each policy answers the same questions right after.

    Args:
        pipeline: runs the microbatches.
        policies: what to compare with exact.
        window: of the model's attention.
        batch: questions in a microbatch.
    """

    def __init__(self, pipeline: Pipeline, policies: Sequence[Policy], window: int | None, batch: int = 1) -> None:
        self.part = Part({}, {policy.describe(): Compared() for policy in policies})
        self._pipeline = pipeline
        self._policies = policies
        self._window = window
        self._batch = batch

    def score(
        self, questions: Sequence[Question], on_answer: Callable[[int, Answer], None] | None = None
    ) -> list[Answer]:
        """Return the exact answers, in order; see `Scorer`."""
        answers: dict[int, Answer] = {}
        for numbers in in_batches(questions, self._batch):
            asked = [questions[number] for number in numbers]
            exact, _ = self._run(asked, Exact())
            answers |= zip(numbers, answers_of(asked, exact), strict=True)
            for policy in self._policies:
                compared = self.part.policies[policy.describe()]
                result, record = self._run(asked, policy)
                given = answers_of(asked, result)
                compared.answers |= {question.name: answer for question, answer in zip(asked, given, strict=True)}
                compared.records.append(record)
                assert exact.logits is not None and result.logits is not None
                compared.divergence.add(kl_divergence(exact.logits, result.logits))
            for number in numbers:
                self.part.exact[questions[number].name] = answers[number]
                if on_answer is not None:
                    on_answer(number, answers[number])
        return [answers[number] for number in range(len(questions))]

    def _run(self, questions: Sequence[Question], policy: Policy) -> tuple[Result, Record]:
        microbatch = replace(pack_questions(questions, self._window), want_logits=True)
        ((_, result, record),) = self._pipeline.run([microbatch], policy)
        return result, record


@dataclass(frozen=True, slots=True)
class RecordedScorer:
    """A `Scorer` that has answered before."""

    answers: dict[str, Answer] = field(repr=False)  # by question name

    def score(
        self, questions: Sequence[Question], on_answer: Callable[[int, Answer], None] | None = None
    ) -> list[Answer]:
        """Return the answers as they were, without announcing them; see `Scorer`."""
        return [self.answers[question.name] for question in questions]


def kl_divergence(exact: Floats, other: Floats) -> npt.NDArray[np.float64]:
    """Return KL(exact || other) of each row of logits [m, vocab], in nats, good to about 1e-6: [m]."""
    values = np.empty(len(exact))
    # For all rows the same memory: new arrays of this size are mapped and cleared each time, which takes longer than the sums.
    p, q, odds = (np.empty(exact.shape[1], np.float32) for _ in range(3))
    for row, (ours, theirs) in enumerate(zip(exact, other, strict=True)):
        np.subtract(ours, ours.max(), out=p)
        np.subtract(theirs, theirs.max(), out=q)
        # The sums in float64, the terms in float32: twice as fast, and no term is large.
        total = np.exp(p, out=odds).sum(dtype=np.float64)
        np.subtract(p, q, out=p)
        cross = np.multiply(odds, p, out=p).sum(dtype=np.float64)
        total_q = np.exp(q, out=odds).sum(dtype=np.float64)
        values[row] = cross / total - np.log(total) + np.log(total_q)
    return values


def text_windows(
    task: LoadedTask,
    tokenizer: Any,
    *,
    max_length: int,
    tokens: int | None = None,
    prefix_token_id: int | None = None,
) -> list[Question]:
    """Cut the documents of a whole-text task into windows, as the judge does.

    Args:
        task: such as wikitext2.
        tokenizer: as in `evaluate`.
        max_length: as in `evaluate`.
        tokens: only the first ones, counted over documents; None: all.
        prefix_token_id: as in `evaluate`.
    """
    from wdmoe.bs.harness import ScorerLM

    windows = ScorerLM(RecordedScorer({}), tokenizer, max_length, prefix_token_id=prefix_token_id).windows
    left = math.inf if tokens is None else tokens
    questions: list[Question] = []
    for number, row in enumerate(task.judge.eval_docs):
        for question in windows(f"{task.dataset}/{number}", task.judge.doc_to_target(row)):
            if left <= 0:
                return questions
            (choice,) = question.choices
            if len(choice.continuation) > left:
                choice = Choice(choice.context, choice.continuation[: int(left)])
            questions.append(Question(question.name, (choice,)))
            left -= len(choice.continuation)
    return questions


def measure_quality(
    pipeline: Pipeline,
    policies: Sequence[Policy],
    tasks: Sequence[LoadedTask],
    text: Sequence[Question],
    tokenizer: Any,
    *,
    max_length: int,
    window: int | None,
    in_flight: InFlight = 1,
    batch: int = 1,
    limit: int | None = None,
    prefix_token_id: int | None = None,
    on_step: Callable[[str], None] = lambda name: None,
    finished: Finished | None = None,
    on_finished: Callable[[Finished], None] = lambda finished: None,
) -> list[Quality]:
    """Compare policies with exact.

    Args:
        pipeline: runs the microbatches.
        policies: what to compare.
        tasks: choice questions, each with a row-wise `acc`.
        text: as `text_windows` cuts it.
        tokenizer: as in `evaluate`.
        max_length: as in `evaluate`.
        window: of the model's attention.
        in_flight: windows of text at a time.
        batch: questions in a microbatch.
        limit: only the first rows of each task.
        prefix_token_id: as in `evaluate`.
        on_step: called with `PERPLEXITY_SET` for each window under exact and under each policy, and with the name
            of a data set for each of its rows; not for what is finished.
        finished: what need not be done again; it grows.
        on_finished: called with it as a text or a data set is done.
    """
    finished = finished if finished is not None else Finished()
    for policy in (Exact(), *policies):
        if policy.describe() not in finished.likelihoods:
            scorer = DistributedScorer(pipeline, policy, in_flight, window)
            finished.likelihoods[policy.describe()] = text_likelihood(scorer, text, on_step)
            on_finished(finished)
    tokens = sum(len(question.choices[0].continuation) for question in text)
    pairs: dict[str, list[tuple[Evaluation, Evaluation]]] = {policy.describe(): [] for policy in policies}
    parts: list[Part] = []
    for task in tasks:

        def answer(by: Scorer, dataset: str | None, task: LoadedTask = task) -> Evaluation:
            return evaluate(
                task,
                by,
                tokenizer,
                max_length=max_length,
                limit=limit,
                on_question=None if dataset is None else lambda: on_step(dataset),
                prefix_token_id=prefix_token_id,
            )

        digest = task.digest(limit)
        if digest not in finished.parts:
            comparing = ComparingScorer(pipeline, policies, window, batch)
            answer(comparing, task.dataset)
            finished.parts[digest] = comparing.part
            on_finished(finished)
        part = finished.parts[digest]
        parts.append(part)
        exact = answer(RecordedScorer(part.exact), None)
        for name, evaluations in pairs.items():
            evaluations.append((exact, answer(RecordedScorer(part.policies[name].answers), None)))
    qualities: list[Quality] = []
    for name, evaluations in pairs.items():
        divergence = Divergence()
        for part in parts:
            divergence.join(part.policies[name].divergence)
        qualities.append(
            Quality(
                name,
                TextLikelihood(tokens, finished.likelihoods["exact"], finished.likelihoods[name]),
                divergence,
                pooled_difference([policy for _, policy in evaluations], [exact for exact, _ in evaluations]),
                tuple(evaluations),
                summarise([record for part in parts for record in part.policies[name].records]),
            )
        )
    return qualities


def text_likelihood(scorer: DistributedScorer, text: Sequence[Question], on_step: Callable[[str], None]) -> float:
    """Sum the log-probabilities of a text, natural logarithm; `on_step` as in `measure_quality`."""
    answers = scorer.score(text, lambda number, answer: on_step(PERPLEXITY_SET))
    return math.fsum(answer.log_likelihoods[0] for answer in answers)
