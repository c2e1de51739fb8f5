"""What rows in float16 and int8 on the wire cost against float32: bytes, perplexity, KL on answer tokens, paired accuracy.

    python scripts/bench/wire.py --data-dir DIR --rows 20 --json FILE

Experts and stages are float32 and four devices answer in this process, so that nothing but the wire differs. Bytes are those of
the rows, both ways, as counted where they are sent. Bars: `int8_over_fp16_bytes` at most 0.52; perplexity of wikitext2 at
most 1.005 x that with float32 rows; over at least 5,000 rows the lower end of the 95 % interval of the paired accuracy difference at
least -1.0 points (with fewer rows that is reported, not judged). Exit code 1 if a bar is missed.

With a FILE, what is done is kept, set by set, in FILE.unfinished; the same command goes on.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import click

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
from inprocess import System, open_system
from processes import exit_on_sigterm

from scripts.bench._environment import environment, progress, write_json
from scripts.bench.precision import BAR, N_DEVICES, REFERENCE, InPrecision, PipelineOfEach, Said
from wdmoe.bs.evaluation import load_task
from wdmoe.bs.pipeline import Pipeline
from wdmoe.bs.policies import Exact, Policy
from wdmoe.bs.quality import ACCURACY_SETS, PERPLEXITY_SET, Finished, Quality, measure_quality, text_windows
from wdmoe.bs.questions import Choice, Question
from wdmoe.bs.records import summarise
from wdmoe.bs.results import finite, read_finished, write_finished
from wdmoe.bs.scoring import DistributedScorer
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.export.models import SMALL_MODEL, find_checkpoint
from wdmoe.runtime.manifest import Precision
from wdmoe.runtime.messages import MAX_ROWS, Wire
from wdmoe.runtime.tokenizing import open_tokenizer

WIRES: tuple[Wire, ...] = ("fp32", "fp16", "int8")
PERPLEXITY_BAR, BYTES_BAR = 1.005, 0.52
_COUNTED = Question("counted", (Choice(tuple(range(5, 25)), tuple(range(25, 45))),))  # whichever tokens they are


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--json", "target", type=click.Path(dir_okay=False, allow_dash=True), required=True)
@click.option("--model", default=SMALL_MODEL, show_default=True, help="As wdmoe-export takes it.")
@click.option("--dataset", "datasets", multiple=True, default=ACCURACY_SETS, show_default=True)
@click.option("--rows", type=click.IntRange(min=1), help="Only the first rows of each set.  [default: all]")
@click.option("--tokens", type=click.IntRange(min=1), default=40_000, show_default=True, help="Of wikitext2.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Questions in a microbatch.")
@click.option("--engine", type=click.Choice(["onnxruntime", "numpy"]), default="onnxruntime", show_default=True)
def main(
    data_dir: Path,
    target: str,
    model: str,
    datasets: tuple[str, ...],
    rows: int | None,
    tokens: int,
    batch: int,
    engine: str,
) -> None:
    """Compare wires; exit code 1 if a bar is missed."""
    exit_on_sigterm()
    checkpoint, name = find_checkpoint(model, progress)
    tasks = [load_task(dataset, data_dir) for dataset in dict.fromkeys(datasets)]
    text = load_task(PERPLEXITY_SET, data_dir)
    with tempfile.TemporaryDirectory(prefix="wdmoe-wire-") as scratch, ExitStack() as stack:
        config = ExportConfig(Path(scratch) / "bundle", devices=N_DEVICES)
        bundle = export_bundle(plan_export(checkpoint, name, config), config).out
        systems: dict[Precision, System] = {
            wire: stack.enter_context(open_system(bundle, wire=wire, engine=engine)) for wire in WIRES
        }
        kept = None if target == "-" else Path(f"{target}.unfinished")
        now = {"bundle": systems[REFERENCE].manifest.bundle_id, "tokens": tokens, "engine": engine, "batch": batch}
        finished, refused = read_finished(kept, now) if kept is not None else (Finished(), None)
        if refused is not None:
            progress(f"{kept}: nothing of it is used again: {refused}")

        def keep(done: Finished) -> None:
            if kept is not None:
                write_finished(kept, now, done)

        row_bytes = {wire: bytes_of_rows(system) for wire, system in systems.items()}
        manifest = systems[REFERENCE].manifest
        tokenizer, longest = (
            open_tokenizer(bundle / "bs", manifest.tokenizer),
            min(manifest.model.max_positions, MAX_ROWS),
        )
        prefix = manifest.model.bos_token_id
        qualities = measure_quality(
            cast("Pipeline", PipelineOfEach({wire: system.pipeline for wire, system in systems.items()})),
            [cast("Policy", InPrecision(wire)) for wire in WIRES[1:]],
            tasks,
            text_windows(text, tokenizer, max_length=longest, tokens=tokens, prefix_token_id=prefix),
            tokenizer,
            max_length=longest,
            window=manifest.model.sliding_window,
            batch=batch,
            limit=rows,
            prefix_token_id=prefix,
            on_step=Said().step,
            finished=finished,
            on_finished=keep,
        )
    wires = {wire: describe(quality) for wire, quality in zip(WIRES[1:], qualities, strict=True)}
    share = row_bytes["int8"] / row_bytes["fp16"]
    reached = {"int8_over_fp16_bytes": share <= BYTES_BAR}
    for wire, found in wires.items():
        reached |= {f"{wire}: {bar}": ok for bar, ok in found["reached"].items() if ok is not None}
        low, high = found["interval_95_points"]
        progress(
            f"{wire}: perplexity ratio {found['perplexity_ratio']:.5f} over {found['tokens']} tokens, KL "
            f"{found['mean_kl_nats'] or 0:.2e}, acc {found['accuracy_difference_points']:+.2f} points ({low} to {high}, "
            f"{found['rows']} rows)"
        )
    progress(f"int8 takes {share:.4f} of fp16's bytes")
    result: dict[str, Any] = {
        "int8_over_fp16_bytes": share,
        "bytes_of_rows": row_bytes,
        "bars": {"int8_over_fp16_bytes": BYTES_BAR, "perplexity_ratio": PERPLEXITY_BAR, "points": BAR.points},
        "reached": reached,
        "passed": all(reached.values()),
        "wires": wires,
        "model": name,
        "rows_of_each_set": rows,
        **environment(("lm-eval", "numpy", "onnxruntime")),
    }
    write_json(target, result)
    if kept is not None:
        kept.unlink(missing_ok=True)
    sys.exit(0 if result["passed"] else 1)


def bytes_of_rows(system: System) -> int:
    """Return the bytes of all rows of one question, both ways."""
    scorer = DistributedScorer(system.pipeline, Exact(), 1, None)
    scorer.score([_COUNTED])
    summary = summarise(scorer.records)
    return summary.bytes_down + summary.bytes_up


def describe(quality: Quality) -> dict[str, Any]:
    """Turn a comparison into plain JSON values, with what of the bars is reached; null where it cannot be judged."""
    low, high = quality.accuracy.interval_points
    return {
        "perplexity_ratio": quality.text.ratio,
        "tokens": quality.text.tokens,
        "mean_kl_nats": finite(quality.divergence.mean),
        "largest_kl_nats": quality.divergence.largest,
        "accuracy_difference_points": quality.accuracy.mean_points,
        "interval_95_points": [finite(low), finite(high)],
        "rows": quality.accuracy.rows,
        "reached": {
            "perplexity_ratio": quality.text.ratio <= PERPLEXITY_BAR,
            "points": None if quality.accuracy.rows < BAR.rows else low >= BAR.points,
        },
    }


if __name__ == "__main__":
    main()
