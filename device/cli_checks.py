"""`wdmoe-device build` and `check`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from wdmoe.device.cli_tools import reported_errors
from wdmoe.device.config import DeviceConfig
from wdmoe.runtime.engines import ENGINES

_DEFAULTS = DeviceConfig()
_bundle_option = click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    default=_DEFAULTS.bundle,
    show_default=True,
    help="A folder device-K, or a whole bundle.",
)
_engine_option = click.option(
    "--engine", type=click.Choice(["auto", *ENGINES]), default="auto", show_default=True, help="auto means all."
)


@click.command()
@_bundle_option
@_engine_option
@click.option("--again", is_flag=True, help="Remove what was built, and what failed, and start over.")
def build(bundle: Path, engine: str, again: bool) -> None:
    """Build the engines of a slice on this device, as the first start would.

    What is there already is kept; after an interruption the same command goes on. Plans are kept in the slice's own folder
    `engines/`, which another device of exactly the same kind and software can use.
    """
    with reported_errors():
        from wdmoe.device import checking
        from wdmoe.device.loading import engine_names, say_to_stderr
        from wdmoe.device.main import device_folders

        for folder in device_folders(bundle):
            ready = checking.build(folder, engine_names(engine), again, say_to_stderr)
            if engine != "auto" and not ready:
                raise click.ClickException(f"{folder}: engine {engine} has nothing built; see above")
            click.echo(f"{folder}: {'ready: ' + ', '.join(ready) if ready else 'no engine here needs building'}")


@click.command()
@_bundle_option
@_engine_option
@click.option(
    "--threads", type=click.IntRange(min=1), default=_DEFAULTS.threads, show_default=True, help="Of an engine."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(bundle: Path, engine: str, threads: int, as_json: bool) -> None:
    """Run the golden inputs of a slice on every engine that is here; serving takes the first that is right.

    An engine that failed before is tried again. Exit code 1 if one gives wrong answers or none gives right ones.
    """
    with reported_errors():
        from wdmoe.device import checking
        from wdmoe.device.loading import engine_names, say_to_stderr
        from wdmoe.device.main import device_folders

        outcomes = [
            outcome
            for folder in device_folders(bundle)
            for outcome in checking.check(folder, engine_names(engine), threads, say_to_stderr)
        ]
        if as_json:
            click.echo(json.dumps([outcome.as_json() for outcome in outcomes], indent=1))
        else:
            from rich.console import Console

            Console().print(checking.check_table(outcomes))
        code = checking.exit_code(outcomes)
    raise SystemExit(code)
