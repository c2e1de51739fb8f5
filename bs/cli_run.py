"""`wdmoe-bs run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wdmoe.bs.cli_common import (
    command_line,
    data_dir_option,
    json_option,
    model_options,
    parse_policies,
    print_table,
    progress_bars,
    reported_errors,
    say,
    station_options,
    throughput_options,
    write_json,
)
from wdmoe.bs.cli_virtual import open_any_station, read_virtual, virtual_options
from wdmoe.bs.config import StationConfig
from wdmoe.runtime.outputs import NewFile

if TYPE_CHECKING:
    from wdmoe.bs.experiment import Pair, PolicyRun


@click.command()
@station_options
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    required=True,
    help="What to answer: piqa, piqa-sample (bundled, 128 questions), arc_easy, arc_challenge, boolq, hellaswag, "
    "winogrande, openbookqa, siqa, copa, lambada, wikitext2; may be given several times.",
)
@data_dir_option
@click.option(
    "--policy",
    "policies",
    multiple=True,
    default=("exact", "wlr"),
    help="exact, wlr, round-robin, ser, top-cut, capacity or bottleneck, with options as in wlr:alpha=0.4,gamma=1.1 or "
    "bottleneck:budget=0.05,protect=false; or auto, the best that is known for the bundle. May be given several times. "
    "docs/policies.md lists rules and options.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first rows of each data set.")
@model_options
@throughput_options
@virtual_options
@json_option
@click.option(
    "--report",
    type=NewFile(),
    help="Write a page with tables, figures and the diagnosis; of a run that breaks off, with what is done.",
)
def run(
    datasets: tuple[str, ...],
    data_dir: Path | None,
    policies: tuple[str, ...],
    limit: int | None,
    json_path: Path | None,
    report: Path | None,
    clock: str,
    **station: Any,
) -> None:
    """Answer data sets under each policy: accuracy and latency side by side.

    With --json FILE each finished pair of data set and policy is kept as it is done; the same command given again
    goes on from there.

    Below the tables it tells when one of four known troubles shows, and what to do about it. --report FILE makes a page
    of it all.

    With --clock virtual answers are real and times are modelled: deterministic, and as fast as this machine computes.
    """
    with reported_errors():
        from wdmoe.bs.diagnosis import diagnose
        from wdmoe.bs.evaluation import load_task
        from wdmoe.bs.experiment import run_policies
        from wdmoe.bs.results import describe_run, describe_station, has_air, link_words, origin_of_times, reusable_runs
        from wdmoe.bs.tables import diagnosis_list, policy_tables, time_table

        virtual = read_virtual(clock, station)
        config, command = StationConfig(**station), command_line()
        chosen = {policy.describe(): policy for policy in parse_policies(policies, config.bundle)}
        if report is not None:
            _check_report(report, json_path)
        tasks = [load_task(name, data_dir) for name in dict.fromkeys(datasets)]
        counts = ", ".join(f"{task.dataset} {task.count(limit):,} rows" for task in tasks)
        say(f"{counts}; under {', '.join(chosen)}")
        kept = json_path if json_path is not None and str(json_path) != "-" else None
        with open_any_station(config, virtual) as open_:
            finished: dict[Pair, PolicyRun] = {}
            now = describe_station(open_, command)
            if kept is not None:
                earlier, lines = reusable_runs(kept, now, tasks, list(chosen), limit)
                finished.update((run.pair, run) for run in earlier)
                for line in lines:
                    say(line)

            def on_run(run: PolicyRun) -> None:
                finished[run.pair] = run
                if kept is not None:
                    write_json(kept, describe_run(open_, list(finished.values()), command))

            left = {
                name: sum(task.count(limit) for task in tasks if (task.dataset, name) not in finished)
                for name in chosen
            }
            try:
                with progress_bars(left) as on_question:
                    runs = run_policies(
                        open_, tasks, list(chosen.values()), limit, on_question, finished=dict(finished), on_run=on_run
                    )
            finally:
                if report is not None:
                    _write_report(report, now, finished, [(task.dataset, name) for task in tasks for name in chosen])
            result = describe_run(open_, runs, command)
        if json_path is not None and kept is None:
            write_json(json_path, result)
            return
        print_table(policy_tables(runs, link_words(result), len(result["devices"])))
        print_table(time_table(runs, virtual is not None))
        if findings := diagnose(runs, config.in_flight, has_air(result)):
            print_table(diagnosis_list(findings, origin_of_times(result)))


def _check_report(report: Path, json_path: Path | None) -> None:
    """Refuse what would fail at the end of a run.

    Raises:
        ValueError: the page would be written over.
        WdmoeError: matplotlib is not installed.
    """
    from wdmoe.bs.plots import require_matplotlib

    require_matplotlib("--report")
    if json_path is not None and report.absolute() == json_path.absolute():
        raise ValueError(f"--report and --json both name {report}; give one of them another name")


def _write_report(report: Path, head: dict[str, Any], finished: dict[Pair, PolicyRun], asked: Sequence[Pair]) -> None:
    """Write the page with what is done of what was asked for; nothing if nothing is."""
    from wdmoe.bs.diagnosis import diagnose
    from wdmoe.bs.report import write_report
    from wdmoe.bs.results import has_air

    runs = [finished[pair] for pair in asked if pair in finished]
    if runs:
        missing = [pair for pair in asked if pair not in finished]
        write_report(report, head, runs, diagnose(runs, head["in_flight"], has_air(head)), missing)
        say(f"wrote {report}")
