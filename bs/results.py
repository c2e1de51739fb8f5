"""A run as plain JSON values: what was measured, on what, and how; and back again, so that a run can be resumed."""

from __future__ import annotations

import json
import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from wdmoe.bs.config import StationConfig, VirtualConfig
from wdmoe.bs.diagnosis import diagnose
from wdmoe.bs.evaluation import Evaluation, LoadedTask, PairedDifference, paired_difference
from wdmoe.bs.experiment import PolicyRun
from wdmoe.bs.hub import Hub
from wdmoe.bs.quality import Criterion, Finished, Quality, QualityBar, judge
from wdmoe.bs.records import Summary
from wdmoe.bs.station import Station
from wdmoe.profiles.device_profile import Emulated
from wdmoe.runtime.links import is_loopback
from wdmoe.runtime.outputs import written_whole

RUN_FORMAT, RUN_VERSION = "wdmoe-run", 5


def describe_run(station: Station, runs: Sequence[PolicyRun], command: str) -> dict[str, Any]:
    """Turn a run into plain JSON values."""
    head = describe_station(station, command)
    return {
        "format": RUN_FORMAT,
        "version": RUN_VERSION,
        **head,
        "results": [_describe_policy(run) for run in runs],
        "diagnosis": [asdict(finding) for finding in diagnose(runs, station.config.in_flight, has_air(head))],
    }


def has_air(head: dict[str, Any]) -> bool:
    """Say whether rows travelled: not between processes of one machine without an emulated link."""
    link = head["link"]
    return link["kind"] != "loopback" or any(name != "none" for name in link["emulated"])


def describe_station(station: Station, command: str) -> dict[str, Any]:
    """Say what ran, where and with whom: the head of every result."""
    model, config = station.manifest.model, station.config
    devices = [describe_device(station.hub, name) for name in sorted(station.hub.devices)]
    return {
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
            "address": config.listen if station.virtual is None else None,
            "kind": _link_kind(station),
            "wire": config.wire,
            "encrypted": config.encrypted,
            "emulated": sorted({device["emulated"]["link"] or "none" for device in devices if device["emulated"]}),
        },
        "clock": describe_clock(station.virtual, config, station.shares),
        "in_flight": config.in_flight,
        "batch": config.batch,
        "threads": config.threads,
        "stage_workers": config.stage_workers,
        "split": config.split,
        "stages_on": station.pipeline.stages_on,
        "devices": devices,
        "bs_experts": describe_kept(station),
    }


def describe_kept(station: Station) -> dict[str, Any] | None:
    """Say what the base station runs itself, as plain values; None: nothing."""
    if station.kept is None:
        return None
    choice, profile = station.kept.choice, station.kept.profile
    return {
        "experts": len(choice.experts),
        "chosen_by": choice.chosen_by,
        "memory_bytes": choice.size_bytes,
        "hardware": profile.device,
        "engine": profile.engine,
        "origin": profile.origin,
        "call_ms": {str(tokens): ms for tokens, ms in profile.curve()},
    }


def describe_clock(
    virtual: VirtualConfig | None, config: StationConfig, shares: Mapping[str, float] | None
) -> dict[str, Any]:
    """Say what time a run's latencies are in, and over what; as plain values.

    Args:
        virtual: where time is.
        config: of the base station.
        shares: of a band that was divided once, in real time, by device.
    """
    if virtual is None:
        told: dict[str, Any] = {"channel": config.channel, "bandwidth": config.bandwidth, "links": list(config.links)}
        told["shares"] = dict(shares or {})
        return {"kind": "real", **{key: value for key, value in told.items() if value}}
    return {
        "kind": "virtual",
        "origin": "modelled: real answers, devices and links from profiles; nothing here was measured on a device",
        "stage_ms": virtual.stage_ms,
        "channel": virtual.channel,
        "bandwidth": virtual.bandwidth or ("uniform" if virtual.channel == "orthogonal" else None),
        "links": [profile.description for profile in virtual.profiles],
    }


def describe_quality(
    head: dict[str, Any], qualities: Sequence[Quality], bar: QualityBar, text: LoadedTask
) -> dict[str, Any]:
    """Turn the comparison of policies with exact into plain JSON values.

    Args:
        head: `describe_station`.
        qualities: one per policy.
        bar: what they are held against.
        text: the task of the perplexity.
    """
    return {
        "format": "wdmoe-quality",
        "version": 1,
        **head,
        "bar": asdict(bar),
        "text": {"dataset": text.dataset, "source": text.source, "variant": text.variant},
        "results": [_describe_quality(quality, judge(quality, bar)) for quality in qualities],
    }


def describe_device(hub: Hub, name: str) -> dict[str, Any]:
    """Say what a device is and how fast, as plain values."""
    device = hub.devices[name]
    profile, latency, air_ms = device.latency.profile, device.latency.model(), device.latency.row_air_ms
    return {
        "name": name,
        "experts": len(device.experts),
        "hardware": profile.device,
        "software": profile.software,
        "engine": profile.engine,
        "precision": profile.precision,
        "origin": profile.origin,
        "emulated": None if profile.emulated is None else msgspec.to_builtins(profile.emulated),
        "round_trip_ms": latency.round_trip_ms,
        "correction": latency.correction,
        "row_air_ms": {"down": air_ms[0], "up": air_ms[1], "from": device.latency.air_from},
        "call_ms": {str(tokens): ms for tokens, ms in latency.curve},
    }


