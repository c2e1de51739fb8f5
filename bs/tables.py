"""What a person sees on the terminal: tables of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from wdmoe.bs.experiment import PolicyRun


def policy_table(runs: Sequence[PolicyRun], link: str, devices: int) -> Table:
    """Show policies side by side: accuracy and latency, never one without the other."""
    first = runs[0].evaluation
    table = Table(
        title=f"{first.dataset}, {first.rows} rows ({first.source}), {devices} devices over {link}",
        caption="acc %: +- standard error; diff: paired difference to exact, points; ms per question;\n"
        "wait: BS idle until the slowest device; MB: rows down/up; drop: of droppable pairs",
    )
    table.add_column("policy", overflow="fold")
    for heading in ("acc %", "norm %", "diff", "p50 ms", "p95 ms", "wait", "MB dn/up", "drop", "theta"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        evaluation, summary = run.evaluation, run.summary
        table.add_row(
            run.policy,
            f"{100 * evaluation.metrics['acc']:.1f}±{100 * evaluation.stderr['acc']:.1f}",
            f"{100 * evaluation.metrics['acc_norm']:.1f}" if "acc_norm" in evaluation.metrics else "-",
            "-" if run.to_exact is None else f"{run.to_exact.mean_points:+.1f}±{run.to_exact.stderr_points:.1f}",
            f"{summary.latency_p50_ms:.0f}",
            f"{summary.latency_p95_ms:.0f}",
            f"{summary.waiting_ms:.0f}",
            f"{summary.bytes_down / 1e6:.0f}/{summary.bytes_up / 1e6:.0f}",
            f"{100 * summary.dropped_share:.0f}%",
            "-" if summary.theta_mean is None else f"{summary.theta_mean:.2f}",
        )
    return table


def device_table(devices: Sequence[dict[str, Any]], missing: Sequence[int]) -> Table:
    """Show who is connected, with what, and how fast."""
    absent = f"; missing: {', '.join(f'device-{k}' for k in missing)}" if missing else ""
    table = Table(title=f"{len(devices)} devices connected{absent}", caption="ms per expert call, by rows")
    table.add_column("device", no_wrap=True)
    table.add_column("experts", justify="right")
    table.add_column("engine")
    table.add_column("hardware", overflow="ellipsis", no_wrap=True, max_width=20)
    table.add_column("rtt ms", justify="right")
    for device in devices:
        calls = device["call_ms"]
        shown = [str(n) for n in (1, 16, 256) if str(n) in calls]
        device["calls"] = ", ".join(f"{n}: {calls[n]:.2f}" for n in shown)
    table.add_column("ms per call", justify="right")
    for device in devices:
        table.add_row(
            device["name"],
            str(device["experts"]),
            f"{device['engine']} {device['precision']}",
            device["hardware"],
            f"{device['round_trip_ms']:.2f}",
            device["calls"],
        )
    return table
