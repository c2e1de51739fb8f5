"""A run as one page: what was run, the tables of the terminal, figures and the diagnosis. It asks nothing of a network.

All that comes from elsewhere (names of devices, hardware, the command) is escaped where it is put into the page.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from wdmoe.bs import report_plots
from wdmoe.bs.diagnosis import TITLES, Finding
from wdmoe.bs.experiment import Pair, PolicyRun
from wdmoe.bs.policies import parse_policy
from wdmoe.bs.results import link_words, origin_of_times
from wdmoe.bs.tables import device_table, policy_tables, time_table
from wdmoe.runtime.outputs import written_whole

_ORIGINS = {
    "modelled": "Answers are real. Times are modelled: devices and links come from profiles, in virtual time; nothing "
    "here was measured on a device.",
    "emulated": "Answers are real. Times passed on a clock, but devices answered as late as the ones they emulate "
    "would; nothing here was measured on those.",
    "measured": "Times were measured with the devices and links named below.",
}
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #5a5a5a; --line: #d5d5d5; --mark: #f4f1e6 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #141414; --soft: #a8a8a8; --line: #3a3a3a; --mark: #2a2719 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.2rem; margin-top: 2.2rem }
h1, h2, h3, dd, td, li, code { overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: minmax(6rem, auto) 1fr; gap: .2rem 1rem } dt { color: var(--soft) }
dd { margin: 0 } li code { white-space: nowrap; font-size: .9em }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; gap: 0 } dd { margin-bottom: .6rem } ul { padding-left: 1.2rem } }
.origin { background: var(--mark); padding: .6rem .8rem; border-left: .3rem solid #b08900 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
.caption { font-style: italic; font-size: .9rem; margin: 1rem 0 .3rem; max-width: 60rem; overflow-wrap: anywhere }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: left }
.right { text-align: right; white-space: nowrap } td:first-child { min-width: 7rem }
.note { color: var(--soft); font-size: .85rem; white-space: pre-line; max-width: 60rem }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem 2rem }
figure { margin: 0 } figcaption { font-size: .85rem; color: var(--soft) }
svg { width: 100%; height: auto; max-width: 34rem } svg * { stroke-linejoin: round; stroke-linecap: butt }
"""


def write_report(
    path: Path, head: dict[str, Any], runs: Sequence[PolicyRun], findings: Sequence[Finding], missing: Sequence[Pair]
) -> None:
    """Write the page whole or not at all.

    Args:
        path: of the page.
        head: of `describe_station`.
        runs: what is done, at least one.
        findings: of `diagnose`.
        missing: data sets and policies that were asked for and are not done.

    Raises:
        OutputError: it cannot be written there.
    """
    page = render_report(head, runs, findings, missing)
    with written_whole(path) as partial:
        partial.write_text(page, encoding="utf-8")


def render_report(
    head: dict[str, Any], runs: Sequence[PolicyRun], findings: Sequence[Finding], missing: Sequence[Pair]
) -> str:
    """Return the page; see `write_report`."""
    origin = origin_of_times(head)
    by_dataset: dict[str, list[PolicyRun]] = {}
    for run in runs:
        by_dataset.setdefault(run.evaluation.dataset, []).append(run)
    title = f"{head['model']['name']} on {', '.join(by_dataset)}"
    virtual = head["clock"]["kind"] == "virtual"
    left = "; ".join(f"{dataset} under {policy}" for dataset, policy in missing)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="origin"><strong>{origin}</strong>. {_ORIGINS[origin]}</p>',
        f'<p class="origin"><strong>Not finished</strong>: {escape(left)}.</p>' if left else "",
        "<h2>Results</h2>",
        _html(policy_tables(runs, link_words(head), len(head["devices"]))),
        _html(time_table(runs, virtual)),
        f'<p class="note">All times are {origin}; wall s is what this machine took.</p>',
        f"<h2>Diagnosis</h2>{_diagnosis(findings, origin)}",
        *(_figures(number, dataset, of_it, origin) for number, (dataset, of_it) in enumerate(by_dataset.items())),
        f"<h2>What was run</h2>{_facts(head, runs)}",
        _html(device_table(head["devices"], ())),
        _work_table(runs, origin),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: wdmoe-bs run</title><style>{_STYLE}</style></head>\n"
        f"<body><main>{chr(10).join(body)}</main></body></html>\n"
    )


