"""What is wrong with a run, from its own records: four known troubles, each with its figures and what to do about it.

    waiting   the base station has nothing to do while devices compute
    air       rows are longer on the link than everything else takes
    quality   a policy leaves out what the model needs
    queue     requests wait at a device behind others for longer than they are computed

Functions of plain values; a run without any of these yields nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from wdmoe.bs.config import InFlight
from wdmoe.bs.evaluation import Evaluation
from wdmoe.bs.experiment import PolicyRun
from wdmoe.bs.records import DeviceSummary, Summary

# From half of the latency on, making the rest of the system infinitely fast gains less than mending this part.
WAITING_SHARE = 0.5
AIR_SHARE = 0.5
# One of 200 comparisons of equal policies goes beyond this by chance; a report makes up to some dozens of them.
SIGNIFICANT_STDERRS = 2.6
# The quality bar of `wdmoe-bs quality` for a text.
PERPLEXITY_RATIO = 1.02
# Twice the budget that `bottleneck` has by default; wlr left out 20 % on the small model and missed the bar far
# (docs/measurements.md).
GATE_SHARE = 0.1
# A request that waits as long as it is computed finds, on average, a whole one before it: the device is busy most of
# the time, so that more in flight mostly wait as well.
QUEUE_OVER_COMPUTE = 1.0
QUEUE_SHARE = 0.1  # of the latency; what is less nobody feels

Kind = Literal["waiting", "air", "quality", "queue"]
TITLES: dict[Kind, str] = {
    "waiting": "waiting dominates",
    "air": "air dominates",
    "quality": "selection damages quality",
    "queue": "a queue grows",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One trouble of one policy on one data set."""

    kind: Kind
    dataset: str
    policy: str
    device: str | None  # that is to blame most; None: none is
    figures: dict[str, float]
    text: str  # what was found, with its figures
    advice: str  # what to do about it


def diagnose(runs: Sequence[PolicyRun], in_flight: InFlight, has_air: bool = True) -> list[Finding]:
    """Look for the four troubles.

    Args:
        runs: of one command.
        in_flight: microbatches at a time.
        has_air: whether rows travel. Where devices are other processes of this machine, what a request takes beside its
            computing is their turn on its processors, which no link mends.
    """
    exact = {run.evaluation.dataset: run.evaluation for run in runs if run.policy == "exact"}
    found = []
    for run in runs:
        at_once = run.summary.in_flight_p50 if in_flight == "auto" else in_flight
        damage = _damage(run, exact.get(run.evaluation.dataset))
        found += [one for one in (_slowness(run, at_once, has_air), _queue(run, at_once), damage) if one is not None]
    return sorted(found, key=lambda finding: list(TITLES).index(finding.kind))


def _slowness(run: PolicyRun, in_flight: float, has_air: bool) -> Finding | None:
    """Find out whether the air dominates, or else waiting, of which the air is a part."""
    summary = run.summary
    if not summary.devices or summary.latency_share_ms <= 0:
        return None
    radio_ms = summary.queue_ms - _behind_compute_ms(summary, in_flight)
    on_air_ms = min(summary.air_ms + radio_ms, summary.latency_share_ms - summary.bs_ms)
    air_share, waiting_share = (ms / summary.latency_share_ms for ms in (on_air_ms, summary.waiting_ms))
    if has_air and air_share >= AIR_SHARE:
        worst, worst_ms = _worst(summary, lambda device: device.air_ms)
        queued = f" ({radio_ms:.0f} of them in a queue for it)" if radio_ms >= 0.5 else ""
        # Only int8 rows have an error to record.
        smaller = ["send smaller rows (--wire int8)"] if summary.wire_error is None else []
        return Finding(
            "air",
            *run.pair,
            worst,
            {"air_share": air_share, "air_ms": on_air_ms, "radio_queue_ms": radio_ms, "device_ms": summary.device_ms},
            f"{on_air_ms:.0f} of {summary.latency_share_ms:.0f} ms of a question are air{queued}, {summary.device_ms:.3g} ms "
            f"computing; longest with {worst}, {worst_ms:.3g} ms",
            "; or ".join([*_fewer_rows(run), *smaller, f"give {worst} a better link"]),
        )
    if waiting_share >= WAITING_SHARE:
        worst, worst_ms = _worst(summary, lambda device: device.compute_ms)
        return Finding(
            "waiting",
            *run.pair,
            worst,
            {"waiting_share": waiting_share, "waiting_ms": summary.waiting_ms, "device_ms": summary.device_ms},
            f"{summary.waiting_ms:.0f} of {summary.latency_share_ms:.0f} ms of a question the base station only waits; "
            f"{worst} computes longest, {worst_ms:.3g} ms",
            "; or ".join(
                [
                    f"take load off {worst}: fewer experts there (wdmoe-export place --placement balanced)",
                    *_fewer_rows(run),
                    f"fill the waiting with other questions (--in-flight, now {in_flight:.3g})",
                ]
            ),
        )
    return None


