"""Makes export/data/smollm2-moe.safetensors: how to carve SmolLM2-135M-Instruct into a Mixture-of-Experts model.

Of 1,536 neurons of a block a token uses 1,024: those of a shared expert, and of two of eight routed experts that
overlap. The artefact holds, per block, which neurons those are, the router, a scale per neuron, low-rank changes of the
matrices and the norms. Planned from calibration text (`scripts/carving/planning.py`), fitted block by block
(`fitting.py`), then trained end to end (`distil.py`). Reads the corpus only: the last twentieth of each file is held out
to judge by, and no evaluation row is read. With --state an interrupted training goes on where it was saved last.

    python scripts/carving/make.py --data-dir DATA --state STATE
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click
import torch

sys.path.append(str(Path(__file__).parents[2]))
from scripts.carving.dense import Dense, corpus_windows, load_dense
from scripts.carving.distil import distil, last_hidden, perplexity
from scripts.carving.fitting import fit_down
from scripts.carving.planning import calibrate, plan_softly
from scripts.carving.student import Student
from wdmoe.export.carve import CarveShape
from wdmoe.export.carve_artefact import CarveArtefact, write_artefact
from wdmoe.export.gguf_checkpoint import GgufCheckpoint, write_checkpoint
from wdmoe.export.smollm2 import ARTEFACT, GGUF_SHA256, default_cache_dir, source_gguf

SHAPE = CarveShape(shared=512, experts=8, expert_neurons=256, experts_per_token=2)
DRAWN_WINDOWS = 8800  # of which the first are for the plan, the next for the fit, the rest to train on
CALIBRATION_WINDOWS = 32


@click.command()
@click.option("--data-dir", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=ARTEFACT, show_default=True)
@click.option("--cache-dir", type=click.Path(file_okay=False, path_type=Path), default=default_cache_dir)
@click.option("--state", type=click.Path(dir_okay=False, path_type=Path), help="Keeps the training every 50 steps.")
@click.option("--steps", type=click.IntRange(min=0), default=800, show_default=True, help="Training steps.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
def main(data_dir: Path, out: Path, cache_dir: Path, state: Path | None, steps: int, seed: int, threads: int) -> None:
    """Plan, train and write the artefact; prints held-out perplexities of dense and carved."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    with source_gguf(cache_dir, report) as gguf, tempfile.TemporaryDirectory() as folder:
        from tokenizers import Tokenizer

        source = GgufCheckpoint(gguf)
        write_checkpoint(Path(folder), source.config(), dict(source.tensors()), source)
        model = load_dense(Path(folder))
        tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    try:
        windows, held_out = corpus_windows(data_dir, tokenizer, DRAWN_WINDOWS, seed)
    except FileNotFoundError as error:
        raise click.BadParameter(f"no file {error.filename}", param_hint="--data-dir") from error
    student = carve(model, windows, seed)

    def judge(name: str) -> None:
        report(
            f"held-out perplexity, {name}: {perplexity(lambda batch: student(batch)[0], model.embedding, held_out):.2f}"
        )

    dense = perplexity(lambda batch: last_hidden(model, batch), model.embedding, held_out)
    report(f"held-out perplexity, dense: {dense:.2f}")
    judge("carved")
    distil(student, windows[2 * CALIBRATION_WINDOWS :], steps, state, report)
    judge("trained")
    out.parent.mkdir(parents=True, exist_ok=True)
    blocks = list(student.blocks)
    plans, changes = (tuple(getattr(own, part)() for own in blocks) for part in ("plan", "change"))
    write_artefact(out, CarveArtefact(SHAPE, plans, changes, student.norm.detach().numpy()), GGUF_SHA256)
    report(f"{out}: {out.stat().st_size:,} bytes")


def carve(model: Dense, windows: torch.Tensor, seed: int) -> Student:
    """Return the student before training: planned, and its down projections fitted."""
    plans = []
    for index, seen in enumerate(calibrate(model, windows[:CALIBRATION_WINDOWS])):
        generator = torch.Generator().manual_seed(seed + index)
        plans.append(plan_softly(seen, model.blocks[index].down, SHAPE, generator))
    report("planned")
    student = Student(model, plans, SHAPE)
    with torch.no_grad():
        fit_down(student, windows[CALIBRATION_WINDOWS : 2 * CALIBRATION_WINDOWS])
    report("fitted")
    return student


def report(line: str) -> None:
    click.echo(line, err=True)


if __name__ == "__main__":
    main()
