"""What experts in fp16, int8 and int4 cost against fp32: perplexity, KL on answer tokens, pooled paired accuracy.

    python scripts/bench/precision.py --data-dir DIR --json FILE
    python scripts/bench/precision.py --data-dir DIR --rows 20 --tokens 4000 --json -

The model is exported once in each precision; four devices of each bundle answer in this process, rows in float32 between
them, so that nothing but the precision differs. Bars: perplexity of wikitext2 at most 1.005 x that of fp32 for fp16 and int8,
1.05 x for int4; over at least 5,000 rows of five sets, the lower end of the 95 % interval of the paired accuracy difference at
least -1.0 points (with fewer rows that is reported, not judged). Exit code 1 if a bar is missed.

With a FILE, what is done is kept, set by set, in FILE.unfinished; the same command goes on.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import click
import msgspec

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
from inprocess import System, open_system
from processes import exit_on_sigterm

from scripts.bench._environment import environment, progress, write_json
from wdmoe.bs.evaluation import LoadedTask, load_task
from wdmoe.bs.microbatch import Microbatch, Result
from wdmoe.bs.pipeline import Pipeline
from wdmoe.bs.policies import Exact, Policy
from wdmoe.bs.quality import (
    ACCURACY_SETS,
    PERPLEXITY_SET,
    Finished,
    Quality,
    QualityBar,
    measure_quality,
    text_windows,
)
from wdmoe.bs.records import Record
from wdmoe.bs.results import finite, read_finished, write_finished
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.export.models import SMALL_MODEL, find_checkpoint
from wdmoe.runtime.manifest import BsManifest, Precision, read_manifest
from wdmoe.runtime.messages import MAX_ROWS

REFERENCE: Precision = "fp32"
PERPLEXITY_BARS: dict[Precision, float] = {"fp16": 1.005, "int8": 1.005, "int4": 1.05}
BAR = QualityBar()
N_DEVICES = 4
_PROGRESS_EVERY_S = 30.0


@dataclass(frozen=True, slots=True)
class InPrecision:
    """Stands where a policy stands in `measure_quality`: exact, by the bundle of a precision."""

    precision: Precision

    def describe(self) -> str:
        """Name it."""
        return self.precision


@dataclass(frozen=True, slots=True)
class PipelineOfEach:
    """Stands where a pipeline stands: `Exact` is answered by the reference, `InPrecision` by the bundle it names."""

    pipelines: dict[Precision, Pipeline]

    def run(
        self, microbatches: Iterable[Microbatch], policy: Policy | InPrecision, in_flight: int = 1
    ) -> Iterator[tuple[int, Result, Record]]:
        """Run microbatches; see `Pipeline`."""
        pipeline = self.pipelines[policy.precision if isinstance(policy, InPrecision) else REFERENCE]
        return pipeline.run(microbatches, Exact(), in_flight)


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--json", "target", type=click.Path(dir_okay=False, allow_dash=True), required=True)
@click.option("--model", default=SMALL_MODEL, show_default=True, help="As wdmoe-export takes it.")
@click.option(
    "--precision", "precisions", type=click.Choice([*PERPLEXITY_BARS]), multiple=True, default=[*PERPLEXITY_BARS]
)
@click.option("--dataset", "datasets", multiple=True, default=ACCURACY_SETS, show_default=True)
@click.option("--rows", type=click.IntRange(min=1), help="Only the first rows of each set.  [default: all]")
@click.option("--tokens", type=click.IntRange(min=1), help="Only the first tokens of wikitext2.  [default: all]")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Questions in a microbatch.")
@click.option("--engine", type=click.Choice(["onnxruntime", "numpy"]), default="onnxruntime", show_default=True)
def main(
    data_dir: Path,
    target: str,
    model: str,
    precisions: tuple[Precision, ...],
    datasets: tuple[str, ...],
    rows: int | None,
    tokens: int | None,
    batch: int,
    engine: str,
) -> None:
    """Compare precisions; exit code 1 if a bar is missed."""
    exit_on_sigterm()
    checkpoint, name = find_checkpoint(model, progress)
    tasks = [load_task(dataset, data_dir) for dataset in dict.fromkeys(datasets)]
    text = load_task(PERPLEXITY_SET, data_dir)
    asked = tuple(dict.fromkeys(precisions))
    with tempfile.TemporaryDirectory(prefix="wdmoe-precision-") as scratch, ExitStack() as stack:
        bundles = {one: export(checkpoint, name, Path(scratch), one) for one in (REFERENCE, *asked)}
        kept = None if target == "-" else Path(f"{target}.unfinished")
        ids = [read_manifest(bundle / "bs", BsManifest).bundle_id for bundle in bundles.values()]
        now = {"bundles": ids, "tokens": tokens, "engine": engine, "batch": batch}
        finished, refused = read_finished(kept, now) if kept is not None else (Finished(), None)
        if refused is not None:
            progress(f"{kept}: nothing of it is used again: {refused}")
        started = time.perf_counter()
        systems = {one: stack.enter_context(open_system(bundle, engine=engine)) for one, bundle in bundles.items()}
        progress(f"{', '.join(bundles)}: {engine}, {N_DEVICES} devices each in this process")

        def keep(done: Finished) -> None:
            if kept is not None:
                write_finished(kept, now, done)

        qualities = compare(systems, bundles[REFERENCE] / "bs", tasks, text, finished, rows, tokens, batch, keep)
        results = {one: describe(quality, one, bundles[one]) for one, quality in zip(asked, qualities, strict=True)}
        wall_s = time.perf_counter() - started
    for one, found in results.items():
        progress(f"{one}: {summary(found)}")
    missed = [f"{one}: {bar}" for one, found in results.items() for bar, ok in found["reached"].items() if ok is False]
    result = {
        "model": name,
        "engine": engine,
        "rows_of_each_set": rows,
        "tokens": tokens,
        "batch": batch,
        "bars": {"perplexity_ratio": PERPLEXITY_BARS, "points": BAR.points, "rows": BAR.rows},
        "passed": not missed,
        "missed": missed,
        "precisions": results,
        "wall_s": wall_s,
        **environment(("lm-eval", "numpy", "onnxruntime")),
    }
    write_json(target, result)
    if kept is not None:
        kept.unlink(missing_ok=True)
    progress(f"missed: {'; '.join(missed)}" if missed else "no bar is missed")
    sys.exit(1 if missed else 0)


def export(checkpoint: Path, name: str, scratch: Path, precision: Precision) -> Path:
    """Export the model in a precision."""
    config = ExportConfig(scratch / precision, devices=N_DEVICES, precision=precision)
    return export_bundle(plan_export(checkpoint, name, config), config).out


def compare(
    systems: Mapping[Precision, System],
    folder: Path,
    tasks: Sequence[LoadedTask],
    text: LoadedTask,
    finished: Finished,
    rows: int | None,
    tokens: int | None,
    batch: int,
    keep: Callable[[Finished], None],
) -> list[Quality]:
    """Answer everything with the reference and each other precision, in their order."""
    from tokenizers import Tokenizer

    reference = systems[REFERENCE]
    model = reference.manifest.model
    assert reference.manifest.tokenizer is not None
    tokenizer = Tokenizer.from_file(str(folder / reference.manifest.tokenizer))
    longest, prefix = min(model.max_positions, MAX_ROWS), model.bos_token_id
    done: Counter[str] = Counter()
    said = [time.perf_counter()]

    def on_step(dataset: str) -> None:
        done[dataset] += 1
        if time.perf_counter() - said[0] > _PROGRESS_EVERY_S:
            said[0] = time.perf_counter()
            progress(f"{dataset} {done[dataset]}")

    return measure_quality(
        cast("Pipeline", PipelineOfEach({one: system.pipeline for one, system in systems.items()})),
        [cast("Policy", InPrecision(one)) for one in systems if one != REFERENCE],
        tasks,
        text_windows(text, tokenizer, max_length=longest, tokens=tokens, prefix_token_id=prefix),
        tokenizer,
        max_length=longest,
        window=model.sliding_window,
        batch=batch,
        limit=rows,
        prefix_token_id=prefix,
        on_step=on_step,
        finished=finished,
        on_finished=keep,
    )


def describe(quality: Quality, precision: Precision, bundle: Path) -> dict[str, Any]:
    """Turn a comparison into plain JSON values, with what of the bars is reached; null where it cannot be judged."""
    manifest = read_manifest(bundle / "bs", BsManifest)
    low, high = quality.accuracy.interval_points
    error = manifest.quantisation_error
    return {
        "perplexity_fp32": quality.text.exact_perplexity,
        "perplexity": quality.text.policy_perplexity,
        "perplexity_ratio": quality.text.ratio,
        "tokens": quality.text.tokens,
        "mean_kl_nats": finite(quality.divergence.mean),
        "largest_kl_nats": quality.divergence.largest,
        "answer_positions": quality.divergence.positions,
        "accuracy_difference_points": quality.accuracy.mean_points,
        "interval_95_points": [finite(low), finite(high)],
        "rows": quality.accuracy.rows,
        "sets": {
            fp32.dataset: {"rows": fp32.rows, "acc_fp32": fp32.metrics["acc"], "acc": other.metrics["acc"]}
            for fp32, other in quality.evaluations
        },
        "reached": {
            "perplexity_ratio": quality.text.ratio <= PERPLEXITY_BARS[precision],
            "points": None if quality.accuracy.rows < BAR.rows else low >= BAR.points,
        },
        "expert_bytes": sum(path.stat().st_size for path in (bundle / "experts").iterdir()),
        "quantisation_error": None if error is None else msgspec.to_builtins(error),
    }


def summary(found: dict[str, Any]) -> str:
    """Put a result on one line."""
    low, high = (float("nan") if end is None else end for end in found["interval_95_points"])
    return (
        f"perplexity {found['perplexity']:.3f} / {found['perplexity_fp32']:.3f} = {found['perplexity_ratio']:.5f} over "
        f"{found['tokens']} tokens, KL {found['mean_kl_nats'] or 0:.2e}, acc {found['accuracy_difference_points']:+.2f} points "
        f"({low:+.2f} to {high:+.2f}, {found['rows']} rows)"
    )


if __name__ == "__main__":
    main()
