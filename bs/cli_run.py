"""`wdmoe-bs run`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wdmoe.bs.cli_common import (
    DEFAULTS,
    command_line,
    data_dir_option,
    json_option,
    model_options,
    parse_policies,
    print_table,
    reported_errors,
    say,
    station_options,
    write_json,
)
from wdmoe.bs.config import StationConfig

if TYPE_CHECKING:
    from wdmoe.bs.policies import Policy


@click.command()
@station_options
@click.option("--dataset", required=True, help="What to answer: piqa, or piqa-sample (bundled, 128 questions).")
@data_dir_option
@click.option(
    "--policy",
    "policies",
    multiple=True,
    default=("exact", "wlr"),
    help="exact, or wlr with options as in wlr:alpha=0.4,gamma=1.1; may be given several times.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first rows.")
@model_options
@click.option("--in-flight", type=click.IntRange(min=1), default=DEFAULTS.in_flight, help="Questions at a time.")
@json_option
def run(
    dataset: str,
    data_dir: Path | None,
    policies: tuple[str, ...],
    limit: int | None,
    json_path: Path | None,
    **station: Any,
) -> None:
    """Answer a data set under each policy: accuracy and latency side by side."""
    with reported_errors():
        from wdmoe.bs.evaluation import load_task
        from wdmoe.bs.experiment import describe_run, run_policies
        from wdmoe.bs.station import open_station
        from wdmoe.bs.tables import policy_table, time_table

        config = StationConfig(**station)
        chosen = parse_policies(policies)
        task = load_task(dataset, data_dir)
        with open_station(config, say) as open_, _progress(task.count(limit), chosen) as on_question:
            runs = run_policies(open_, task, chosen, limit, on_question)
            result = describe_run(open_, runs, command_line())
        if json_path is None or str(json_path) != "-":
            link = result["link"]
            print_table(policy_table(runs, f"{link['kind']} ({link['wire']})", len(result["devices"])))
            print_table(time_table(runs))
        if json_path is not None:
            write_json(json_path, result)


@contextmanager
def _progress(questions: int, policies: list[Policy]) -> Iterator[Callable[[str], None]]:
    """Show one bar per policy on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars = {p.describe(): progress.add_task(p.describe(), total=questions, start=False) for p in policies}

        def on_question(policy: str) -> None:
            progress.start_task(bars[policy])
            progress.advance(bars[policy])

        yield on_question
