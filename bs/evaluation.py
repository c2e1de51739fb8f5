"""How well the model answers a data set, with lm-evaluation-harness as the judge.

`load_task` joins the judge's own task with our rows; `evaluate` lets a scorer answer it. This module is light: what
needs lm-eval stands in `wdmoe.bs.harness` and is imported by the first call.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wdmoe.bs.questions import Scorer
from wdmoe.bs.rows import find_dataset, read_rows
from wdmoe.runtime.errors import WdmoeError

Source = Literal["local rows", "hub", "bundled sample"]
PERPLEXITIES = ("perplexity", "word_perplexity")  # metrics that lm-eval has for the last word, and for each word


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """A task of the judge with its rows in memory, ready to be answered as often as one likes."""

    dataset: str
    source: Source
    variant: str | None  # why its prompts are not quite the task's own; None: they are
    rows: int
    judge: Any  # lm_eval.api.task.Task

    def count(self, limit: int | None = None) -> int:
        """How many rows an evaluation with this limit asks about."""
        return self.rows if limit is None else min(limit, self.rows)

    def digest(self, limit: int | None = None) -> str:
        """Return the SHA-256 over the rows that an evaluation with this limit asks about, known before it starts."""
        from wdmoe.bs.harness import row_hashes

        hashes = row_hashes(self.judge, self.count(limit))
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    @property
    def has_accuracy(self) -> bool:
        """Whether each row is right or wrong."""
        return "acc" in self.judge.aggregation()

    @property
    def described_judge(self) -> str:
        """Name and version of the harness and of its task."""
        import lm_eval

        return (
            f"lm-eval {lm_eval.__version__}, task {find_dataset(self.dataset).task_file} version {self.judge.VERSION}"
        )


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The judge's verdict on one model and one data set."""

    dataset: str
    source: Source
    variant: str | None  # "local variant" in every report: why its prompts are not quite the task's own
    judge: str  # name and version of the harness and of its task
    rows: int  # asked about; the data set as loaded may hold more
    rows_loaded: int
    rows_digest: str  # SHA-256 over the rows asked about: only equal ones can be compared
    metrics: dict[str, float]  # for example acc and acc_norm, as fractions, or word_perplexity
    stderr: dict[str, float]  # of each metric; NaN where one row was asked about, or where there is no estimate
    correct: dict[str, tuple[float, ...]]  # of each accuracy, one value per row, 1.0 for right and 0.0 for wrong
    log_likelihoods: tuple[tuple[float, ...], ...]  # one tuple per row, in the order of its choices

    @property
    def perplexity(self) -> float | None:
        """The perplexity among the metrics: a word's; None for a task that has none."""
        return next((self.metrics[name] for name in PERPLEXITIES if name in self.metrics), None)


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """How much better one evaluation is than another of the same rows, in percentage points."""

    metric: str
    rows: int
    mean_points: float
    stderr_points: float  # of the mean, from the differences row by row; NaN for one row

    @property
    def interval_points(self) -> tuple[float, float]:
        """The 95 % confidence interval, by the normal approximation."""
        return self.mean_points - 1.96 * self.stderr_points, self.mean_points + 1.96 * self.stderr_points


def load_task(dataset: str, data_dir: Path | None = None) -> LoadedTask:
    """Load the judge's task for a data set and give it its rows.

    Args:
        dataset: a name in `wdmoe.bs.rows.DATASETS`.
        data_dir: the folder that holds the data set's folder, or that folder itself; None asks the Hugging Face
            hub. A bundled data set needs neither.

    Raises:
        ValueError: no such data set.
        DataError: the rows cannot be had, or are damaged.
        WdmoeError: lm-eval is not installed.
    """
    bundled = find_dataset(dataset).bundled
    from_hub = data_dir is None and not bundled
    rows = None if from_hub else read_rows(dataset, data_dir)
    _require_lm_eval()
    from wdmoe.bs.harness import RowsTask, quiet

    with quiet():
        judge = RowsTask(dataset, rows)
    source: Source = "bundled sample" if bundled else "hub" if from_hub else "local rows"
    variant = find_dataset(dataset).local_variant if source == "local rows" else None
    return LoadedTask(dataset, source, variant, len(judge.eval_docs), judge)


