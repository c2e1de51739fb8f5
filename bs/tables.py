"""What a person sees on the terminal: tables that fit 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from wdmoe.bs.experiment import PolicyRun

_CALL_ROWS = (1, 16, 256)


def policy_table(runs: Sequence[PolicyRun], link: str, devices: int) -> Group:
    """Show policies side by side: accuracy and latency, never one without the other."""
    first = runs[0].evaluation
    table = _table(f"{first.dataset}: {first.rows} rows ({first.source}), {devices} devices over {link}")
    table.add_column("policy", overflow="fold", min_width=5)
    for heading in ("acc %", "norm", "vs exact", "p50", "p95", "wait", "MB down", "up", "drop", "theta"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        evaluation, summary = run.evaluation, run.summary
        table.add_row(
            run.policy,
            f"{100 * evaluation.metrics['acc']:.1f} ±{100 * evaluation.stderr['acc']:.1f}",
            f"{100 * evaluation.metrics['acc_norm']:.1f}" if "acc_norm" in evaluation.metrics else "-",
            "-" if run.to_exact is None else f"{run.to_exact.mean_points:+.1f} ±{run.to_exact.stderr_points:.1f}",
            f"{summary.latency_p50_ms:.0f}",
            f"{summary.latency_p95_ms:.0f}",
            f"{summary.waiting_ms:.0f}",
            f"{summary.bytes_down / 1e6:.1f}",
            f"{summary.bytes_up / 1e6:.1f}",
            f"{100 * summary.dropped_share:.0f}%",
            "-" if summary.theta_mean is None else f"{summary.theta_mean:.2f}",
        )
    return _with_note(
        table,
        "acc, norm: percent right, plain and by length, ± standard error; vs exact: paired difference of acc, "
        "points; p50, p95, wait: ms a question, wait: only devices are at work; MB: rows down and up; "
        "drop: of the droppable (token, device) pairs",
    )


def time_table(runs: Sequence[PolicyRun]) -> Group:
    """Show where the time of a question goes, and how much was done in all."""
    table = _table("Where the time of a question goes, mean ms")
    for heading in ("policy", "latency", "BS stages", "device", "other", "tokens/s", "wall s"):
        table.add_column(heading, justify="left" if heading == "policy" else "right", no_wrap=heading != "policy")
    for run in runs:
        summary = run.summary
        other = summary.latency_mean_ms - summary.bs_ms - summary.device_ms
        table.add_row(
            run.policy,
            *(f"{ms:.0f}" for ms in (summary.latency_mean_ms, summary.bs_ms, summary.device_ms, other)),
            f"{summary.tokens / run.wall_s:.0f}",
            f"{run.wall_s:.1f}",
        )
    return _with_note(table, "device: the slowest of each block; other: shared experts, the link, queues, hand-over")


def device_table(devices: Sequence[dict[str, Any]], missing: Sequence[int]) -> Group:
    """Show who is connected, with what, and how fast."""
    absent = f"; missing: {', '.join(f'device-{k}' for k in missing)}" if missing else ""
    table = _table(f"{len(devices)} devices connected{absent}")
    table.add_column("device", no_wrap=True)
    table.add_column("experts", justify="right", no_wrap=True)
    table.add_column("engine", no_wrap=True)
    table.add_column("hardware", overflow="ellipsis", no_wrap=True, max_width=18)
    for heading in ("rtt", *(f"{rows}" for rows in _CALL_ROWS)):
        table.add_column(heading, justify="right", no_wrap=True)
    for device in devices:
        calls = device["call_ms"]
        table.add_row(
            device["name"],
            str(device["experts"]),
            f"{device['engine']} {device['precision']}",
            device["hardware"],
            f"{device['round_trip_ms']:.2f}",
            *(f"{calls[str(rows)]:.2f}" if str(rows) in calls else "-" for rows in _CALL_ROWS),
        )
    rows = ", ".join(map(str, _CALL_ROWS))
    return _with_note(table, f"rtt: round trip, ms; then measured ms of one expert call with {rows} rows")


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False
    )


def _with_note(table: Table, note: str) -> Group:
    return Group(table, Text(note, style="dim"))