def link_words(result: dict[str, Any]) -> str:
    """Say in a few words over what a run went, and what of it was emulated.

    Args:
        result: of `describe_station`.
    """
    link = result["link"]
    words = f"{link['kind']} ({link['wire']})"
    emulated = Counter(emulated_words(device) for device in result["devices"] if device["emulated"])
    own = result["bs_experts"]
    words += "" if own is None else f", {own['experts']} experts at the base station"
    return ", ".join([words, *(f"{count} {what}" for what, count in emulated.items())])


def origin_of_times(result: dict[str, Any]) -> str:
    """Say in a word what the times of a run are: modelled, emulated or measured.

    Args:
        result: of `describe_station`.
    """
    if result["clock"]["kind"] == "virtual":
        return "modelled"
    return "emulated" if any(device["emulated"] for device in result["devices"]) else "measured"


def emulated_words(device: dict[str, Any]) -> str:
    """Say what a device of `describe_device` pretends to be; nothing if it is what it is."""
    return "" if device["emulated"] is None else str(msgspec.convert(device["emulated"], Emulated))


def read_runs(path: Path, now: dict[str, Any]) -> tuple[list[PolicyRun], str | None]:
    """Read the runs of an earlier command's file, where they can stand beside those that start now.

    Args:
        path: where `describe_run` was written; it need not exist.
        now: `describe_station` of what starts now.

    Returns:
        The runs; or none, and why the file's cannot be used.

    Raises:
        ValueError: the file is something else, which a result must not overwrite.
    """
    try:
        result = json.loads(path.read_bytes())
        if result["format"] != RUN_FORMAT:
            raise ValueError(f"its format is {result['format']!r}, expected {RUN_FORMAT!r}")
    except FileNotFoundError:
        return [], None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--json {path} is not a result of wdmoe-bs run ({error}); give another name") from error
    if result["version"] != RUN_VERSION:
        return [], f"it has version {result['version']} of the format, expected {RUN_VERSION}"
    try:
        then, today = circumstances(result), circumstances(now)
    except KeyError as error:
        return [], f"it does not say {error}"
    changed = [f"{key} was {then[key]!r} and is {today[key]!r}" for key in today if then[key] != today[key]]
    if changed:
        return [], "; ".join(changed)
    try:
        return [_restore_policy(entry) for entry in result["results"]], None
    except (KeyError, msgspec.ValidationError) as error:
        return [], f"it was written by another wdmoe {version('wdmoe')} ({error})"


def why_stale(run: PolicyRun, task: LoadedTask, limit: int | None) -> str | None:
    """Say why a run does not answer for a task as it is now; None: it does."""
    evaluation = run.evaluation
    if evaluation.rows_digest != task.digest(limit):
        return f"it answered {evaluation.rows} rows, and {task.count(limit)} others are asked about now"
    if (evaluation.judge, evaluation.variant) != (task.described_judge, task.variant):
        return f"it was judged by {evaluation.judge}, and now it is {task.described_judge}"
    return None


class _KeptComparison(msgspec.Struct):
    circumstances: dict[str, Any]
    finished: Finished


def read_finished(path: Path, now: dict[str, Any]) -> tuple[Finished, str | None]:
    """Read what an interrupted comparison finished, where it can stand beside what starts now.

    Args:
        path: where `write_finished` wrote; it need not exist.
        now: the circumstances of what starts now.

    Returns:
        What is finished; or nothing, and why the file's cannot be used.
    """
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=_KeptComparison)
    except FileNotFoundError:
        return Finished(), None
    except msgspec.DecodeError as error:
        return Finished(), f"it cannot be read ({error})"
    then = kept.circumstances
    changed = [f"{key} was {then.get(key)!r} and is {now[key]!r}" for key in now if then.get(key) != now[key]]
    return (Finished(), "; ".join(changed)) if changed else (kept.finished, None)


