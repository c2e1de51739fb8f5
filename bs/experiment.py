"""`wdmoe-bs run`: the same questions under each policy, accuracy and latency side by side."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

from wdmoe.bs.evaluation import Evaluation, LoadedTask, PairedDifference, evaluate, paired_difference
from wdmoe.bs.hub import Hub
from wdmoe.bs.policies import Policy
from wdmoe.bs.questions import Choice, Question
from wdmoe.bs.records import Summary, summarise
from wdmoe.bs.scoring import DistributedScorer
from wdmoe.bs.station import Station
from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.links import is_loopback
from wdmoe.runtime.messages import MAX_ROWS

_WARM_UP = Question("warm-up", (Choice(tuple(range(1, 25)), (25, 26)),))
_WARM_UP_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class PolicyRun:
    """One policy on one data set."""

    policy: str
    evaluation: Evaluation
    summary: Summary
    wall_s: float
    to_exact: PairedDifference | None  # of acc; None for exact itself, or where exact was not run


def run_policies(
    station: Station,
    task: LoadedTask,
    policies: Sequence[Policy],
    limit: int | None,
    on_question: Callable[[str], None],
) -> list[PolicyRun]:
    """Evaluate a task under each policy in turn.

    Args:
        station: connected and loaded.
        task: what to answer.
        policies: in the order of the report.
        limit: only the first rows.
        on_question: called with the policy's name for each question that is answered.
    """
    tokenizer = _tokenizer(station)
    model, in_flight = station.manifest.model, station.config.in_flight
    runs: list[PolicyRun] = []
    exact: Evaluation | None = None
    for policy in policies:
        name = policy.describe()
        scorer = DistributedScorer(station.pipeline, policy, in_flight, model.sliding_window)
        # The first calls allocate and the corrections of the latency model start from nothing.
        scorer.score([_WARM_UP] * _WARM_UP_ROUNDS)
        scorer.records.clear()
        started = time.perf_counter()
        evaluation = evaluate(
            task,
            scorer,
            tokenizer,
            max_length=min(model.max_positions, MAX_ROWS),
            limit=limit,
            on_question=lambda name=name: on_question(name),  # type: ignore[misc]
            prefix_token_id=model.bos_token_id,
        )
        wall_s = time.perf_counter() - started
        if name == "exact":
            exact = evaluation
        difference = None if exact is None or name == "exact" else paired_difference(evaluation, exact)
        runs.append(PolicyRun(name, evaluation, summarise(scorer.records), wall_s, difference))
    return runs


def describe_run(station: Station, runs: Sequence[PolicyRun], command: str) -> dict[str, Any]:
    """Turn a run into plain JSON values: what was measured, on what, and how."""
    model, config = station.manifest.model, station.config
    return {
        "format": "wdmoe-run",
        "version": 1,
        "wdmoe": version("wdmoe"),
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "model": {
            "name": model.name,
            "family": model.family,
            "bundle_id": station.manifest.bundle_id,
            "expert_precision": station.manifest.precision,
        },
        "link": {
            "address": config.listen,
            "kind": "loopback" if is_loopback(config.listen) else "network",
            "wire": config.wire,
            "encrypted": config.encrypted,
        },
        "in_flight": config.in_flight,
        "threads": config.threads,
        "devices": [describe_device(station.hub, name) for name in sorted(station.hub.devices)],
        "results": [_describe_policy(run) for run in runs],
    }


def describe_device(hub: Hub, name: str) -> dict[str, Any]:
    """Say what a device is and how fast, as plain values."""
    device = hub.devices[name]
    profile, latency = device.latency.profile, device.latency.model()
    return {
        "name": name,
        "experts": len(device.experts),
        "hardware": profile.device,
        "software": profile.software,
        "engine": profile.engine,
        "precision": profile.precision,
        "origin": profile.origin,
        "round_trip_ms": latency.round_trip_ms,
        "correction": latency.correction,
        "call_ms": {str(tokens): ms for tokens, ms in latency.curve},
    }


def _describe_policy(run: PolicyRun) -> dict[str, Any]:
    evaluation, summary = run.evaluation, run.summary
    difference = run.to_exact
    return {
        "dataset": evaluation.dataset,
        "source": evaluation.source,
        "judge": evaluation.judge,
        "rows": evaluation.rows,
        "rows_digest": evaluation.rows_digest,
        "policy": run.policy,
        "accuracy": evaluation.metrics,
        "accuracy_stderr": {name: _finite(value) for name, value in evaluation.stderr.items()},
        "accuracy_minus_exact_points": None if difference is None else difference.mean_points,
        "accuracy_minus_exact_stderr_points": None if difference is None else _finite(difference.stderr_points),
        "latency_p50_ms": summary.latency_p50_ms,
        "latency_p95_ms": summary.latency_p95_ms,
        "wall_s": run.wall_s,
        "tokens_per_s": summary.tokens / run.wall_s,
        "dropped_share": summary.dropped_share,
        "log_likelihoods": evaluation.log_likelihoods,
        **asdict(summary),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tokenizer(station: Station) -> Any:
    name = station.manifest.tokenizer
    if name is None:
        raise BundleError(f"{station.folder}: the bundle has no tokenizer; export a checkpoint with tokenizer.json")
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(station.folder / name))
