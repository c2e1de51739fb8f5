"""The command `wdmoe-export`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from wdmoe.runtime.errors import WdmoeError

if TYPE_CHECKING:
    from wdmoe.export.bundle import ExportConfig

_INTERRUPTED = 130
_EPILOG = """\b
Examples:
  wdmoe-export --model smollm2-moe
  wdmoe-export --model ~/Mixtral-8x7B-v0.1 --experts-per-device 2 --out bundle
  wdmoe-export inspect bundle
"""


@click.group(invoke_without_command=True, epilog=_EPILOG)
@click.option(
    "--model", metavar="MODEL",
    help="Checkpoint folder (Hugging Face, safetensors), alias (smollm2-moe, mixtral, qwen2-moe, ...) or hub id.",
)  # fmt: skip
@click.option(
    "--experts-per-device", type=click.IntRange(min=1), metavar="N", show_default="2",
    help="Experts of each block on one device; the last device takes the remainder.",
)  # fmt: skip
@click.option(
    "--devices", type=click.IntRange(min=1), metavar="N",
    help="Number of devices instead; each takes the same number of experts, the last one the rest as well.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("bundle"), show_default=True,
    help="Folder of the bundle.",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(["auto", "fp32", "fp16"]), default="auto", show_default=True,
    help="Of the experts; auto: fp32 for a float32 checkpoint, else fp16.",
)  # fmt: skip
@click.option(
    "--clamp", is_flag=True,
    help="Turn weights that fp16 cannot hold into its largest value, and count them, instead of stopping.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace a bundle that is already there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def main(
    context: click.Context,
    model: str | None,
    experts_per_device: int | None,
    devices: int | None,
    out: Path,
    precision: Literal["auto", "fp32", "fp16"],
    clamp: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Cut a Mixture-of-Experts checkpoint into a folder for the base station and one for each device.

    Nothing is left half done under the final name: an interrupted export goes on where it stopped when the same
    command is given again.
    """
    if context.invoked_subcommand is not None:
        if model is not None:
            raise click.UsageError(f"--model does not go with the command {context.invoked_subcommand}")
        return
    if model is None:
        raise click.UsageError("Missing option '--model'.")
    if experts_per_device is not None and devices is not None:
        raise click.UsageError("Give either --experts-per-device or --devices, not both.")
    from wdmoe.export.bundle import ExportConfig

    with _plain_errors(f"interrupted; the same command goes on from {out}.partial"):
        _export(model, ExportConfig(out, experts_per_device, devices, precision, force, clamp), as_json)


def _export(model: str, config: ExportConfig, as_json: bool) -> None:
    from rich.console import Console

    from wdmoe.export.bundle import export_bundle, plan_export
    from wdmoe.export.inspection import read_bundle, summary
    from wdmoe.export.models import find_checkpoint

    folder, name = find_checkpoint(model, report=lambda text: click.echo(text, err=True))
    try:
        plan = plan_export(folder, name, config)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    with _progress("exporting", plan.total_bytes) as on_bytes:
        result = export_bundle(plan, config, on_bytes)
    bundle = read_bundle(result.out)
    if as_json:
        made = {"out": str(result.out), "already_there": result.already_there, "losses": asdict(result.losses)}
        click.echo(json.dumps(made | bundle.as_json()))
        return
    if result.losses.clamped or result.losses.to_zero:
        click.echo(
            f"fp16: {result.losses.clamped} weights were clamped, {result.losses.to_zero} are too small and became 0",
            err=True,
        )
    Console().print(summary(bundle))
    click.echo(f"{result.out} is already there, nothing to do" if result.already_there else f"wrote {result.out}")


@main.command(epilog="\b\nExample:\n  wdmoe-export inspect bundle/device-0")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def inspect(folder: Path, as_json: bool) -> None:
    """Print what a bundle, a folder bs or a folder device-K holds, and check every file of it."""
    from rich.console import Console

    from wdmoe.export.inspection import inspect_folder, summary, total_bytes

    with _plain_errors("interrupted"), _progress("checking", total_bytes(folder)) as on_bytes:
        found = inspect_folder(folder, on_bytes)
    if as_json:
        click.echo(json.dumps(found.as_json()))
        return
    Console().print(summary(found))
    click.echo(f"{folder}: every file is as the manifest says")


@contextmanager
def _plain_errors(interrupted: str) -> Iterator[None]:
    """Turn what can go wrong into one line and an exit code."""
    try:
        yield
    except WdmoeError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")) from error
    except ImportError as error:
        raise click.ClickException(f"{error}; install what an export needs: pip install 'wdmoe[export]'") from error
    except KeyboardInterrupt:
        click.echo(interrupted, err=True)
        raise SystemExit(_INTERRUPTED) from None


@contextmanager
def _progress(task: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    console = Console(stderr=True)
    columns.append(TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        number = bar.add_task(task, total=total_bytes)
        yield lambda size_bytes: bar.advance(number, size_bytes)