def write_finished(path: Path, now: dict[str, Any], finished: Finished) -> None:
    """Keep what of a comparison is done, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_bytes(msgspec.json.encode(_KeptComparison(now, finished)))


def _link_kind(station: Station) -> str:
    if station.virtual is not None:
        return "modelled links in virtual time"
    return "loopback" if is_loopback(station.config.listen) else "network"


def finite(value: float) -> float | None:
    """Return None for what JSON has no number for."""
    return value if math.isfinite(value) else None


def circumstances(result: dict[str, Any]) -> dict[str, Any]:
    """Pick what two runs must share so that their answers and times belong into one file."""
    return {
        "wdmoe": result["wdmoe"],
        "bundle": result["model"]["bundle_id"],
        "link": result["link"]["kind"],
        "wire": result["link"]["wire"],
        "encrypted": result["link"]["encrypted"],
        "clock": result["clock"],
        "in flight": result["in_flight"],
        "batch": result["batch"],
        "threads": result["threads"],
        "stage workers": result.get("stage_workers", 1),
        "split": result.get("split", "none"),
        "experts at the base station": _own_words(result["bs_experts"]),
        "stages on": result["stages_on"],
        "devices": [
            " ".join(
                (
                    device["name"],
                    device["engine"],
                    device["precision"],
                    "on",
                    device["hardware"],
                    emulated_words(device),
                )
            )
            for device in result["devices"]
        ],
    }


def _own_words(own: dict[str, Any] | None) -> str:
    return "none" if own is None else f"{own['experts']} by {own['chosen_by']}, {own['engine']} on {own['hardware']}"


def _describe_policy(run: PolicyRun) -> dict[str, Any]:
    evaluation, difference = run.evaluation, run.to_exact
    stderr = {name: finite(value) for name, value in evaluation.stderr.items()}
    return {
        "policy": run.policy,
        **asdict(evaluation),
        "stderr": stderr,
        "accuracy": {name: evaluation.metrics[name] for name in evaluation.correct},
        "accuracy_stderr": {name: stderr[name] for name in evaluation.correct},
        "accuracy_minus_exact_points": None if difference is None else difference.mean_points,
        "accuracy_minus_exact_stderr_points": None if difference is None else finite(difference.stderr_points),
        "perplexity_over_exact": run.perplexity_ratio,
        "wall_s": run.wall_s,
        "clock_s": run.clock_s,
        "tokens_per_s": run.summary.tokens / run.clock_s,
        "dropped_share": run.summary.dropped_share,
        "bs_share": run.summary.bs_share,
        **asdict(run.summary),
    }


def _describe_quality(quality: Quality, criteria: Sequence[Criterion]) -> dict[str, Any]:
    text, divergence, summary = quality.text, quality.divergence, quality.summary
    return {
        "policy": quality.policy,
        "passed": all(criterion.reached for criterion in criteria),
        "criteria": [
            asdict(criterion) | {"value": finite(criterion.value), "reached": criterion.reached}
            for criterion in criteria
        ],
        "perplexity": {
            "tokens": text.tokens,
            "exact": text.exact_perplexity,
            "policy": text.policy_perplexity,
            "ratio": text.ratio,
        },
        "divergence": {
            "mean_nats": finite(divergence.mean),
            "largest_nats": divergence.largest,
            "positions": divergence.positions,
        },
        "accuracy": _describe_difference(quality.accuracy),
        "datasets": [
            {
                "dataset": exact.dataset,
                "source": exact.source,
                "variant": exact.variant,
                "judge": exact.judge,
                "rows_digest": exact.rows_digest,
                "exact": exact.metrics,
                "policy": policy.metrics,
                **_describe_difference(paired_difference(policy, exact)),
            }
            for exact, policy in quality.evaluations
        ],
        "dropped_share": summary.dropped_share,
        "gate_mass_dropped": summary.gate_mass_dropped,
    }


def _describe_difference(difference: PairedDifference) -> dict[str, Any]:
    return {
        "rows": difference.rows,
        "acc_minus_exact_points": difference.mean_points,
        "stderr_points": finite(difference.stderr_points),
        "interval_points": [finite(end) for end in difference.interval_points],
    }


def _restore_policy(entry: dict[str, Any]) -> PolicyRun:
    stderr = {name: math.nan if value is None else value for name, value in entry["stderr"].items()}
    evaluation = msgspec.convert(entry | {"stderr": stderr}, Evaluation)
    points, points_stderr = entry["accuracy_minus_exact_points"], entry["accuracy_minus_exact_stderr_points"]
    difference = None
    if points is not None:
        difference = PairedDifference(
            "acc", evaluation.rows, points, math.nan if points_stderr is None else points_stderr
        )
    return PolicyRun(
        entry["policy"],
        evaluation,
        msgspec.convert(entry, Summary),
        entry["wall_s"],
        entry["clock_s"],
        difference,
        entry["perplexity_over_exact"],
    )


def reusable_runs(
    path: Path, now: dict[str, Any], tasks: Sequence[LoadedTask], policies: Sequence[str], limit: int | None
) -> tuple[list[PolicyRun], list[str]]:
    """Read what an earlier command finished, and tell about each pair that is asked for.

    Returns:
        The runs that the file may keep, those of other data sets and policies included; and lines for the user.
    """
    runs, refused = read_runs(path, now)
    if refused is not None:
        return [], [f"{path}: nothing of it is used again: {refused}"]
    asked = {task.dataset: task for task in tasks}
    kept, lines = [], []
    for run in runs:
        dataset, policy = run.pair
        if dataset not in asked or policy not in policies:
            kept.append(run)
            continue
        reason = why_stale(run, asked[dataset], limit)
        if reason is None:
            kept.append(run)
            lines.append(f"{path}: {dataset} under {policy} is there already")
        else:
            lines.append(f"{path}: {dataset} under {policy} is run again: {reason}")
    return kept, lines
