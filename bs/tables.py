"""What a person sees on the terminal: tables that fit 80 columns."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from wdmoe.bs.diagnosis import TITLES, Finding
from wdmoe.bs.experiment import PolicyRun
from wdmoe.bs.quality import PERPLEXITY_SET, Quality, QualityBar, judge
from wdmoe.bs.results import emulated_words

_CALL_ROWS = (1, 16, 256)
_LOOK: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True, "show_edge": False}
_ENDLESS = 10_000  # columns, more than any table takes
_COSTS = ("p50", "p95", "wait", "MB down", "up", "drop", "theta")


@dataclass(frozen=True, slots=True)
class _Metric:
    """How a metric of the judge is shown: value and standard error to text."""

    heading: str
    note: str
    show: Callable[[float, float], str]


_ACCURACY = "acc, norm: percent right, plain and by length, ± standard error"
_PERPLEXITY = "ppl: perplexity of a word (lambada: of the last one)"
_METRICS = {
    "acc": _Metric("acc %", _ACCURACY, lambda value, stderr: f"{100 * value:.1f} ±{100 * stderr:.1f}"),
    "acc_norm": _Metric("norm", _ACCURACY, lambda value, _: f"{100 * value:.1f}"),
    "perplexity": _Metric("ppl", _PERPLEXITY, lambda value, _: f"{value:.4g}"),
    "word_perplexity": _Metric("ppl", _PERPLEXITY, lambda value, _: f"{value:.4g}"),
    "bits_per_byte": _Metric("bits", "bits: of a byte of text", lambda value, _: f"{value:.3f}"),
}


def policy_tables(runs: Sequence[PolicyRun], link: str, devices: int) -> Group:
    """Show policies side by side, a table per data set: how well and how fast, never one without the other."""
    by_dataset: dict[str, list[PolicyRun]] = {}
    for run in runs:
        by_dataset.setdefault(run.evaluation.dataset, []).append(run)
    shown = [name for name in _METRICS if any(name in run.evaluation.metrics for run in runs)]
    notes = dict.fromkeys(_METRICS[name].note for name in shown)
    note = (
        f"{'; '.join(notes)}; vs exact: paired difference of acc in points, or ratio of ppl; "
        "p50, p95, wait: ms a question, wait: only devices are at work; MB: rows down and up; "
        "drop: of the droppable (token, device) pairs"
    )
    tables = [_policy_table(of_dataset, link, devices) for of_dataset in by_dataset.values()]
    return Group(*tables, Text(note, style="dim"))


def _policy_table(runs: Sequence[PolicyRun], link: str, devices: int) -> Group:
    first = runs[0].evaluation
    source = first.source if first.variant is None else f"{first.source}, local variant"
    title = f"{first.dataset}: {first.rows} rows ({source}), {devices} devices over {link}"
    table = _policy_rows()
    metrics = {name: how for name, how in _METRICS.items() if name in first.metrics}
    for heading in (*(how.heading for how in metrics.values()), "vs exact", *_COSTS):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        summary = run.summary
        table.add_row(
            run.policy,
            *(how.show(run.evaluation.metrics[name], run.evaluation.stderr[name]) for name, how in metrics.items()),
            _to_exact(run),
            f"{summary.latency_p50_ms:.0f}",
            f"{summary.latency_p95_ms:.0f}",
            f"{summary.waiting_ms:.0f}",
            f"{summary.bytes_down / 1e6:.1f}",
            f"{summary.bytes_up / 1e6:.1f}",
            f"{100 * summary.dropped_share:.0f}%",
            "-" if summary.theta_mean is None else f"{summary.theta_mean:.2f}",
        )
    return _with_note(title, table, "" if first.variant is None else f"local variant: {first.variant}\n")


def time_table(runs: Sequence[PolicyRun], virtual: bool = False) -> Group:
    """Show where the time of a question goes, and how much was done in all, a table per data set."""
    title = f"here the {'virtual ' if virtual else ''}time of a question goes, mean ms of its share of a microbatch"
    datasets = list(dict.fromkeys(run.evaluation.dataset for run in runs))
    tables = [
        _with_note(
            f"{dataset}: w{title}" if len(datasets) > 1 else f"W{title}",
            _time_rows([run for run in runs if run.evaluation.dataset == dataset]),
            "",
        )
        for dataset in datasets
    ]
    errors = [run.summary.wire_error for run in runs if run.summary.wire_error is not None]
    lost = f"; int8 on the wire rounds rows by {100 * max(errors):.2f} %" if errors else ""
    if any(run.summary.bs_rows for run in runs):
        own = (
            f"{run.policy} {100 * s.bs_share:.1f} % ({s.bs_rows:,}), {s.bs_experts_ms:.0f} ms"
            for run in runs
            if (s := run.summary)
        )
        lost += f"; rows that the base station ran itself, no link: {'; '.join(own)} a question"
    note = (
        "latency = BS (stages, shared experts, its own experts) + waiting (only devices and air are at work) + overhead "
        "(hand-over, queues of the base station); air, queue (for the radio or the processor of a device), device: the "
        "parts of the slowest request of each block, partly hidden behind shared experts"
    )
    return Group(*tables, Text(note + lost, style="dim"))


def _time_rows(runs: Sequence[PolicyRun]) -> Table:
    table = _policy_rows()
    for heading in ("latency", "BS", "waiting", "overhead", "air", "queue", "device", "tokens/s", "wall s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        summary = run.summary
        split_ms = (
            summary.latency_share_ms,
            summary.bs_ms + summary.shared_ms + summary.bs_experts_ms,
            summary.waiting_ms,
            summary.overhead_ms,
            summary.air_ms,
            summary.queue_ms,
            summary.device_ms,
        )
        table.add_row(
            run.policy, *(str(round(ms)) for ms in split_ms), f"{summary.tokens / run.clock_s:.0f}", f"{run.wall_s:.1f}"
        )
    return table


def quality_table(quality: Quality, bar: QualityBar, text_variant: str | None) -> Group:
    """Show a policy's distance from exact, each criterion with its bound and its verdict."""
    criteria = judge(quality, bar)
    passed = all(criterion.reached for criterion in criteria)
    title = f"{quality.policy} {'reaches' if passed else 'misses'} the quality bar"
    table = _table()
    table.add_column("criterion", no_wrap=True)
    for heading in ("value", "bar"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    text, divergence = quality.text, quality.divergence
    details = (
        f"{text.exact_perplexity:.2f} -> {text.policy_perplexity:.2f}, {text.tokens:,} tokens",
        f"largest {divergence.largest:.3g}, {divergence.positions:,} places",
        f"{quality.accuracy.mean_points:+.2f} ±{quality.accuracy.stderr_points:.2f} points",
        ", ".join(f"{exact.dataset} {exact.rows:,}" for exact, _ in quality.evaluations),
    )
    table.add_column("from", overflow="fold")
    shown = ("{:.4f}", "{:.5f}", "{:+.2f}", "{:,.0f}")
    for criterion, form, detail in zip(criteria, shown, details, strict=True):
        sign = "<=" if criterion.at_most else ">="
        bound = f"{criterion.bound:,g}"
        table.add_row(
            criterion.name,
            form.format(criterion.value),
            f"{sign} {bound}",
            "pass" if criterion.reached else "miss",
            detail,
        )
    sets = {exact.dataset: exact for exact, _ in quality.evaluations}
    by_dataset = "; ".join(
        f"{name} {100 * sets[name].metrics['acc']:.1f} {points.mean_points:+.2f} ±{points.stderr_points:.2f}"
        for name, points in quality.by_dataset().items()
    )
    variants = {PERPLEXITY_SET: text_variant} | {name: exact.variant for name, exact in sets.items()}
    summary = quality.summary
    lines = [
        f"acc %, exact, then the difference in points: {by_dataset}",
        *(f"local variant of {name}: {variant}" for name, variant in variants.items() if variant is not None),
        f"dropped: {100 * summary.dropped_share:.1f} % of the pairs, {100 * summary.gate_mass_dropped:.1f} % of the gate",
    ]
    return _with_note(title, table, "\n".join(lines))


def device_table(devices: Sequence[dict[str, Any]], missing: Sequence[int]) -> Group:
    """Show who is connected, with what, and how fast."""
    absent = f"; missing: {', '.join(f'device-{k}' for k in missing)}" if missing else ""
    title = f"{len(devices)} devices connected{absent}"
    table = _table()
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
            f"emulated {device['emulated']['device']}" if device["emulated"] else device["hardware"],
            f"{device['round_trip_ms']:.2f}",
            *(f"{calls[str(rows)]:.2f}" if str(rows) in calls else "-" for rows in _CALL_ROWS),
        )
    rows = ", ".join(map(str, _CALL_ROWS))
    origins = " or ".join(sorted({device["origin"] for device in devices})) or "measured"
    notes = [f"rtt: round trip, ms; then {origins} ms of one expert call with {rows} rows"]
    notes += [f"{device['name']}: {emulated_words(device)}" for device in devices if device["emulated"]]
    return _with_note(title, table, "\n".join(notes))