def _figures(number: int, dataset: str, runs: Sequence[PolicyRun], origin: str) -> str:
    """Return the figures of one data set."""
    metric, _, factor = report_plots.quality_metric(runs[0])
    latencies = "; ".join(
        f"{run.policy}: median {run.summary.latency_p50_ms:.0f}, 95 % within {run.summary.latency_p95_ms:.0f} ms"
        for run in runs
    )
    qualities = "; ".join(
        f"{run.policy}: {metric} {factor * run.evaluation.metrics[metric]:.4g}, "
        f"{100 * run.summary.gate_mass_dropped:.1f} % of the gate weight left out"
        for run in runs
    )
    drawn = (
        (
            report_plots.latency_distribution(runs, origin, f"f{number}a", escape(f"Latency. {latencies}")),
            f"Latency of a question, {origin}: bar from 25 to 75 %, line from 5 to 95 %, the stroke is the median.",
        ),
        (
            report_plots.latency_against_quality(runs, origin, f"f{number}b", escape(f"Quality. {qualities}")),
            f"Latency ({origin}) against quality: what the judge says, and the gate weight that was left out.",
        ),
        (
            report_plots.time_split(runs, origin, f"f{number}c", "Where the time goes, as in the table above"),
            f"Where a question's time goes, {origin}. Upper bar: its latency; lower: the slowest request of each block.",
        ),
        (
            report_plots.rows_by_device(runs, f"f{number}d", "Rows sent to each device, as in the table below"),
            "Rows that each device was sent, by policy.",
        ),
    )
    figures = "".join(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" for svg, caption in drawn)
    return f'<h2>{escape(dataset)}</h2><div class="figures">{figures}</div>'


def _diagnosis(findings: Sequence[Finding], origin: str) -> str:
    if not findings:
        return f"<p>None of the known troubles shows: {', '.join(TITLES.values())}.</p>"
    parts = [f"<p>Times are {origin}.</p>"]
    for kind, title in TITLES.items():
        of_kind = [finding for finding in findings if finding.kind == kind]
        if of_kind:
            found = "".join(
                f"<li>{escape(f'{finding.dataset}, {finding.policy}: {finding.text}')}</li>" for finding in of_kind
            )
            advice = "".join(f"<li>{_with_options(advice)}</li>" for advice in dict.fromkeys(f.advice for f in of_kind))
            parts.append(f"<h3>{title}</h3><ul>{found}</ul><p>What to do:</p><ul>{advice}</ul>")
    return "".join(parts)


def _with_options(text: str) -> str:
    """Return a text for the page, the names of options in it never broken over lines."""
    return re.sub(r"--[a-z][a-z-]*", r"<code>\g<0></code>", escape(text))


def _facts(head: dict[str, Any], runs: Sequence[PolicyRun]) -> str:
    """Return what a reader needs to run it again."""
    model, link, clock = head["model"], head["link"], head["clock"]
    facts = {
        "model": f"{model['name']} ({model['family']}), experts in {model['expert_precision']}",
        "bundle": model["bundle_id"],
        "link": link_words(head) + (", encrypted" if link["encrypted"] else ""),
        "clock": ", ".join(f"{key.replace('_', ' ')} {_words(value)}" for key, value in clock.items() if value),
        "load": f"{head['in_flight']} in flight, {head['batch']} in a batch, {head['threads']} threads",
        "judge": "; ".join(dict.fromkeys(run.evaluation.judge for run in runs)),
    }
    for name in dict.fromkeys(run.policy for run in runs):
        options = ", ".join(f"{key} {_words(value)}" for key, value in asdict(parse_policy(name)).items())
        facts[f"policy {name.partition(':')[0]}"] = options or "no options"
    facts |= {
        "command": head["command"],
        "date": head["date"],
        "software": f"wdmoe {head['wdmoe']}, Python {head['python']}",
    }
    return f"<dl>{''.join(f'<dt>{escape(key)}</dt><dd>{escape(value)}</dd>' for key, value in facts.items())}</dl>"


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return "none" if math.isinf(value) else f"{value:g}"  # without a loss or a bound nothing is limited
    return str(value)


def _work_table(runs: Sequence[PolicyRun], origin: str) -> str:
    """Return what each device did."""
    table = Table()
    for heading in ("data set", "policy", "device"):
        table.add_column(heading)
    for heading in ("requests", "rows", "compute ms", "queue ms", "air ms"):
        table.add_column(heading, justify="right")
    for run in runs:
        for device in run.summary.devices:
            table.add_row(
                run.evaluation.dataset,
                run.policy,
                device.name,
                f"{device.requests:,}",
                f"{device.rows:,}",
                *(f"{ms:.2f}" for ms in (device.compute_ms, device.queue_ms, device.air_ms)),
            )
    return _html(Group(Text(f"What each device did; times are means of a request, {origin}"), table))


def _html(group: Group) -> str:
    """Return what the terminal shows: a text before a table is its caption, any other a note."""
    parts: list[str] = []
    caption = ""
    for shown in group.renderables:
        if isinstance(shown, Group):
            parts.append(_html(shown))
        elif isinstance(shown, Table):
            parts.append(_html_table(shown, caption))
            caption = ""
        elif isinstance(shown, Text):
            if caption:
                parts.append(f'<p class="note">{escape(caption)}</p>')
            caption = shown.plain
    return "".join(parts) + (f'<p class="note">{escape(caption)}</p>' if caption else "")


def _html_table(table: Table, caption: str) -> str:
    sides = [' class="right"' if column.justify == "right" else "" for column in table.columns]
    headings = [
        f'<th scope="col"{side}>{escape(str(column.header))}</th>'
        for column, side in zip(table.columns, sides, strict=True)
    ]
    rows = [
        "".join(f"<td{side}>{escape(str(cell))}</td>" for cell, side in zip(cells, sides, strict=True))
        for cells in zip(*(column.cells for column in table.columns), strict=True)
    ]
    return (
        f'<p class="caption">{escape(caption)}</p>'  # outside: a long one does not scroll away with the table
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<thead><tr>{''.join(headings)}</tr></thead>"
        f"<tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table></div>"
    )
