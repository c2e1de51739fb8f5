"""The same questions under each policy, data set by data set: accuracy and latency side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from wdmoe.bs.evaluation import Evaluation, LoadedTask, PairedDifference, evaluate, paired_difference
from wdmoe.bs.policies import Policy
from wdmoe.bs.questions import Choice, Question
from wdmoe.bs.records import Summary, summarise
from wdmoe.bs.scoring import DistributedScorer
from wdmoe.bs.station import Station
from wdmoe.runtime.messages import MAX_ROWS
from wdmoe.runtime.tokenizing import open_tokenizer

_WARM_UP = Question("warm-up", (Choice(tuple(range(1, 25)), (25, 26)),))
_WARM_UP_ROUNDS = 3

Pair = tuple[str, str]  # data set and policy


@dataclass(frozen=True, slots=True)
class PolicyRun:
    """One policy on one data set."""

    policy: str
    evaluation: Evaluation
    summary: Summary
    wall_s: float  # that this machine took
    clock_s: float  # the same by the run's own clock; less, or more, where time is virtual
    to_exact: PairedDifference | None  # of acc; None for exact itself, without exact, or where a row has no acc
    perplexity_ratio: float | None  # to exact; None for exact itself, without exact, or without a perplexity

    @property
    def pair(self) -> Pair:
        """What it is a run of."""
        return self.evaluation.dataset, self.policy

    def compared(self, exact: Evaluation) -> PolicyRun:
        """Return this run with its distance to the exact one of the same rows."""
        ours, theirs = self.evaluation.perplexity, exact.perplexity
        return replace(
            self,
            to_exact=paired_difference(self.evaluation, exact) if "acc" in self.evaluation.correct else None,
            perplexity_ratio=None if ours is None or theirs is None else ours / theirs,
        )


def run_policies(
    station: Station,
    tasks: Sequence[LoadedTask],
    policies: Sequence[Policy],
    limit: int | None,
    on_question: Callable[[str], None],
    *,
    finished: Mapping[Pair, PolicyRun] | None = None,
    on_run: Callable[[PolicyRun], None] | None = None,
) -> list[PolicyRun]:
    """Evaluate each task under each policy in turn.

    Args:
        station: connected and loaded.
        tasks: what to answer.
        policies: in the order of the report; what comes before `exact` is not compared with it.
        limit: only the first rows of each task.
        on_question: called with the policy's name for each question that is answered.
        finished: what need not be run again, from an earlier run.
        on_run: called with each run as it is done, and with one of `finished` whose comparison changed.
    """
    finished = finished or {}
    tokenizer = load_tokenizer(station)
    runs: list[PolicyRun] = []
    for task in tasks:
        exact: Evaluation | None = None
        for policy in policies:
            name = policy.describe()
            known = finished.get((task.dataset, name))
            if known is not None:
                run = known
            else:
                measured = _run_policy(station, task, policy, limit, tokenizer, partial(on_question, name))
                run = PolicyRun(name, *measured, None, None)
            if exact is not None:
                run = run.compared(exact)
            if run != known and on_run is not None:
                on_run(run)
            if name == "exact":
                exact = run.evaluation
            runs.append(run)
    return runs


def _run_policy(
    station: Station,
    task: LoadedTask,
    policy: Policy,
    limit: int | None,
    tokenizer: Any,
    on_question: Callable[[], None],
) -> tuple[Evaluation, Summary, float, float]:
    model = station.manifest.model
    config = station.config
    scorer = DistributedScorer(station.pipeline, policy, config.in_flight, model.sliding_window, config.batch)
    # The first calls allocate and the corrections of the latency model start from nothing.
    scorer.score([_WARM_UP] * _WARM_UP_ROUNDS)
    scorer.records.clear()
    clock = station.hub.clock
    started, started_s = time.perf_counter(), clock.now_s()
    evaluation = evaluate(
        task,
        scorer,
        tokenizer,
        max_length=max_length(station),
        limit=limit,
        on_question=on_question,
        prefix_token_id=model.bos_token_id,
    )
    return evaluation, summarise(scorer.records), time.perf_counter() - started, clock.now_s() - started_s


def max_length(station: Station) -> int:
    """Return how many tokens of a text the model can be shown at once."""
    return min(station.manifest.model.max_positions, MAX_ROWS)


def load_tokenizer(station: Station) -> Any:
    """Return the bundle's `tokenizers.Tokenizer`."""
    return open_tokenizer(station.folder, station.manifest.tokenizer)
