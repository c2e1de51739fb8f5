"""How well the model answers a data set, with lm-evaluation-harness as the judge.

`load_task` joins the judge's own task with our rows; `evaluate` lets a scorer answer it. This module is light: what
needs lm-eval stands in `wdmoe.bs.harness` and is imported by the first call.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wdmoe.bs.questions import Scorer
from wdmoe.bs.rows import find_dataset, read_rows
from wdmoe.runtime.errors import WdmoeError

Source = Literal["local rows", "hub", "bundled sample"]


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """A task of the judge with its rows in memory, ready to be answered as often as one likes."""

    dataset: str
    source: Source
    rows: int
    judge: Any  # lm_eval.api.task.Task

    def count(self, limit: int | None = None) -> int:
        """How many rows an evaluation with this limit asks about."""
        return self.rows if limit is None else min(limit, self.rows)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The judge's verdict on one model and one data set."""

    dataset: str
    source: Source
    judge: str  # name and version of the harness and of its task
    rows: int  # asked about; the data set as loaded may hold more
    rows_loaded: int
    rows_digest: str  # SHA-256 over the rows asked about: only equal ones can be compared
    metrics: dict[str, float]  # for example acc and acc_norm, as fractions
    stderr: dict[str, float]  # of each metric; NaN where one row was asked about
    correct: dict[str, tuple[float, ...]]  # of each metric, one value per row, 1.0 for right and 0.0 for wrong
    log_likelihoods: tuple[tuple[float, ...], ...]  # one tuple per row, in the order of its choices


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
    return LoadedTask(dataset, source, len(judge.eval_docs), judge)


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
    import lm_eval
    from lm_eval import evaluator

    from wdmoe.bs.harness import quiet

    with quiet():
        results = evaluator.evaluate(lm=lm, task_dict={"tasks": {task.dataset: task.judge}}, limit=limit)
    samples = sorted(results["samples"][task.dataset], key=lambda sample: sample["doc_id"])
    values = results["results"][task.dataset]
    metrics = samples[0]["metrics"]
    stderr = {metric: values[f"{metric}_stderr,none"] for metric in metrics}
    digest = hashlib.sha256("\n".join(f"{s['doc_hash']} {s['target_hash']}" for s in samples).encode())
    return Evaluation(
        dataset=task.dataset,
        source=task.source,
        judge=f"lm-eval {lm_eval.__version__}, task {find_dataset(task.dataset).task_file} version {task.judge.VERSION}",
        rows=len(samples),
        rows_loaded=task.rows,
        rows_digest=digest.hexdigest(),
        metrics={metric: float(values[f"{metric},none"]) for metric in metrics},
        # lm-eval says "N/A" where there is none.
        stderr={metric: math.nan if isinstance(s, str) else float(s) for metric, s in stderr.items()},
        correct={metric: tuple(float(sample[metric]) for sample in samples) for metric in metrics},
        log_likelihoods=tuple(
            tuple(float(log_likelihood) for log_likelihood, _ in sample["filtered_resps"]) for sample in samples
        ),
    )


def paired_difference(candidate: Evaluation, control: Evaluation, metric: str = "acc") -> PairedDifference:
    """Compare two evaluations row by row; positive where the candidate is better.

    Raises:
        ValueError: the evaluations are not of the same rows.
    """
    if candidate.rows_digest != control.rows_digest:
        raise ValueError(
            f"cannot compare {candidate.rows} rows of {candidate.dataset} ({candidate.source}) with "
            f"{control.rows} of {control.dataset} ({control.source}): expected the same rows in both"
        )
    pairs = zip(candidate.correct[metric], control.correct[metric], strict=True)
    points = [100.0 * (ours - theirs) for ours, theirs in pairs]
    mean = math.fsum(points) / len(points)
    squares = math.fsum((value - mean) ** 2 for value in points)
    stderr = math.sqrt(squares / (len(points) - 1) / len(points)) if len(points) > 1 else math.nan
    return PairedDifference(metric, len(points), mean, stderr)


def _require_lm_eval() -> None:
    try:
        import datasets  # noqa: F401
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name not in ("datasets", "lm_eval"):
            raise
        raise WdmoeError("evaluation needs lm-evaluation-harness: pip install 'wdmoe[eval]'") from error
