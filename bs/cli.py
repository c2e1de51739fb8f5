"""The command `wdmoe-bs`."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from wdmoe.bs.config import StationConfig
from wdmoe.runtime.errors import WdmoeError

if TYPE_CHECKING:
    from wdmoe.bs.policies import Policy

_DEFAULTS = StationConfig()
_EPILOG = """\b
Examples:
  wdmoe-bs run --dataset piqa --data-dir data
  wdmoe-bs run --dataset piqa-sample --policy exact --policy wlr:alpha=0.6
  wdmoe-bs devices
"""
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


@click.group(epilog=_EPILOG, context_settings={"show_default": True})
@click.version_option(package_name="wdmoe")
def main() -> None:
    """Run a Mixture-of-Experts model whose experts live on devices.

    The base station keeps attention, router and head, waits for the devices of its bundle, and decides which
    device works on which token.
    """


def station_options(function: AnyFunction) -> AnyFunction:
    """Add the options that every command with an open base station takes."""
    options = (
        click.option(
            "--bundle", type=click.Path(path_type=Path), default=_DEFAULTS.bundle, help="The folder `bs` of a bundle."
        ),
        click.option("--listen", default=_DEFAULTS.listen, help="Address that devices dial."),
        click.option("--insecure", is_flag=True, help="Allow an address that is reachable from the network."),
    )
    for option in reversed(options):
        function = option(function)
    return function


@main.command()
@station_options
@click.option("--dataset", required=True, help="What to answer: piqa, or piqa-sample (bundled, 128 questions).")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    envvar="WDMOE_DATA_DIR",
    show_envvar=True,
    help="Folder of local rows (DIR/piqa/valid.jsonl); without it the Hugging Face hub is asked.",
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    default=("exact", "wlr"),
    help="exact, or wlr with options as in wlr:alpha=0.4,gamma=1.1; may be given several times.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first rows.")
@click.option("--wire", type=click.Choice(["fp16", "fp32"]), default=_DEFAULTS.wire, help="Token rows on the wire.")
@click.option("--in-flight", type=click.IntRange(min=1), default=_DEFAULTS.in_flight, help="Questions at a time.")
@click.option("--threads", type=click.IntRange(min=1), default=_DEFAULTS.threads, help="Threads of the stages.")
@click.option("--wait", "wait_s", type=float, default=_DEFAULTS.wait_s, help="Seconds to wait for the devices.")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Keep the result; - prints it."
)
def run(
    dataset: str,
    data_dir: Path | None,
    policies: tuple[str, ...],
    limit: int | None,
    json_path: Path | None,
    **station: Any,
) -> None:
    """Answer a data set under each policy: accuracy and latency side by side."""
    with _reported_errors():
        from wdmoe.bs.evaluation import load_task
        from wdmoe.bs.experiment import describe_run, run_policies
        from wdmoe.bs.station import open_station
        from wdmoe.bs.tables import policy_table, time_table

        config = StationConfig(**station)
        chosen = _parse_policies(policies)
        task = load_task(dataset, data_dir)
        with open_station(config, _say) as open_, _progress(task.count(limit), chosen) as on_question:
            runs = run_policies(open_, task, chosen, limit, on_question)
            result = describe_run(open_, runs, shlex.join(["wdmoe-bs", *sys.argv[1:]]))
        if json_path is None or str(json_path) != "-":
            link = result["link"]
            _print(policy_table(runs, f"{link['kind']} ({link['wire']})", len(result["devices"])))
            _print(time_table(runs))
        if json_path is not None:
            _write_json(json_path, result)


@main.command()
@station_options
@click.option("--wait", "wait_s", type=float, default=5.0, help="Seconds to wait for devices.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def devices(wait_s: float, as_json: bool, **station: Any) -> None:
    """Show who is connected, with what, and how fast. Exit code 1 if experts are missing."""
    with _reported_errors():
        from wdmoe.bs.experiment import describe_device
        from wdmoe.bs.station import open_hub
        from wdmoe.bs.tables import device_table
        from wdmoe.runtime.errors import DevicesMissing

        with open_hub(StationConfig(wait_s=wait_s, **station), _say) as (_, _, hub):
            try:
                hub.wait_for_devices(wait_s)
            except DevicesMissing as error:
                _say(str(error))
            known, missing = [describe_device(hub, name) for name in sorted(hub.devices)], hub.missing_devices()
        if as_json:
            click.echo(json.dumps({"devices": known, "missing": missing}, indent=1))
        else:
            _print(device_table(known, missing))
    if missing:
        raise SystemExit(1)


def _parse_policies(texts: tuple[str, ...]) -> list[Policy]:
    from wdmoe.bs.policies import parse_policy

    try:
        policies = [parse_policy(text) for text in texts]
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--policy") from error
    # Exact is the control: it goes first, so that the others can be compared with it.
    return sorted(policies, key=lambda policy: policy.describe() != "exact")


@contextmanager
def _reported_errors() -> Iterator[None]:
    """Turn what a user can mend into a message and exit code 1 (2 for bad options), and Ctrl-C into 130."""
    if threading.current_thread() is threading.main_thread():
        # So that devices are told, and look for the next base station at once.
        signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    except WdmoeError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        _say("interrupted; the devices were told")
        raise SystemExit(130) from None


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


def _print(table: Any) -> None:
    from rich.console import Console

    Console().print(table, "")


def _write_json(path: Path, result: dict[str, Any]) -> None:
    text = json.dumps(result, indent=1) + "\n"
    if str(path) == "-":
        click.echo(text, nl=False)
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def _say(text: str) -> None:
    click.echo(text, err=True)
