"""Accuracy of a policy against exact over the rows of several data sets together, on one arm of the testbed."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from scripts.bench._environment import progress
from wdmoe.bs.config import StationConfig, VirtualConfig
from wdmoe.bs.evaluation import Evaluation, LoadedTask, evaluate, load_task, pooled_difference
from wdmoe.bs.experiment import load_tokenizer, max_length
from wdmoe.bs.policies import Exact, parse_policy
from wdmoe.bs.scoring import DistributedScorer
from wdmoe.bs.virtual import open_virtual_station
from wdmoe.runtime.errors import DataError


@dataclass(frozen=True, slots=True)
class Part:
    """One data set, answered exactly and under the policy."""

    exact: Evaluation
    policy: Evaluation


def sets_at_hand(datasets: Sequence[str], data_dir: Path | None) -> dict[str, LoadedTask]:
    """Load those data sets whose rows can be had."""
    found: dict[str, LoadedTask] = {}
    for dataset in datasets:
        try:
            found[dataset] = load_task(dataset, data_dir)
        except DataError as error:
            progress(f"{dataset} is left out of the pooled accuracy: {error}")
    return found


def pooled_accuracy(
    config: StationConfig,
    arm: VirtualConfig,
    policy: str,
    tasks: dict[str, LoadedTask],
    data_dir: Path | None,
    rows: int,
    jobs: int,
    kept: dict[str, Any],
    keep: Callable[[str, Any], None],
) -> dict[str, Any]:
    """Answer the first rows of each data set, some sets at a time, and compare row by row.

    Args:
        config: of the base station.
        arm: devices and medium.
        policy: as it is spelt.
        tasks: by name.
        data_dir: where their rows are.
        rows: of each, at most.
        jobs: sets at a time, a process each.
        kept: parts that are done, by a name that says what of.
        keep: keeps one more.
    """
    names = {dataset: f"pool: {policy}, {dataset}, {task.digest(rows)[:16]}" for dataset, task in tasks.items()}
    left = [dataset for dataset, name in names.items() if name not in kept]
    with multiprocessing.get_context("spawn").Pool(max(1, min(jobs, len(left)))) as pool:
        for dataset, part in pool.imap_unordered(partial(_answer, config, arm, policy, data_dir, rows), left):
            keep(names[dataset], msgspec.to_builtins(part))
    parts = {dataset: msgspec.convert(kept[name], Part) for dataset, name in names.items()}
    difference = pooled_difference([part.policy for part in parts.values()], [part.exact for part in parts.values()])
    return {
        "rows": difference.rows,
        "points": difference.mean_points,
        "interval_points": list(difference.interval_points),
        "accuracy": {
            dataset: {"rows": part.exact.rows, "exact": part.exact.metrics["acc"], "policy": part.policy.metrics["acc"]}
            for dataset, part in parts.items()
        },
    }


def _answer(
    config: StationConfig, arm: VirtualConfig, policy: str, data_dir: Path | None, rows: int, dataset: str
) -> tuple[str, Part]:
    task, started_s = load_task(dataset, data_dir), time.perf_counter()
    with open_virtual_station(config, arm, lambda text: None) as station:
        model, tokenizer = station.manifest.model, load_tokenizer(station)
        exact, other = (
            evaluate(
                task,
                DistributedScorer(station.pipeline, one, 1, model.sliding_window),
                tokenizer,
                max_length=max_length(station),
                limit=rows,
                prefix_token_id=model.bos_token_id,
            )
            for one in (Exact(), parse_policy(policy))
        )
    progress(f"{dataset}: {exact.rows} rows exactly and under {policy} ({time.perf_counter() - started_s:.0f} s)")
    return dataset, Part(exact, other)