def diagnosis_list(findings: Sequence[Finding], origin: str) -> Group:
    """Show what is wrong with a run, trouble by trouble, and what to do about it.

    Args:
        findings: of `diagnose`, at least one.
        origin: of the times: modelled, emulated or measured.
    """
    lines: list[Text | Table] = [Text(f"Diagnosis (times {origin})", style="italic")]
    for kind, title in TITLES.items():
        of_kind = [finding for finding in findings if finding.kind == kind]
        if of_kind:
            lines.append(Text(title, style="bold"))
        lines += [_hanging("  ", f"{finding.dataset}, {finding.policy}: {finding.text}") for finding in of_kind]
        lines += [_hanging("  -> ", advice) for advice in dict.fromkeys(finding.advice for finding in of_kind)]
    return Group(*lines)


def _hanging(mark: str, text: str) -> Table:
    """Return a text of which each line begins to the right of a mark, however wide the terminal is."""
    grid = Table.grid()
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(mark, Text(text))
    return grid


def _to_exact(run: PolicyRun) -> str:
    if run.to_exact is not None:
        return f"{run.to_exact.mean_points:+.1f} ±{run.to_exact.stderr_points:.1f}"
    return "-" if run.perplexity_ratio is None else f"x {run.perplexity_ratio:.4f}"


