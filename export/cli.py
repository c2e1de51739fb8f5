"""The command `wdmoe-export`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from wdmoe.export.cli_carve import carve
from wdmoe.export.cli_common import plain_errors, progress_lines, refuse_options_before, usage_errors
from wdmoe.runtime.outputs import NewFile, written_whole

if TYPE_CHECKING:
    from wdmoe.export.bundle import ExportConfig, ExportPlan
    from wdmoe.export.placement import Placement, PlacementOptions
    from wdmoe.export.planning import DryRun
    from wdmoe.runtime.manifest import Precision, StagePrecision

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SPEED_TOKENS = 16
_EPILOG = """\b
Examples:
  wdmoe-export --model smollm2-moe
  wdmoe-export --model ~/Mixtral-8x7B-v0.1 --experts-per-device 2 --out bundle
  wdmoe-export --model mixtral --experts-per-device 2 --dry-run --device-memory 32GB
  wdmoe-export calibrate bundle --text book.txt
  wdmoe-export inspect bundle
  wdmoe-export carve --model ~/Llama-3.2-1B --calibration texts/ --out llama-moe
"""


def read_size(text: str) -> int:
    """Read a size such as 16GB, in bytes."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS or not float(found[1]):
        raise click.BadParameter(f"{text!r} is not a size; expected one like 16GB or 512MiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def read_memory(text: str) -> int:
    """Read a size, or the name of a device whose memory is known, in bytes."""
    from wdmoe.profiles.modelled import hardware_names, memory_bytes

    if text in hardware_names():
        return memory_bytes(text)
    try:
        return read_size(text)
    except click.BadParameter as error:
        raise click.BadParameter(f"{error.message}, or a device: {', '.join(hardware_names())}") from None


def read_memories(text: str) -> tuple[int, ...]:
    """Read what `read_memory` reads, for all devices or separated by commas for each."""
    return tuple(read_memory(part.strip()) for part in text.split(","))


def read_speeds(text: str) -> tuple[float, ...]:
    """Read the speeds of devices: numbers, or names of modelled ones, which are as many calls a second as they make."""
    from wdmoe.profiles.modelled import ExpertShape, hardware_names, modelled_profile

    parts = [part.strip() for part in text.split(",")]
    if set(parts) <= set(hardware_names()):
        # In fp16, a few tokens a call: bound by the weights, so that ratios hardly depend on shape and precision.
        shape = ExpertShape(4096, 14336)
        return tuple(1e3 / modelled_profile(name, "fp16", shape).call_ms(_SPEED_TOKENS) for name in parts)
    try:
        return tuple(map(float, parts))
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is neither a list of numbers like 1,1,0.5 nor one of devices: {', '.join(hardware_names())}"
        ) from None


