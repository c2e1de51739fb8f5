"""What experts in fp16, int8 and int4 cost against fp32: perplexity, KL on answer tokens, pooled paired accuracy.

    python scripts/bench/precision.py --data-dir DIR --json FILE
    python scripts/bench/precision.py --data-dir DIR --rows 20 --tokens 4000 --json -

The model is exported once in each precision; four devices of each bundle answer in this process, rows in float32 between
them, so that nothing but the precision differs. Bars: perplexity of wikitext2 at most 1.005 x that of fp32 for fp16 and int8,
1.05 x for int4; over at least 5,000 rows of five sets, the lower end of the 95 % interval of the paired accuracy difference at
least -1.0 points (with fewer rows that is reported, not judged). Exit code 1 if a bar is missed.

With a FILE, what is done is kept, set by set, in FILE.unfinished; the same command goes on. Sets are answered side by side,
one thread each. A precision whose experts widen to the very numbers of the reference (fp16, where the checkpoint holds no
more) reads the text like any other, which shows that its engine gives the same; it is not asked the questions a second time.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import click
import msgspec
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
from inprocess import open_system
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
    text_likelihood,
    text_windows,
)
from wdmoe.bs.questions import Question
from wdmoe.bs.records import Record
from wdmoe.bs.results import finite, read_finished, write_finished
from wdmoe.bs.scoring import DistributedScorer
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.export.models import SMALL_MODEL, find_checkpoint
from wdmoe.runtime.manifest import BsManifest, DeviceManifest, ModelSpec, Precision, read_manifest
from wdmoe.runtime.messages import MAX_ROWS
from wdmoe.runtime.quantised import expert_matrices
from wdmoe.runtime.tensor_file import map_tensors
from wdmoe.runtime.tokenizing import open_tokenizer

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


@dataclass(slots=True)
class Said:
    """Tells of progress now and then."""

    _done: Counter[str] = field(default_factory=Counter)
    _at_s: float = field(default_factory=time.perf_counter)

    def step(self, name: str) -> None:
        """Count a row or a window; see `measure_quality`."""
        self._done[name] += 1
        if time.perf_counter() - self._at_s > _PROGRESS_EVERY_S:
            self._at_s = time.perf_counter()
            progress(f"{name} {self._done[name]}")


@dataclass(slots=True)
class PipelineOfEach:
    """Stands where a pipeline stands: `Exact` is answered by the reference, `InPrecision` by the bundle it names.

    A single microbatch that the reference has just answered is answered again, word for word, for a precision in `same`.
    """

    pipelines: dict[Precision, Pipeline]
    same: frozenset[Precision] = frozenset()
    _asked: bytes = b""
    _last: list[tuple[int, Result, Record]] = field(default_factory=list)

    def run(
        self, microbatches: Iterable[Microbatch], policy: Policy | InPrecision, in_flight: int = 1
    ) -> Iterator[tuple[int, Result, Record]]:
        """Run microbatches; see `Pipeline`."""
        precision = policy.precision if isinstance(policy, InPrecision) else REFERENCE
        pipeline = self.pipelines[precision]
        if not self.same:
            yield from pipeline.run(microbatches, Exact(), in_flight)
            return
        (microbatch,) = microbatches
        asked = microbatch.token_ids.tobytes() + microbatch.positions.tobytes()
        if precision == REFERENCE:
            self._asked, self._last = asked, list(pipeline.run([microbatch], Exact()))
        again = precision == REFERENCE or (precision in self.same and asked == self._asked)
        yield from self._last if again else pipeline.run([microbatch], Exact())


@dataclass(frozen=True, slots=True)
class Asked:
    """What every process of a comparison does alike."""

    bundles: dict[Precision, Path]
    same: frozenset[Precision]
    data_dir: Path
    rows: int | None
    tokens: int | None
    batch: int
    engine: str

    @property
    def policies(self) -> list[Policy]:
        """What stands where policies stand."""
        return [cast("Policy", InPrecision(one)) for one in self.bundles if one != REFERENCE]

    def model(self) -> ModelSpec:
        """Of every bundle."""
        return read_manifest(self.bundles[REFERENCE] / "bs", BsManifest).model

    def tokenizer(self) -> Any:
        """Of every bundle."""
        folder = self.bundles[REFERENCE] / "bs"
        return open_tokenizer(folder, read_manifest(folder, BsManifest).tokenizer)


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
@click.option("--jobs", type=click.IntRange(min=1), default=2, show_default=True, help="Sets at a time, 3 GB each.")
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
    jobs: int,
) -> None:
    """Compare precisions; exit code 1 if a bar is missed."""
    exit_on_sigterm()
    checkpoint, name = find_checkpoint(model, progress)
    tasks = [load_task(dataset, data_dir) for dataset in dict.fromkeys(datasets)]
    wanted = tuple(dict.fromkeys(precisions))
    with tempfile.TemporaryDirectory(prefix="wdmoe-precision-") as scratch:
        bundles = {one: export(checkpoint, name, Path(scratch), one) for one in (REFERENCE, *wanted)}
        same = frozenset(one for one in wanted if same_numbers(bundles[one], bundles[REFERENCE]))
        asked = Asked(bundles, same, data_dir, rows, tokens, batch, engine)
        kept = None if target == "-" else Path(f"{target}.unfinished")
        ids = [read_manifest(bundle / "bs", BsManifest).bundle_id for bundle in bundles.values()]
        now = {"bundles": ids, "tokens": tokens, "engine": engine, "batch": batch}
        finished, refused = read_finished(kept, now) if kept is not None else (Finished(), None)
        if refused is not None:
            progress(f"{kept}: nothing of it is used again: {refused}")
        progress(
            f"{', '.join(bundles)}: {engine}, {N_DEVICES} devices each; as {REFERENCE}: {', '.join(same) or 'none'}"
        )
        started = time.perf_counter()
        for done in answer_sets(asked, tasks, finished, jobs):
            finished.likelihoods |= done.likelihoods
            finished.parts |= done.parts
            if kept is not None:
                write_finished(kept, now, finished)
        qualities = compare(asked, PipelineOfEach({}), tasks, finished)
        results = {
            one: describe(quality, one, bundles[one]) | {"same_numbers": one in same}
            for one, quality in zip(wanted, qualities, strict=True)
        }
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


def same_numbers(bundle: Path, reference: Path) -> bool:
    """Say whether every expert widens to the very numbers of the reference's."""
    for folder in sorted(bundle.glob("device-*")):
        twin = reference / folder.name
        pairs = zip(
            read_manifest(folder, DeviceManifest).experts, read_manifest(twin, DeviceManifest).experts, strict=True
        )
        for ours, theirs in pairs:
            paths = folder / ours.weights, twin / theirs.weights
            for one, other in zip(*(expert_matrices(map_tensors(path), path) for path in paths), strict=True):
                if not np.array_equal(one.float32(), other.float32()):
                    return False
    return True


