"""Makes export/data/smollm2-moe.safetensors: how to carve SmolLM2-135M-Instruct into a Mixture-of-Experts model.

The recipe is that of `wdmoe-export carve --distil end-to-end` (export/training/); here it runs on text drawn by fixed
shares, and leaves an artefact in place of a checkpoint. Of 1,536 neurons of a block a token uses 1,024: those of a
shared expert, and of two of eight routed experts that overlap. The artefact holds, per block, which neurons those are,
the router, a scale per neuron, low-rank changes of the matrices and the norms. Reads the corpus only: the last twentieth
of each file is held out to judge by, and no evaluation row is read. With --state an interrupted training goes on where
it was saved last.

    python scripts/carving/make.py --data-dir DATA --state STATE
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import click
import torch

sys.path.append(str(Path(__file__).parents[2]))
from scripts.carving.corpus import corpus_windows
from wdmoe.export.carve import CarveShape
from wdmoe.export.carve_artefact import write_artefact
from wdmoe.export.carving import Progress
from wdmoe.export.checkpoint import open_checkpoint
from wdmoe.export.dense import dense_model
from wdmoe.export.gguf_checkpoint import GgufCheckpoint, write_checkpoint
from wdmoe.export.smollm2 import ARTEFACT, GGUF_SHA256, default_cache_dir, source_gguf
from wdmoe.export.training.end_to_end import artefact_of, matrix_dtype, started_student
from wdmoe.export.training.state import TrainingState
from wdmoe.export.training.steps import Step, TrainConfig, kept_tensors, perplexity, restore_student, train
from wdmoe.export.training.student import Student, StudentShape
from wdmoe.export.training.torch_dense import last_hidden, load_dense

SHAPE = StudentShape(CarveShape(shared=512, experts=8, expert_neurons=256, experts_per_token=2), rank=12)
DRAWN_WINDOWS = 8800  # of which the first are for the plan, the next for the fit, the rest to train on
CALIBRATION_WINDOWS = 32


@click.command()
@click.option("--data-dir", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=ARTEFACT, show_default=True)
@click.option("--cache-dir", type=click.Path(file_okay=False, path_type=Path), default=default_cache_dir)
@click.option("--state", type=click.Path(file_okay=False, path_type=Path), help="Folder that keeps the training.")
@click.option("--steps", type=click.IntRange(min=1), default=800, show_default=True, help="Training steps.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
def main(data_dir: Path, out: Path, cache_dir: Path, state: Path | None, steps: int, seed: int, threads: int) -> None:
    """Plan, train and write the artefact; prints held-out perplexities of dense and carved."""
    torch.set_num_threads(threads)
    with source_gguf(cache_dir, report) as gguf, tempfile.TemporaryDirectory() as folder:
        from tokenizers import Tokenizer

        source = GgufCheckpoint(gguf)
        write_checkpoint(Path(folder), source.config(), dict(source.tensors()), source)
        model = load_dense(dense_model(open_checkpoint(Path(folder))), "cpu", matrix_dtype("cpu"))
        tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    try:
        windows, held_out = corpus_windows(data_dir, tokenizer, DRAWN_WINDOWS, seed)
    except FileNotFoundError as error:
        raise click.BadParameter(f"no file {error.filename}", param_hint="--data-dir") from error
    to_plan, to_fit = windows[:CALIBRATION_WINDOWS], windows[CALIBRATION_WINDOWS : 2 * CALIBRATION_WINDOWS]

    def judge(name: str, student: Student) -> None:
        found = perplexity(lambda batch: student(batch)[0], model.head, held_out)
        report(f"held-out perplexity, {name}: {found:.2f}")

    with ExitStack() as stack:
        folder = str(state or stack.enter_context(tempfile.TemporaryDirectory()))
        kept = stack.enter_context(TrainingState(Path(folder), {"steps": steps, "seed": seed}, steps))
        if kept.step is None:
            dense = perplexity(lambda batch: last_hidden(model, batch), model.head, held_out)
            report(f"held-out perplexity, dense: {dense:.2f}")
            student = started_student(model, to_plan, to_fit, SHAPE, seed, kept.folder, on_progress)
            judge("carved", student)
            kept.write(0, kept_tensors(student))
        else:
            student = Student(model, None, SHAPE)
            restore_student(student, kept.load()[1])
        train(student, windows[2 * CALIBRATION_WINDOWS :], TrainConfig(steps), kept, on_step)
    judge("trained", student)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_artefact(out, artefact_of(student, SHAPE.carved), GGUF_SHA256)
    report(f"{out}: {out.stat().st_size:,} bytes")


def on_progress(progress: Progress) -> None:
    if progress.done == progress.total:
        report(f"{progress.phase}: done")


def on_step(step: Step) -> None:
    if step.number % 10 == 0:
        report(f"step {step.number}: KL {step.divergence:.3f}, near ties {step.ties:.4f}")


def report(line: str) -> None:
    click.echo(line, err=True)


if __name__ == "__main__":
    main()
