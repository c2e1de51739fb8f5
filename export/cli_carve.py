"""The command `wdmoe-export carve`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wdmoe.export.cli_common import plain_errors, usage_errors

if TYPE_CHECKING:
    from wdmoe.export.carve_state import BlockReport
    from wdmoe.export.carving import Carved, CarvePlan, Distil

_EPILOG = """\b
Example:
  wdmoe-export carve --model ~/Llama-3.2-1B --calibration texts/ --out llama-moe
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
    "--shared", type=click.IntRange(min=1), metavar="N", show_default="half of a block's",
    help="Neurons of each block's shared expert, which works on every token.",
)  # fmt: skip
@click.option(
    "--distil", type=click.Choice(["none", "layer"]), default="layer",
    help="Fit each block's down projections to what the dense block gives, by least squares; none leaves them.",
)  # fmt: skip
@click.option("--tokens", type=click.IntRange(min=1), default=32768, help="Of calibration text; an eighth only judges.")
@click.option("--window", type=click.IntRange(min=2), default=512, help="Tokens of one calibration text.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the clustering.")
@click.option("--json", "as_json", is_flag=True, show_default=False, help="Print the result as JSON.")
def carve(
    model: Path,
    calibration: tuple[Path, ...],
    out: Path,
    experts: int,
    top_k: int,
    shared: int | None,
    distil: Distil,
    tokens: int,
    window: int,
    seed: int,
    as_json: bool,
) -> None:
    """Make a Mixture-of-Experts checkpoint (Qwen2-MoE) out of a dense one, without torch.

    The neurons that most tokens need become the shared expert, the others experts by who fires together. Runs the
    dense model over the calibration text block by block; an interrupted carving goes on after its last finished block
    when the same command is given again.
    """
    with plain_errors(f"interrupted; the same command goes on from {out}.partial"):
        from wdmoe.export.calibration_text import calibration_files
        from wdmoe.export.carving import CarveConfig, carve_checkpoint, plan_carving

        files = tuple(calibration_files(calibration))
        config = CarveConfig(out, files, experts, top_k, shared, distil, tokens, window, seed)
        with usage_errors():
            plan = plan_carving(model, config)
        _tell_of_width(plan)
        with _progress(plan) as (on_phase, on_block):
            made = carve_checkpoint(plan, on_phase, on_block)
    if as_json:
        click.echo(json.dumps(_report(plan, made)))
        return
    click.echo(f"{out} is already there, nothing to do" if made.already_there else f"wrote {out}")
    click.echo(_sentence(plan, made))


def _report(plan: CarvePlan, made: Carved) -> dict[str, Any]:
    return {
        "out": str(made.out),
        "already_there": made.already_there,
        "recipe": plan.recipe,
        "active_share": plan.active_share,
        "error_cut": _mean([block.error_cut for block in made.blocks]),
        "error": _mean([block.error for block in made.blocks]),
        "blocks": [asdict(block) for block in made.blocks],
    }


def _sentence(plan: CarvePlan, made: Carved) -> str:
    shape = plan.model.shape
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
