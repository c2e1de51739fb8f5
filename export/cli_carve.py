"""The command `wdmoe-export carve`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from wdmoe.export.cli_common import plain_errors, usage_errors

if TYPE_CHECKING:
    from wdmoe.export.carve_state import BlockReport
    from wdmoe.export.carving import Carved, CarvePlan, Distil, Progress, TorchDevice

# Options that say nothing unless the carved model is trained.
_OF_TRAINING = ("expert_neurons", "steps", "batch", "rank", "rate", "torch_device", "compiled", "recompute")
_LINE_EVERY_S = 30.0  # where stderr is no terminal

_EPILOG = """\b
Example:
  wdmoe-export carve --model ~/Llama-3.2-1B --calibration texts/ --out llama-moe
  wdmoe-export carve --model ~/Llama-3.2-1B --calibration texts/ --distil end-to-end --out llama-moe
  wdmoe-export --model llama-moe --devices 4
"""


@click.command(epilog=_EPILOG, context_settings={"show_default": True})
@click.option(
    "--model", metavar="DENSE", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True,
    help="Folder of the dense checkpoint (llama, mistral or qwen2; safetensors, tokenizer.json).",
)  # fmt: skip
@click.option(
    "--calibration", metavar="FILE", type=click.Path(path_type=Path, exists=True), multiple=True, required=True,
    help="Text in UTF-8 like what the model will read; a folder stands for its *.txt. May be given several times.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the new checkpoint."
)
@click.option("--experts", type=click.IntRange(min=1), default=8, help="Routed experts of each block.")
@click.option("--top-k", type=click.IntRange(min=1), default=2, help="Routed experts that work on a token.")
@click.option(
    "--shared", type=click.IntRange(min=1), metavar="N", show_default="half of a block's; end-to-end: a third",
    help="Neurons of each block's shared expert, which works on every token.",
)  # fmt: skip
@click.option(
    "--distil", type=click.Choice(["none", "layer", "end-to-end"]), default="layer",
    help="Fit each block's down projections to what the dense block gives, by least squares; none leaves them; "
    "end-to-end trains the whole carved model with torch, towards the dense model and the text.",
)  # fmt: skip
@click.option(
    "--tokens", type=click.IntRange(min=1), default=None, show_default="32768; end-to-end: what its steps read",
    help="Of calibration text; an eighth, or 32 windows, only judges.",
)  # fmt: skip
@click.option("--window", type=click.IntRange(min=2), default=512, help="Tokens of one calibration text.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the clustering, and of what is trained.")
@click.option(
    "--expert-neurons", type=click.IntRange(min=1), metavar="N", default=None, show_default="so that 2/3 work on a token",
    help="end-to-end: neurons of each routed expert. Experts may overlap.",
)  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), default=800, help="end-to-end: training steps.")
@click.option("--batch", type=click.IntRange(min=1), default=4, help="end-to-end: windows of a step.")
@click.option("--rank", type=click.IntRange(min=1), default=12, help="end-to-end: of what is changed in the matrices.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), default=1.5e-3, help="end-to-end: learning rate.")
@click.option(
    "--torch-device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto",
    help="end-to-end: where torch computes; auto takes a GPU where there is one.",
)  # fmt: skip
@click.option(
    "--compile/--no-compile", "compiled", default=True,
    help="end-to-end: by torch.compile, which needs a C++ compiler.",
)  # fmt: skip
@click.option(
    "--recompute/--no-recompute", default=True,
    help="end-to-end: keep only each block's input for the backward pass; without it faster, in a multiple of memory.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, show_default=False, help="Print the result as JSON.")
@click.pass_context
def carve(
    context: click.Context,
    model: Path,
    calibration: tuple[Path, ...],
    out: Path,
    experts: int,
    top_k: int,
    shared: int | None,
    distil: Distil,
    tokens: int | None,
    window: int,
    seed: int,
    expert_neurons: int | None,
    steps: int,
    batch: int,
    rank: int,
    rate: float,
    torch_device: TorchDevice,
    compiled: bool,
    recompute: bool,
    as_json: bool,
) -> None:
    """Make a Mixture-of-Experts checkpoint (Qwen2-MoE) out of a dense one.

    The neurons that most tokens need become the shared expert, the others experts by who fires together. Runs the
    dense model over the calibration text block by block, without torch. With --distil end-to-end, which needs torch,
    experts overlap and are then trained. An interrupted carving goes on, after its last finished block or where its
    training was saved last, when the same command is given again.
    """
    if distil != "end-to-end":
        for name in _OF_TRAINING:
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                option = "--" + ("compile" if name == "compiled" else name.replace("_", "-"))
                raise click.UsageError(f"{option} is of --distil end-to-end; {distil} has no use for it")
    elif find_spec("torch") is None:
        raise click.ClickException(
            "--distil end-to-end trains with torch, which is not installed: pip install 'wdmoe[export,distil]' "
            "(without a GPU: pip install torch --index-url https://download.pytorch.org/whl/cpu); "
            "--distil layer does without"
        )
    with plain_errors(f"interrupted; the same command goes on from {out}.partial"):
        from wdmoe.export.calibration_text import calibration_files
        from wdmoe.export.carving import CarveConfig, carve_checkpoint, plan_carving

        files = tuple(calibration_files(calibration))
        config = CarveConfig(
            out, files, experts, top_k, shared, distil, tokens, window, seed, expert_neurons, steps, batch, rank, rate,
            torch_device, compiled, recompute,
        )  # fmt: skip
        with usage_errors():
            plan = plan_carving(model, config)
        _tell_of_width(plan)
        if config.end_to_end:
            with _training_progress() as on_progress:
                made = carve_checkpoint(plan, on_progress=on_progress)
        else:
            with _progress(plan) as (on_phase, on_block):
                made = carve_checkpoint(plan, on_phase, on_block)
    if as_json:
        click.echo(json.dumps(_report(plan, made)))
        return
    click.echo(f"{out} is already there, nothing to do" if made.already_there else f"wrote {out}")
    click.echo(_sentence(plan, made))


def _report(plan: CarvePlan, made: Carved) -> dict[str, Any]:
    common = {
        "out": str(made.out),
        "already_there": made.already_there,
        "recipe": plan.recipe,
        "active_share": plan.active_share,
    }
    if plan.config.end_to_end:
        return common | made.figures
    return {
        **common,
        "error_cut": _mean([block.error_cut for block in made.blocks]),
        "error": _mean([block.error for block in made.blocks]),
        "blocks": [asdict(block) for block in made.blocks],
    }


def _sentence(plan: CarvePlan, made: Carved) -> str:
    shape = plan.model.shape
    if plan.config.end_to_end:
        dense, planned, trained = (made.figures[f"{name}_perplexity"] for name in ("dense", "planned", "trained"))
        worse = "" if trained < planned else ". Training made it worse: more --steps or a lower --rate may help"
        return (
            f"{plan.n_blocks} blocks: {shape.shared} shared neurons, {shape.experts} overlapping experts of "
            f"{shape.expert_neurons}, {shape.experts_per_token} a token: {plan.active_share:.0%} of the neurons at work. "
            f"Perplexity on held-out text {trained:.2f}, {planned:.2f} before training, {dense:.2f} of the dense model"
            f"{worse}"
        )
    cut, error = (_mean([getattr(block, name) for block in made.blocks]) for name in ("error_cut", "error"))
    return (
        f"{len(made.blocks)} blocks: {shape.shared} shared neurons, {shape.experts} experts of {shape.expert_neurons}, "
        f"{shape.experts_per_token} a token: {plan.active_share:.0%} of the neurons at work. Error of a block's output "
        f"on held-out text {cut:.3f} as cut, {error:.3f} as written"
    )


def _tell_of_width(plan: CarvePlan) -> None:
    from wdmoe.export.dense import WIDTH_STEP

    if plan.model.shape.expert_neurons % WIDTH_STEP:
        click.echo(
            f"experts of {plan.model.shape.expert_neurons} neurons: wdmoe runs them, and transformers with "
            f"experts_implementation='eager'; its usual kernel wants a multiple of {WIDTH_STEP}",
            err=True,
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@contextmanager
def _progress(
    plan: CarvePlan,
) -> Iterator[tuple[Callable[[int, str], None], Callable[[int, BlockReport], None]]]:
    """Show a bar on stderr, if that is a terminal, and a line for each finished block."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from wdmoe.export.carving import PHASES

    console = Console(stderr=True, highlight=False)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    n_blocks = plan.n_blocks
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("carving", total=n_blocks * len(PHASES))

        def on_phase(block: int, phase: str) -> None:
            done = block * len(PHASES) + PHASES.index(phase)
            bar.update(task, completed=done, description=f"block {block + 1} of {n_blocks}: {phase}")

        def on_block(block: int, report: BlockReport) -> None:
            bar.update(task, completed=(block + 1) * len(PHASES))
            click.echo(
                f"block {block + 1} of {n_blocks}: error on held-out text {report.error_cut:.3f} as cut, "
                f"{report.error:.3f} as written",
                err=True,
            )

        yield on_phase, on_block


@contextmanager
def _training_progress() -> Iterator[Callable[[Progress], None]]:
    """Show a bar with what is measured and the time left; without a terminal, a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True, highlight=False)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    phase, started_s, told_s, first = "", 0.0, 0.0, 0
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("")

        def on_progress(now: Progress) -> None:
            nonlocal phase, started_s, told_s, first
            if now.phase != phase:
                phase, first, started_s, told_s = now.phase, now.done, time.monotonic(), time.monotonic()
                bar.reset(task, total=now.total, completed=now.done, description=phase)
            bar.update(task, completed=now.done, description=f"{phase} {now.text}".strip())
            last = now.done == now.total
            if last or (not console.is_terminal and time.monotonic() - told_s >= _LINE_EVERY_S):
                told_s = time.monotonic()
                spent_s = told_s - started_s
                left_s = spent_s / max(1, now.done - first) * (now.total - now.done)
                time_left = f", about {_duration(left_s)} left" if now.done > first and not last else ""
                text = f": {now.text}" if now.text else ""
                bar.console.print(
                    f"{phase} {now.done} of {now.total}{text}, {_duration(spent_s)}{time_left}", soft_wrap=True
                )

        yield on_progress


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )
