"""The figures of a report, each narrow enough for a phone: how late, how good, where the time goes, who did the work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from wdmoe.bs.experiment import PolicyRun
from wdmoe.bs.plots import COLORS, MARKERS, inline_style, inline_svg, new_figure

_WIDTH_IN = 4.6
_MOST_DEVICES = 24  # that a figure shows: those with the most rows
_NAME_LENGTH = 44  # of a policy in a figure; the tables have it whole


def latency_distribution(runs: Sequence[PolicyRun], origin: str, key: str, label: str) -> str:
    """Draw the latency of a question under each policy: middle half, 5 to 95 %, median."""

    def draw(figure: Any) -> None:
        axes = _rows_of_policies(figure, runs, f"latency of a question, ms ({origin})")
        for row, run in enumerate(runs):
            at = run.summary.latency_percentiles_ms
            axes.plot((at[5], at[95]), (row, row), color=COLORS[0], linewidth=1.5)
            axes.plot((at[25], at[75]), (row, row), color=COLORS[0], linewidth=9, solid_capstyle="butt", alpha=0.75)
            axes.plot(at[50], row, "|", color=COLORS[1], markersize=15, markeredgewidth=2.5)

    return _svg(draw, 0.9 + 0.52 * len(runs), key, label)


def latency_against_quality(runs: Sequence[PolicyRun], origin: str, key: str, label: str) -> str:
    """Draw the median latency against what it costs: accuracy, or perplexity, and the gate weight left out."""
    metric, heading, factor = quality_metric(runs[0])

    def draw(figure: Any) -> None:
        good, dropped = figure.subplots(2, 1, sharey=True)
        for number, run in enumerate(runs):
            drawn = {
                "color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 8,
                "linestyle": "none", "label": _short(run.policy),
            }  # fmt: skip
            value, stderr = (factor * of[metric] for of in (run.evaluation.metrics, run.evaluation.stderr))
            latency_ms = run.summary.latency_p50_ms
            good.errorbar(value, latency_ms, xerr=stderr if math.isfinite(stderr) else None, capsize=3, **drawn)
            dropped.plot(100 * run.summary.gate_mass_dropped, latency_ms, **drawn)
        good.set_xlabel(heading)
        dropped.set_xlabel("gate weight left out, %")
        largest = max(run.summary.gate_mass_dropped for run in runs)
        dropped.set_xlim(-5 * max(largest, 0.02), 115 * max(largest, 0.02))
        good.set_ylim(0, 1.15 * max(run.summary.latency_p50_ms for run in runs))
        for axes in (good, dropped):
            axes.set_ylabel(f"median, ms ({origin})")
            axes.grid(alpha=0.25)
        handles, names = dropped.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower left", ncols=1)

    return _svg(draw, 4.8 + 0.22 * len(runs), key, label)


def time_split(runs: Sequence[PolicyRun], origin: str, key: str, label: str) -> str:
    """Draw where a question's time goes: above what adds up to its latency, below what devices and air took of it."""
    parts: tuple[tuple[str, str, Callable[[PolicyRun], float], float], ...] = (
        (
            "base station",
            COLORS[0],
            lambda run: run.summary.bs_ms + run.summary.shared_ms + run.summary.bs_experts_ms,
            0.0,
        ),
        ("waiting", COLORS[4], lambda run: run.summary.waiting_ms, 0.0),
        ("overhead", "#888888", lambda run: run.summary.overhead_ms, 0.0),
        ("air", COLORS[5], lambda run: run.summary.air_ms, 0.24),
        ("device compute", COLORS[1], lambda run: run.summary.device_ms, 0.24),
        ("queue", COLORS[3], lambda run: run.summary.queue_ms, 0.24),
    )

    def draw(figure: Any) -> None:
        axes = _rows_of_policies(figure, runs, f"mean of a question's share, ms ({origin})")
        for row, run in enumerate(runs):
            for below in (0.0, 0.24):
                left_ms = 0.0
                for name, color, part_ms, lower in parts:
                    if lower == below:
                        ms, named = max(0.0, part_ms(run)), {} if row else {"label": name}
                        axes.barh(row + below, ms, 0.24 if below else 0.22, left_ms, color=color, **named)
                        left_ms += ms
        axes.set_xlim(left=0)
        figure.legend(loc="outside lower left", ncols=3)

    return _svg(draw, 1.5 + 0.75 * len(runs), key, label)


def rows_by_device(runs: Sequence[PolicyRun], key: str, label: str) -> str:
    """Draw how many rows each device got under each policy."""
    rows = [{device.name: device.rows for device in run.summary.devices} for run in runs]
    names = sorted({name for of_run in rows for name in of_run}, key=lambda name: (len(name), name))
    busiest = sorted(names, key=lambda name: -sum(of_run.get(name, 0) for of_run in rows))[:_MOST_DEVICES]
    shown = [name for name in names if name in busiest]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        thick = 0.8 / len(runs)
        for number, (run, of_run) in enumerate(zip(runs, rows, strict=True)):
            places = [place + (number - (len(runs) - 1) / 2) * thick for place in range(len(shown))]
            counts = [of_run.get(name, 0) for name in shown]
            axes.barh(places, counts, 0.9 * thick, color=COLORS[number % len(COLORS)], label=_short(run.policy))
        axes.set_yticks(range(len(shown)), [_short(name, 18) for name in shown])
        axes.invert_yaxis()
        axes.set_xlabel("rows sent to it" + (f" (the {len(shown)} busiest)" if len(shown) < len(names) else ""))
        figure.legend(loc="outside lower left", ncols=1)

    return _svg(draw, 1.2 + len(shown) * (0.2 + 0.14 * len(runs)) + 0.22 * len(runs), key, label)


def quality_metric(run: PolicyRun) -> tuple[str, str, float]:
    """Return the metric that stands for quality, its heading, and the factor from its value to the heading's unit."""
    metrics = run.evaluation.metrics
    if "acc" in metrics:
        return "acc", "accuracy, % ± standard error", 100.0
    name = next((name for name in ("word_perplexity", "perplexity") if name in metrics), next(iter(metrics)))
    return name, name.replace("_", " ") + (" (less is better)" if "perplexity" in name else ""), 1.0


def _svg(draw: Callable[[Any], None], height_in: float, key: str, label: str) -> str:
    with inline_style(key):
        figure = new_figure(_WIDTH_IN, height_in)
        draw(figure)
        return inline_svg(figure, key, label)


def _rows_of_policies(figure: Any, runs: Sequence[PolicyRun], heading: str) -> Any:
    """Return axes with a row for each policy, its name above what is drawn in it: a name may be long."""
    axes = figure.add_subplot()
    for row, run in enumerate(runs):
        axes.text(0.0, row - 0.22, _short(run.policy), transform=axes.get_yaxis_transform(), va="bottom")
    axes.set_yticks([])
    axes.set_ylim(len(runs) - 0.5, -0.75)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlabel(heading)
    return axes


def _short(name: str, length: int = _NAME_LENGTH) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