def status_table(answer: dict[str, Any]) -> Group:
    """Show how a running base station is."""
    title = f"{answer['model']}: {answer['status']}, {answer['in_flight']} in flight"
    table = _table()
    table.add_column("device", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for heading in ("heard s ago", "rtt ms", "x slower"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("why")
    for device in answer["devices"]:
        table.add_row(
            device["name"],
            device["state"],
            f"{device['last_heard_s']:.1f}",
            f"{device['round_trip_ms']:.2f}",
            f"{device['correction']:.1f}",
            device["reason"],
        )
    for name in answer["gone"]:
        table.add_row(name, "gone", "-", "-", "-", "")
    counts = ", ".join(
        f"{key.replace('_', ' ')} {answer[key]}" for key in ("replaced", "hedged", "skipped", "late_replies")
    )
    refused = "".join(f"\nrefused {count} x: {text}" for text, count in answer["refused"].items())
    return _with_note(title, table, counts + refused)


def simulation_table(result: dict[str, Any]) -> Group:
    """Show what `wdmoe-bs simulate` found."""
    devices, entries = sum(result["devices"].values()), result["results"]
    medium = result["channel"] if result["bandwidth"] is None else f"{result['channel']}, {result['bandwidth']}"
    questions = entries[0]["questions"]
    title = f"{result['model']['name']}: {questions} questions, {devices} modelled devices, {medium} channel"
    table = _policy_rows()
    for heading in ("mean ms", "p50", "p95", "vs exact", "pairs dropped", "gate dropped"):
        table.add_column(heading, justify="right", no_wrap=True)
    exact = next((entry["latency_mean_ms"] for entry in entries if entry["policy"] == "exact"), None)
    for entry in entries:
        against = "-" if exact is None else f"{100 * (entry['latency_mean_ms'] / exact - 1):+.1f}%"
        table.add_row(
            entry["policy"],
            *(f"{entry[key]:.0f}" for key in ("latency_mean_ms", "latency_p50_ms", "latency_p95_ms")),
            against,
            f"{100 * entry['dropped_share']:.1f}%",
            f"{100 * entry['gate_mass_dropped']:.1f}%",
        )
    return _with_note(title, table, "modelled: latency of a question, one at a time; nothing here was measured")


class _NamedRows(Table):
    """A table with names in its first column; one that has no room beside its figures gets a line of its own above them."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        column, *others = self.columns
        names = [str(cell) for cell in column.cells]
        natural = Measurement.get(console, options.update(width=_ENDLESS), self).maximum
        longest = max(cell_len(text) for text in (str(column.header), *names))
        room = options.max_width - (natural - longest)
        beside = copy(self)
        cells = [name if cell_len(name) <= room else "" for name in names]
        beside.columns = [replace(column, _cells=[*cells]), *others]
        lines = console.render_lines(_AsItIs(beside), options, pad=False)
        head = len(lines) - len(names)  # as no cell is wrapped
        for number, line in enumerate(lines):
            if number >= head and not cells[number - head]:
                yield from map(Text, _broken(names[number - head], options.max_width))
            yield from line
            yield Segment.line()


@dataclass(frozen=True, slots=True)
class _AsItIs:
    """A table as rich shows it."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return Table.__rich_console__(self.table, console, options)


def _broken(name: str, width: int) -> list[str]:
    """Break a policy's name into lines, between its options or the numbers of one."""
    lines = [""]
    for part in re.findall(r"[^:,/]+[:,/]?", name):
        if lines[-1].strip() and len(lines[-1]) + len(part) > width:
            lines.append("  ")
        lines[-1] += part
    return lines


def _table() -> Table:
    return Table(**_LOOK)


def _policy_rows() -> Table:
    """Make a table with a row for each policy."""
    table = _NamedRows(**_LOOK)
    table.add_column("policy", no_wrap=True)
    return table


def _with_note(title: str, table: Table, note: str) -> Group:
    # A title of the table's own would be folded to the table's width.
    return Group(Text(title, style="italic"), table, Text(note, style="dim"))