def evaluate(
    task: LoadedTask,
    scorer: Scorer,
    tokenizer: Any,
    *,
    max_length: int,
    limit: int | None = None,
    on_question: Callable[[], None] | None = None,
    prefix_token_id: int | None = None,
) -> Evaluation:
    """Let a scorer answer a task.

    Args:
        task: what to answer.
        scorer: the model.
        tokenizer: the model's `tokenizers.Tokenizer`.
        max_length: positions the model can see; longer prompts lose their first tokens, with a warning.
        limit: ask about the first rows only.
        on_question: called once for each row as it is answered, `task.count(limit)` times in all.
        prefix_token_id: BOS or EOS, for tasks with an empty context; by default what the tokenizer puts first.
    """
    from wdmoe.bs.harness import ScorerLM

    return evaluate_lm(ScorerLM(scorer, tokenizer, max_length, on_question, prefix_token_id), task, limit=limit)


def evaluate_lm(lm: Any, task: LoadedTask, *, limit: int | None = None) -> Evaluation:
    """Let any `lm_eval.api.model.LM` answer a task, lm-eval's own `HFLM` for example."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected at least one row, or None for all")
    from lm_eval import evaluator

    from wdmoe.bs.harness import is_mean, quiet

    with quiet():
        # No bootstrap: for a perplexity it would draw 100,000 samples of all rows, on every core.
        results = evaluator.evaluate(
            lm=lm, task_dict={"tasks": {task.dataset: task.judge}}, limit=limit, bootstrap_iters=0
        )
    samples = sorted(results["samples"][task.dataset], key=lambda sample: sample["doc_id"])
    values = results["results"][task.dataset]
    metrics = {metric: float(values[f"{metric},none"]) for metric in samples[0]["metrics"]}
    correct = {m: tuple(float(sample[m]) for sample in samples) for m in metrics if is_mean(task.judge, m)}
    stderr = {metric: _mean_stderr(correct[metric]) if metric in correct else math.nan for metric in metrics}
    if "perplexity" in metrics:  # the exponential of a mean: its error by the delta method
        stderr["perplexity"] = metrics["perplexity"] * _mean_stderr([sample["perplexity"] for sample in samples])
    return Evaluation(
        dataset=task.dataset,
        source=task.source,
        variant=task.variant,
        judge=task.described_judge,
        rows=len(samples),
        rows_loaded=task.rows,
        rows_digest=task.digest(limit),
        metrics=metrics,
        stderr=stderr,
        correct=correct,
        log_likelihoods=tuple(_log_likelihoods(sample["filtered_resps"]) for sample in samples),
    )


def paired_difference(candidate: Evaluation, control: Evaluation, metric: str = "acc") -> PairedDifference:
    """Compare two evaluations row by row; positive where the candidate is better.

    Raises:
        ValueError: the evaluations are not of the same rows, or the metric has no value for each row.
    """
    return pooled_difference([candidate], [control], metric)


def pooled_difference(
    candidates: Sequence[Evaluation], controls: Sequence[Evaluation], metric: str = "acc"
) -> PairedDifference:
    """Compare all rows of several data sets together, each row once and each row alike.

    Args:
        candidates: one evaluation for each data set.
        controls: of the same rows, in the same order.
        metric: an accuracy that all of them have.

    Raises:
        ValueError: as in `paired_difference`; or nothing is to be compared.
    """
    if not candidates:
        raise ValueError("nothing to compare: expected at least one evaluation")
    points: list[float] = []
    for candidate, control in zip(candidates, controls, strict=True):
        if candidate.rows_digest != control.rows_digest:
            raise ValueError(
                f"cannot compare {candidate.rows} rows of {candidate.dataset} ({candidate.source}) with "
                f"{control.rows} of {control.dataset} ({control.source}): expected the same rows in both"
            )
        if metric not in candidate.correct:
            raise ValueError(
                f"{candidate.dataset} has no {metric} for each row; it has {', '.join(candidate.correct) or 'none'}"
            )
        pairs = zip(candidate.correct[metric], control.correct[metric], strict=True)
        points += [100.0 * (ours - theirs) for ours, theirs in pairs]
    return PairedDifference(metric, len(points), math.fsum(points) / len(points), _mean_stderr(points))


def _mean_stderr(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.nan
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return math.sqrt(squares / (len(values) - 1) / len(values))


def _log_likelihoods(responses: Sequence[Any]) -> tuple[float, ...]:
    """One value per response, which is a pair with `greedy`, or alone where a whole text was scored."""
    return tuple(float(response[0] if isinstance(response, tuple | list) else response) for response in responses)


def _require_lm_eval() -> None:
    try:
        import datasets  # noqa: F401
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name not in ("datasets", "lm_eval"):
            raise
        raise WdmoeError("evaluation needs lm-evaluation-harness: pip install 'wdmoe[eval]'") from error