def placement_options(otherwise: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options that say which device holds what; `otherwise` is how many experts if nothing is said."""
    options = [
        click.option(
            "--experts-per-device", type=click.IntRange(min=1), metavar="N", show_default=otherwise,
            help="Experts of each block on one device; the last device takes the remainder.",
        ),
        click.option(
            "--devices", type=click.IntRange(min=1), metavar="N",
            help="Number of devices instead; each takes the same number of experts, the last one the rest as well.",
        ),
        click.option(
            "--placement", metavar="FILE|balanced",
            help="A placement as JSON or TOML; or balanced: level expected load over speed.",
        ),
        click.option(
            "--counts", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="FILE",
            help="How often each expert is chosen, for balanced and for --replicas: what calibrate --counts wrote, "
            "a trace of wdmoe-bs trace (.npz), or JSON [block][expert].",
        ),
        click.option(
            "--speeds", type=read_speeds, metavar="A,B,...",
            help="Speed of each device, in any unit; or names of modelled devices, such as orin-nx-16gb.",
        ),
        click.option(
            "--replicas", type=click.IntRange(min=0), default=0, metavar="N", show_default=True,
            help="Give the N most used experts of each block a second device, where --device-memory allows.",
        ),
        click.option(
            "--device-memory", type=read_memories, metavar="SIZE|DEVICE[,...]",
            help="Memory of a device, such as 16GB or orin-nx-16gb; one for all, or one each.",
        ),
    ]  # fmt: skip

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.group(invoke_without_command=True, epilog=_EPILOG)
@click.option(
    "--model", metavar="MODEL",
    help="Checkpoint folder (Hugging Face, safetensors), alias (smollm2-moe, mixtral, qwen2-moe, ...) or hub id.",
)  # fmt: skip
@placement_options(otherwise="2")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("bundle"), show_default=True,
    help="Folder of the bundle.",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(["auto", "fp32", "fp16", "int8", "int4"]), default="auto", show_default=True,
    help="Of the experts; auto: fp32 for a float32 checkpoint, else fp16. int8, int4: weights only.",
)  # fmt: skip
@click.option(
    "--stages", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True,
    help="Of the base station's weights; fp16 halves their files, computing stays float32.",
)  # fmt: skip
@click.option(
    "--clamp", is_flag=True,
    help="Turn weights that fp16 cannot hold into its largest value, and count them, instead of stopping.",
)  # fmt: skip
@click.option(
    "--dry-run", is_flag=True, help="Print the plan and its sizes; needs no weights, only the model's config.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace a bundle that is already there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def main(
    context: click.Context,
    /,
    model: str | None,
    out: Path,
    precision: Precision | Literal["auto"],
    stages: StagePrecision,
    clamp: bool,
    dry_run: bool,
    force: bool,
    as_json: bool,
    device_memory: tuple[int, ...] | None,
    **placing: Any,
) -> None:
    """Cut a Mixture-of-Experts checkpoint into a folder for the base station and one for each device.

    Nothing is left half done under the final name: an interrupted export goes on where it stopped when the same
    command is given again.
    """
    if context.invoked_subcommand is not None:
        refuse_options_before(context)
        return
    if model is None:
        raise click.UsageError("Missing option '--model'.")
    options = _placement_options(**placing)
    from wdmoe.export.bundle import ExportConfig

    config = ExportConfig(
        out, precision=precision, stages=stages, force=force, clamp=clamp, placement=options,
        device_memory_bytes=device_memory or (),
    )  # fmt: skip
    with plain_errors(f"interrupted; the same command goes on from {out}.partial"):
        if dry_run:
            _show_plan(_dry_run(model, config, options), as_json)
        else:
            _export(model, config, options, as_json)


def _placement_options(
    experts_per_device: int | None,
    devices: int | None,
    placement: str | None,
    counts: Path | None,
    speeds: tuple[float, ...] | None,
    replicas: int,
) -> PlacementOptions:
    from wdmoe.export.placement import PlacementOptions

    if experts_per_device is not None and devices is not None:
        raise click.UsageError("Give either --experts-per-device or --devices, not both.")
    file = Path(placement) if placement is not None and placement != "balanced" else None
    try:
        return PlacementOptions(
            experts_per_device, devices, file, placement == "balanced", counts, speeds or (), replicas
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _tell_replicas_left_out(placement: Placement, options: PlacementOptions) -> None:
    from wdmoe.export.balance import replicas_left_out

    if missing := replicas_left_out(placement, options.replicas):
        click.echo(
            f"{missing} of the replicas are left out: no device has room, or the block would be slower with them",
            err=True,
        )


def _dry_run(model: str, config: ExportConfig, options: PlacementOptions) -> DryRun:
    from wdmoe.export.balance import read_counts
    from wdmoe.export.planning import dry_run
    from wdmoe.export.published import layout_from_config

    layout, natural, origin = layout_from_config(model, report=lambda text: click.echo(text, err=True))
    precision = natural if config.precision == "auto" else config.precision
    spec = layout.spec
    with usage_errors():
        placement = config.place(spec, precision)
    _tell_replicas_left_out(placement, options)
    counts = read_counts(options.counts, spec.n_blocks, spec.n_experts)
    memory = config.device_memory_bytes
    with usage_errors():
        return dry_run(layout, origin, precision, placement, counts, options.speeds, memory, config.stages)


def _show_plan_of_export(plan: ExportPlan, config: ExportConfig, options: PlacementOptions) -> None:
    """Show the plan on stderr where the user has a say in it."""
    from rich.console import Console

    from wdmoe.export.balance import read_counts
    from wdmoe.export.planning import dry_run, plan_table

    said = options.file or options.balance or options.replicas or config.device_memory_bytes
    if said:
        spec = plan.layout.spec
        counts = read_counts(options.counts, spec.n_blocks, spec.n_experts)
        origin, memory = str(plan.checkpoint.folder), config.device_memory_bytes
        with usage_errors():
            shown = dry_run(
                plan.layout, origin, plan.precision, plan.placement, counts, options.speeds, memory, plan.stages
            )
        Console(stderr=True).print(plan_table(shown))


def _show_plan(plan: DryRun, as_json: bool) -> None:
    from rich.console import Console

    from wdmoe.export.planning import plan_table

    if as_json:
        click.echo(json.dumps(plan.as_json()))
    else:
        Console().print(plan_table(plan))


def _export(model: str, config: ExportConfig, options: PlacementOptions, as_json: bool) -> None:
    from rich.console import Console

    from wdmoe.export.bundle import export_bundle, plan_export
    from wdmoe.export.inspection import read_bundle, summary
    from wdmoe.export.models import find_checkpoint

    folder, name = find_checkpoint(model, report=lambda text: click.echo(text, err=True))
    with usage_errors():
        plan = plan_export(folder, name, config)
    _tell_replicas_left_out(plan.placement, options)
    _show_plan_of_export(plan, config, options)
    with _progress("exporting", plan.total_bytes) as on_bytes:
        result = export_bundle(plan, config, on_bytes)
    bundle = read_bundle(result.out)
    if as_json:
        made = {"out": str(result.out), "already_there": result.already_there}
        click.echo(json.dumps(made | bundle.as_json()))
        return
    Console().print(summary(bundle))
    click.echo(f"{result.out} is already there, nothing to do" if result.already_there else f"wrote {result.out}")


@main.command(epilog="\b\nExample:\n  wdmoe-export place bundle --devices 2 --out bundle-of-two")
@click.argument("bundle", metavar="BUNDLE", type=click.Path(path_type=Path, exists=True, file_okay=False))
@placement_options(otherwise="as BUNDLE has them")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the new bundle."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def place(bundle: Path, out: Path, as_json: bool, device_memory: tuple[int, ...] | None, **placing: Any) -> None:
    """Make a bundle with another placement out of one that is there, by hard links: no second export.

    The new bundle has the same id: its devices and base station work with those of the old one. Without a placement,
    --replicas adds to the one that BUNDLE has; without --counts, those of a calibration by text count.
    """
    from rich.console import Console

    options = _placement_options(**placing)
    with plain_errors("interrupted"):
        from wdmoe.export.inspection import summary
        from wdmoe.export.replacing import place_again
        from wdmoe.export.sizing import limit_of
        from wdmoe.runtime.manifest import BsManifest, read_manifest

        manifest = read_manifest(bundle / "bs", BsManifest)
        spec = manifest.model
        limit = limit_of(spec, manifest.precision, device_memory or ())
        measured = manifest.calibration.counts
        with usage_errors():
            placement = options.place(spec.n_blocks, spec.n_experts, limit, manifest.placement, measured)
        _tell_replicas_left_out(placement, options)
        made = place_again(bundle, out, placement, options.balance_of(placement, measured, manifest.balance))
    if as_json:
        click.echo(json.dumps({"out": str(out), **made.as_json()}))
        return
    Console().print(summary(made))
    click.echo(f"wrote {out}")


@main.command(epilog="\b\nExample:\n  wdmoe-export inspect bundle/device-0")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def inspect(folder: Path, as_json: bool) -> None:
    """Print what a bundle, a folder bs or a folder device-K holds, and check every file of it."""
    from rich.console import Console

    from wdmoe.export.inspection import inspect_folder, summary, total_bytes

    with plain_errors("interrupted"), _progress("checking", total_bytes(folder)) as on_bytes:
        found = inspect_folder(folder, on_bytes)
    if as_json:
        click.echo(json.dumps(found.as_json()))
        return
    Console().print(summary(found))
    click.echo(f"{folder}: every file is as the manifest says")


@main.command(epilog="\b\nExample:\n  wdmoe-export calibrate bundle --text book.txt --counts counts.json")
@click.argument("bundle", metavar="BUNDLE", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--text", "texts", multiple=True, required=True, metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Text like what the model will be used for; may be given several times.",
)  # fmt: skip
@click.option("--tokens", type=click.IntRange(min=2), default=8192, show_default=True, help="Of all texts together.")
@click.option(
    "--counts", type=NewFile(), metavar="FILE",
    help="Write how often each expert was chosen there, for --counts of a placement.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def calibrate(bundle: Path, texts: tuple[Path, ...], tokens: int, counts: Path | None, as_json: bool) -> None:
    """Measure how large each expert's answers are on a text, and how often it is chosen.

    Both are written into the manifest of the base station; the bundle keeps its id, and its devices need nothing new.
    Runs block by block in this process, with ONNX Runtime: memory holds one expert, one stage and a row for each token.
    """
    from rich.console import Console

    with plain_errors("interrupted; the manifest is as it was"):
        from wdmoe.export.calibration import calibrate_bundle, calibration_json, calibration_table
        from wdmoe.runtime.manifest import BsManifest, read_manifest

        n_blocks = read_manifest(bundle / "bs", BsManifest).model.n_blocks
        with _progress("calibrating", n_blocks, "blocks") as on_blocks:
            made = calibrate_bundle(
                bundle, texts, tokens, lambda text: click.echo(text, err=True), lambda: on_blocks(1)
            )
        result = json.dumps(calibration_json(read_manifest(bundle / "bs", BsManifest)))
        if counts is not None:
            with written_whole(counts) as partial:
                partial.write_text(result + "\n", encoding="utf-8")
    if as_json:
        click.echo(result)
        return
    Console().print(calibration_table(made))
    click.echo(f"wrote the norms and counts into {bundle / 'bs' / 'manifest.json'}")


@main.command(epilog="\b\nExample:\n  wdmoe-export verify bundle --model smollm2-moe")
@click.argument("bundle", metavar="BUNDLE", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--model", metavar="MODEL", required=True, help="The checkpoint that BUNDLE was made of, as for an export."
)
@click.option("--experts", type=click.IntRange(min=1), default=16, show_default=True, help="Experts to compare singly.")
@click.option("--tokens", type=click.IntRange(min=1, max=64), default=48, show_default=True, help="Of the text.")
@click.option(
    "--max-rms", type=click.FloatRange(min=0), help="Bound of an expert's RMS error.  [default: by precision]"
)
@click.option("--max-kl", type=click.FloatRange(min=0), help="Bound of the mean KL, nats.  [default: by precision]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(
    bundle: Path, model: str, experts: int, tokens: int, max_rms: float | None, max_kl: float | None, as_json: bool
) -> None:
    """Compare a bundle with its checkpoint: weights of the base station, some experts, a text through the whole model.

    The text goes twice through the bundle's own stages, with its experts and with the checkpoint's: what it shows is
    the experts. Of the stages the weights are compared here; their graphs are held against transformers by
    scripts/bench/parity.py. Runs in this process, with ONNX Runtime and numpy. Exit code 1 if an error is beyond its bound.
    """
    from rich.console import Console

    with plain_errors("interrupted"):
        from wdmoe.export.inspection import read_bundle
        from wdmoe.export.models import find_checkpoint
        from wdmoe.export.verifying import BOUNDS, Bound, verification_table, verify_bundle

        def say(text: str) -> None:
            click.echo(text, err=True)

        usual = BOUNDS[read_bundle(bundle).any_manifest.precision]
        bound = Bound(usual.rms if max_rms is None else max_rms, usual.divergence if max_kl is None else max_kl)
        folder, _ = find_checkpoint(model, report=say)
        found = verify_bundle(bundle, folder, experts=experts, tokens=tokens, bound=bound, say=say)
    if as_json:
        click.echo(json.dumps(found.as_json()))
    else:
        Console().print(verification_table(found))
    if not found.passed:
        raise click.ClickException(f"{bundle}: an error is beyond its bound")


@contextmanager
def _progress(task: str, total: int, unit: Literal["bytes", "blocks"] = "bytes") -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr, if that is a terminal; else a line now and then."""
    from rich import progress as bars
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield progress_lines(task, total, unit, lambda text: click.echo(text, err=True))
        return
    of_bytes = [bars.DownloadColumn(), bars.TransferSpeedColumn()]
    shown: list[Any] = of_bytes if unit == "bytes" else [bars.MofNCompleteColumn()]
    columns = [bars.TextColumn("{task.description}"), bars.BarColumn(), *shown, bars.TimeRemainingColumn()]
    with bars.Progress(*columns, console=console, transient=True) as bar:
        number = bar.add_task(task, total=total)
        yield lambda done: bar.advance(number, done)


main.add_command(carve)