def answer_sets(asked: Asked, tasks: Sequence[LoadedTask], finished: Finished, jobs: int) -> Iterator[Finished]:
    """Read the text and answer the sets that are not finished, some side by side, the longest first."""
    left: dict[str, float] = {
        task.dataset: sum(len(str(row)) for row in list(task.judge.eval_docs)[: asked.rows])
        for task in tasks
        if task.digest(asked.rows) not in finished.parts
    }
    if not {"exact", *(policy.describe() for policy in asked.policies)} <= set(finished.likelihoods):
        left[PERPLEXITY_SET] = float("inf")
    with multiprocessing.get_context("spawn").Pool(max(1, min(jobs, len(left)))) as pool:
        yield from pool.imap_unordered(partial(answer_set, asked), sorted(left, key=lambda name: -left[name]))


def answer_set(asked: Asked, dataset: str) -> Finished:
    """Answer one set, or read the text, with the reference and each other precision."""
    started_s, on_step = time.perf_counter(), Said().step
    finished = Finished()
    with ExitStack() as stack:
        systems = {
            one: stack.enter_context(open_system(path, engine=asked.engine)) for one, path in asked.bundles.items()
        }
        # The text is read by every engine, whatever its numbers.
        same = frozenset() if dataset == PERPLEXITY_SET else asked.same
        pipeline = PipelineOfEach({one: system.pipeline for one, system in systems.items()}, same)
        if dataset == PERPLEXITY_SET:
            for policy in (Exact(), *asked.policies):
                scorer = DistributedScorer(cast("Pipeline", pipeline), policy, 1, asked.model().sliding_window)
                finished.likelihoods[policy.describe()] = text_likelihood(scorer, windows(asked), on_step)
        else:
            finished.likelihoods = dict.fromkeys(("exact", *(policy.describe() for policy in asked.policies)), 0.0)
            compare(asked, pipeline, [load_task(dataset, asked.data_dir)], finished, on_step)
            finished.likelihoods = {}
    progress(f"{dataset}: done in {(time.perf_counter() - started_s) / 60:.1f} min")
    return finished


def windows(asked: Asked) -> list[Question]:
    """Cut the text."""
    model = asked.model()
    return text_windows(
        load_task(PERPLEXITY_SET, asked.data_dir),
        asked.tokenizer(),
        max_length=min(model.max_positions, MAX_ROWS),
        tokens=asked.tokens,
        prefix_token_id=model.bos_token_id,
    )


def compare(
    asked: Asked,
    pipeline: PipelineOfEach,
    tasks: Sequence[LoadedTask],
    finished: Finished,
    on_step: Callable[[str], None] = lambda name: None,
) -> list[Quality]:
    """Compare each precision with the reference; what is not finished is answered."""
    model = asked.model()
    return measure_quality(
        cast("Pipeline", pipeline),
        asked.policies,
        tasks,
        windows(asked),
        asked.tokenizer(),
        max_length=min(model.max_positions, MAX_ROWS),
        window=model.sliding_window,
        batch=asked.batch,
        limit=asked.rows,
        prefix_token_id=model.bos_token_id,
        on_step=on_step,
        finished=finished,
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
