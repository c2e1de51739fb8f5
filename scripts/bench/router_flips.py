"""Why a rounding on the wire moves an answer: PIQA rows with float32 and float16 rows on the wire, router by router.

    python scripts/bench/router_flips.py --data-dir DIR --row 306 --row 314 --json -

For each row: how far its log-likelihoods move, in how many (token, block) the k experts are others, and the margin of the
router there, before anything else has changed, beside what float16 moved the router's logits by. Devices are in this
process, their engines and the frames between are the real ones.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
from inprocess import open_system

from scripts.bench._environment import environment, progress, write_json
from wdmoe.bs.evaluation import evaluate, load_task
from wdmoe.bs.policies import Exact
from wdmoe.bs.questions import Answer, Question
from wdmoe.bs.routing import Floats, route
from wdmoe.bs.scoring import DistributedScorer
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.export.models import SMALL_MODEL, find_checkpoint

Logits = list[Floats]  # of each block, [tokens, n_experts]


class Collector:
    """A `Scorer` that only looks at what it is asked."""

    def __init__(self) -> None:
        self.questions: list[Question] = []

    def score(self, questions: Sequence[Question], on_answer: object = None) -> list[Answer]:
        """Keep the questions."""
        self.questions += questions
        return [Answer((0.0,) * len(q.choices), (False,) * len(q.choices)) for q in questions]


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--row", "rows", type=click.IntRange(min=0), multiple=True, required=True, help="Of PIQA.")
@click.option("--json", "target", type=click.Path(dir_okay=False, allow_dash=True), required=True)
@click.option("--model", default=SMALL_MODEL, show_default=True, help="As wdmoe-export takes it.")
def main(data_dir: Path, rows: tuple[int, ...], target: str, model: str) -> None:
    """Look for routers that choose otherwise."""
    from tokenizers import Tokenizer

    checkpoint, name = find_checkpoint(model, progress)
    with tempfile.TemporaryDirectory(prefix="wdmoe-flips-") as scratch:
        config = ExportConfig(Path(scratch) / "bundle", devices=4)
        plan = plan_export(checkpoint, name, config)
        export_bundle(plan, config)
        collector = Collector()
        tokenizer = Tokenizer.from_file(str(config.out / "bs" / "tokenizer.json"))
        spec = plan.layout.spec
        evaluate(load_task("piqa", data_dir), collector, tokenizer, max_length=spec.max_positions)
        questions = [collector.questions[row] for row in rows]
        runs = {wire: run(config.out, wire, questions) for wire in ("fp32", "fp16")}
    (exact, single), (moved, half) = runs["fp32"], runs["fp16"]
    result = {
        "model": name,
        "rows": [
            {"row": row}
            | compare(single[at * spec.n_blocks :][: spec.n_blocks], half[at * spec.n_blocks :], spec.top_k)
            | {"moved": [b - a for a, b in zip(exact[at].log_likelihoods, moved[at].log_likelihoods, strict=True)]}
            for at, row in enumerate(rows)
        ],
        **environment(("numpy", "onnxruntime")),
    }
    for entry in result["rows"]:
        progress(str(entry))
    write_json(target, result)


def run(bundle: Path, wire: Any, questions: Sequence[Question]) -> tuple[list[Answer], Logits]:
    """Answer questions one at a time; also returns the router's logits of each block, question after question."""
    logits: Logits = []

    with open_system(bundle, engine="onnxruntime", wire=wire) as system:
        system.pipeline.on_router = lambda _, of_block: logits.append(of_block.copy())
        answers = DistributedScorer(system.pipeline, Exact(), 1, system.manifest.model.sliding_window).score(questions)
    return answers, logits


def compare(single: Logits, half: Logits, top_k: int) -> dict[str, Any]:
    """Count where other experts are chosen; of the first such block, the margin and the change of the logits."""
    flips, first = 0, None
    for block, (a, b) in enumerate(zip(single, half, strict=False)):
        chosen, others = (np.sort(route(logits, top_k, False).experts, axis=1) for logits in (a, b))
        differ = (chosen != others).any(axis=1)
        if differ.any() and first is None:
            ranked = -np.sort(-a[differ], axis=1)
            first = {
                "block": block,
                "margin": float((ranked[:, top_k - 1] - ranked[:, top_k]).min()),
                "logits_moved_by": float(np.abs(a - b).max()),
            }
        flips += int(differ.sum())
    return {"flips": flips, "first": first}


if __name__ == "__main__":
    main()