def _behind_compute_ms(summary: Summary, in_flight: float) -> float:
    """Return how much of a question's queue stands before processors; the rest of it waits for the radio.

    Devices report both as one. Before a processor there are at most the requests of the other microbatches in flight.
    """
    return min(summary.queue_ms, (in_flight - 1) * summary.device_ms)


def _fewer_rows(run: PolicyRun) -> list[str]:
    """Return the policy that sends less to what is slowest, unless it is the one that ran."""
    return [] if run.policy.partition(":")[0] == "bottleneck" else ["send fewer rows (--policy bottleneck)"]


def _queue(run: PolicyRun, in_flight: float) -> Finding | None:
    """Find out whether requests stand before a device's processor; with one microbatch in flight none can."""
    summary = run.summary
    behind_ms = _behind_compute_ms(summary, in_flight)
    if in_flight == 1 or not summary.devices or behind_ms < QUEUE_SHARE * summary.latency_share_ms:
        return None
    device = max(summary.devices, key=lambda device: min(device.queue_ms, (in_flight - 1) * device.compute_ms))
    if device.queue_ms < QUEUE_OVER_COMPUTE * device.compute_ms:
        return None
    return Finding(
        "queue",
        *run.pair,
        device.name,
        {
            "queue_ms": device.queue_ms,
            "compute_ms": device.compute_ms,
            "queue_first_ms": device.queue_first_ms,
            "queue_last_ms": device.queue_last_ms,
        },
        f"a request to {device.name} waits {device.queue_ms:.1f} ms behind others and is computed in "
        f"{device.compute_ms:.1f}; first quarter of the run {device.queue_first_ms:.1f} ms, last "
        f"{device.queue_last_ms:.1f}",
        f"try a lower --in-flight (now {in_flight:.3g}) or --batch, and keep it if tokens/s hold; or take load off "
        f"{device.name}",
    )


def _damage(run: PolicyRun, exact: Evaluation | None) -> Finding | None:
    """Find out whether a policy answers worse than exact, or leaves out so much that it should."""
    if run.policy == "exact":
        return None
    figures: dict[str, float] = {}
    said: list[str] = []
    points, ratio = run.to_exact, run.perplexity_ratio
    if points is not None and points.mean_points + SIGNIFICANT_STDERRS * points.stderr_points < 0:
        figures |= {"points": points.mean_points, "stderr_points": points.stderr_points}
        said.append(f"acc {points.mean_points:+.1f} ±{points.stderr_points:.1f} points against exact")
    if ratio is not None and exact is not None and ratio > PERPLEXITY_RATIO and _less_likely(run.evaluation, exact):
        figures["perplexity_over_exact"] = ratio
        said.append(f"perplexity x {ratio:.3f} against exact")
    if run.summary.gate_mass_dropped >= GATE_SHARE or said:
        figures["gate_mass_dropped"] = run.summary.gate_mass_dropped
        said.append(f"{100 * run.summary.gate_mass_dropped:.0f} % of the gate weight left out")
    if not said:
        return None
    return Finding(
        "quality",
        *run.pair,
        None,
        figures,
        ", ".join(said),
        "give the policy a budget, such as budget=0.05, or a smaller one, and hold it against the bar with "
        "wdmoe-bs quality",
    )


def _less_likely(ours: Evaluation, exact: Evaluation) -> bool:
    """Whether the rows' own words are less likely than under exact by more than chance; one row tells nothing."""
    pairs = zip(ours.log_likelihoods, exact.log_likelihoods, strict=True)
    lost = [math.fsum(mine) - math.fsum(theirs) for mine, theirs in pairs]
    if len(lost) < 2:
        return False
    mean = math.fsum(lost) / len(lost)
    stderr = math.sqrt(math.fsum((value - mean) ** 2 for value in lost) / (len(lost) - 1) / len(lost))
    return mean + SIGNIFICANT_STDERRS * stderr < 0


def _worst(summary: Summary, part_ms: Callable[[DeviceSummary], float]) -> tuple[str, float]:
    """Return the device with the largest part of a request's time, summed over its requests of a question."""
    device = max(summary.devices, key=lambda device: part_ms(device) * device.requests)
    return device.name, part_ms(device) * device.requests / summary.questions
