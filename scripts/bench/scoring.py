"""Scoring PIQA through four device processes, against the same graphs in one process and against transformers.

    python scripts/bench/scoring.py --data-dir DIR --json -

Policy exact, float32 rows on the wire, the same rows and CPU, the same judge, timed from the first tokenised prompt to the last
answer, without loading. `distributed_over_single_process` (bar: <= 1.10) compares with one process that runs the same
ONNX files on the same microbatches, one after another, without wire, requests or threads of ours. Each side takes its best: of
all settings asked for in one process, and distributed by changing one setting after another, keeping what was faster. `speedup_over_transformers` (bar: >= 1.5) compares with lm-eval's own transformers model at its best
batch size and implementation of the experts. Every row must be answered as transformers answers it; where the two choices
are closer than 1e-3, a rounding may decide, and those rows are listed. `trie` says what sharing the beginnings of a
question's choices gives: the single process once more, each choice a sequence of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
from processes import command, device_processes, exit_on_sigterm, free_address

from scripts.bench._environment import CpuUse, environment, progress, write_json
from scripts.bench.against_transformers import DATASET, compare_answers, run_transformers
from wdmoe.bs.dispatch import combine, split_by_device
from wdmoe.bs.evaluation import Evaluation, LoadedTask, evaluate, load_task
from wdmoe.bs.microbatch import Microbatch, Result, answers_of, in_batches, pack_questions
from wdmoe.bs.policies import Exact, select
from wdmoe.bs.questions import Answer, Question
from wdmoe.bs.routing import Floats, route
from wdmoe.bs.stages import Stages, rope_angles
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.export.models import SMALL_MODEL, find_checkpoint
from wdmoe.runtime.engines.onnxruntime_engine import OnnxruntimeEngine
from wdmoe.runtime.expert_sums import weighted_sums
from wdmoe.runtime.manifest import BsManifest, DeviceManifest, read_manifest
from wdmoe.runtime.messages import MAX_ROWS, Rows

DEVICES = 4
BARS = {"distributed_over_single_process": 1.10, "speedup_over_transformers": 1.5}


@dataclass(frozen=True, slots=True)
class Run:
    """One arm that was run."""

    settings: dict[str, Any]
    wall_s: float
    tokens: int
    log_likelihoods: Sequence[Sequence[float]]
    cpu: dict[str, float | None]


class OneProcess:
    """A `Scorer` that runs the stages and the experts of a whole bundle itself."""

    name, version, tolerance = "one process", "1", 0.0

    def __init__(self, bundle: Path, threads: int, batch: int) -> None:
        manifest = read_manifest(bundle / "bs", BsManifest)
        self.tokens = 0
        self._model, self._batch = manifest.model, batch
        self._stages = Stages(bundle / "bs", manifest, threads)
        self._engines: dict[tuple[int, int], OnnxruntimeEngine] = {}
        for folder in sorted(bundle.glob("device-*")):
            experts = read_manifest(folder, DeviceManifest).experts
            engine = OnnxruntimeEngine(folder, experts, threads)
            self._engines |= {(entry.block, entry.expert): engine for entry in experts}

    def run(self, block: int, expert: int, rows: Rows) -> Rows:
        """Run one expert; see `ExpertEngine`."""
        return self._engines[block, expert].run(block, expert, rows)

    def score(
        self, questions: Sequence[Question], on_answer: Callable[[int, Answer], None] | None = None
    ) -> list[Answer]:
        """Answer questions in the microbatches that the distributed system makes of them; see `Scorer`."""
        answers: dict[int, Answer] = {}
        for numbers in in_batches(questions, self._batch):
            asked = [questions[number] for number in numbers]
            result = self._answer(pack_questions(asked, self._model.sliding_window))
            for number, answer in zip(numbers, answers_of(asked, result), strict=True):
                answers[number] = answer
                if on_answer is not None:
                    on_answer(number, answer)
        return [answers[number] for number in range(len(questions))]

    def _answer(self, microbatch: Microbatch) -> Result:
        model, rows = self._model, len(microbatch.token_ids)
        self.tokens += rows
        angles = rope_angles(model.rope, microbatch.positions)
        owner = np.zeros(model.n_experts, np.int64)
        residual: Floats | None = None
        summed: Floats | None = None
        for block in range(model.n_blocks):
            attended = self._stages.attend(block, microbatch, angles, residual, summed)
            routing = route(attended.router_logits, model.top_k, model.norm_top_k)
            plan = select(routing, owner, np.ones(1), Exact())
            (shipment,) = split_by_device(block, routing, plan, owner, ("all",), attended.hidden, "fp32")
            sums = weighted_sums(self, shipment.request, attended.hidden)
            shared = self._stages.shared(block, attended.hidden) if model.shared_expert else None
            residual, summed = attended.residual, combine(rows, model.d_model, [(shipment.rows, sums)], None, shared)
        assert residual is not None and summed is not None
        return self._stages.finish(microbatch, residual, summed)


class WithoutSharing:
    """A `Scorer` that asks another about each choice as a question of its own: nothing is shared."""

    def __init__(self, scorer: OneProcess) -> None:
        self._scorer = scorer

    def score(
        self, questions: Sequence[Question], on_answer: Callable[[int, Answer], None] | None = None
    ) -> list[Answer]:
        """Answer questions; see `Scorer`."""
        apart = [Question(question.name, (choice,)) for question in questions for choice in question.choices]
        found = iter(self._scorer.score(apart))
        answers: list[Answer] = []
        for number, question in enumerate(questions):
            parts = [next(found) for _ in question.choices]
            answers.append(
                Answer(tuple(part.log_likelihoods[0] for part in parts), tuple(part.greedy[0] for part in parts))
            )
            if on_answer is not None:
                on_answer(number, answers[-1])
        return answers


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--json", "target", type=click.Path(dir_okay=False, allow_dash=True), required=True)
@click.option("--model", default=SMALL_MODEL, show_default=True, help="As wdmoe-export takes it.")
@click.option("--rows", type=click.IntRange(min=1), default=200, show_default=True, help="The first rows of the set.")
@click.option("--threads", "threads", type=int, multiple=True, default=(1, 2), show_default=True,
              help="Of the stages; of everything in one process. Tried.")  # fmt: skip
@click.option("--stage-workers", type=int, multiple=True, default=(2, 1), show_default=True, help="Tried, distributed.")
@click.option(
    "--device-threads", type=int, multiple=True, default=(1, 2), show_default=True, help="Of an engine. Tried."
)
@click.option("--batch", "batches", type=int, multiple=True, default=(32, 16), show_default=True, help="Tried by ours.")
@click.option(
    "--in-flight",
    "in_flights",
    type=int,
    multiple=True,
    default=(3, 2, 4),
    show_default=True,
    help="Tried, distributed.",
)
@click.option(
    "--transport", "transports", type=click.Choice(["tcp", "ipc"]), multiple=True, default=("tcp", "ipc"),
    show_default=True, help="Tried, distributed: loopback or a socket file.",
)  # fmt: skip
@click.option("--torch-batch", "torch_batches", type=int, multiple=True, default=(1, 8, 16, 32), show_default=True)
@click.option(
    "--experts", type=click.Choice(["grouped_mm", "eager"]), multiple=True, default=("grouped_mm", "eager"),
    show_default=True, help="How transformers runs the experts.",
)  # fmt: skip
def main(
    data_dir: Path,
    target: str,
    model: str,
    rows: int,
    threads: tuple[int, ...],
    stage_workers: tuple[int, ...],
    device_threads: tuple[int, ...],
    batches: tuple[int, ...],
    in_flights: tuple[int, ...],
    transports: tuple[str, ...],
    torch_batches: tuple[int, ...],
    experts: tuple[str, ...],
) -> None:
    """Compare times and answers; exit code 1 if a bar is missed or a row is answered otherwise."""
    exit_on_sigterm()
    described = environment(("lm-eval", "torch", "transformers", "numpy", "onnxruntime", "pyzmq"))
    checkpoint, name = find_checkpoint(model, progress)
    task = load_task(DATASET, data_dir)
    with tempfile.TemporaryDirectory(prefix="wdmoe-scoring-") as scratch:
        config = ExportConfig(Path(scratch) / "bundle", devices=DEVICES)
        export_bundle(plan_export(checkpoint, name, config), config)
        tried = {
            "threads": threads, "stage_workers": stage_workers, "device_threads": device_threads, "batch": batches,
            "in_flight": in_flights, "transport": transports,
        }  # fmt: skip
        distributed = search(
            tried, lambda settings: run_distributed(config.out, Path(scratch), data_dir, rows, settings)
        )
        single = [run_single(config.out, task, rows, count, batch) for batch in batches for count in threads]
        best_single = min(single, key=_wall)
        apart = run_single(config.out, task, rows, **best_single.settings, sharing=False)
    arms = run_transformers(checkpoint, task, rows, torch_batches, experts, None)
    best, fastest = min(distributed, key=_wall), min(arms, key=lambda arm: arm.wall_s)
    control = min(arms, key=lambda arm: arm.batch)  # one row at a time, nothing padded
    answers = compare_answers(best.log_likelihoods, control.evaluation.log_likelihoods)
    ratios = {
        "distributed_over_single_process": best.wall_s / best_single.wall_s,
        "speedup_over_transformers": fastest.wall_s / best.wall_s,
    }
    passed = (
        ratios["distributed_over_single_process"] <= BARS["distributed_over_single_process"]
        and ratios["speedup_over_transformers"] >= BARS["speedup_over_transformers"]
        and not answers["disagreements"]
    )
    result = {
        **ratios,
        "bars": BARS,
        "passed": passed,
        "rows": rows,
        "answers": answers | {"single_process": _differs(best, best_single)},
        "trie": {
            "tokens": best_single.tokens,
            "tokens_without": apart.tokens,
            "wall_s": best_single.wall_s,
            "wall_s_without": apart.wall_s,
            "speedup": apart.wall_s / best_single.wall_s,
            # What would be left of the lead over transformers, which shares nothing.
            "speedup_over_transformers_without": ratios["speedup_over_transformers"]
            * best_single.wall_s
            / apart.wall_s,
        },
        "distributed": [_described(run) for run in distributed],
        "single_process": [_described(run) for run in single],
        "transformers": [
            {"experts": arm.experts, "batch": arm.batch, "wall_s": arm.wall_s, "cpu": arm.cpu} for arm in arms
        ],
        "model": name,
        **described,
    }
    progress(
        f"distributed {best.wall_s:.1f} s {best.settings}, one process {best_single.wall_s:.1f} s {best_single.settings}, "
        f"transformers {fastest.wall_s:.1f} s (batch {fastest.batch}, {fastest.experts}): "
        f"{ratios['distributed_over_single_process']:.2f} x, {ratios['speedup_over_transformers']:.2f} x faster; "
        f"{answers['disagreements']} rows answered otherwise"
    )
    write_json(target, result)
    sys.exit(0 if passed else 1)


def search(tried: Mapping[str, Sequence[Any]], run: Callable[[dict[str, Any]], Run]) -> list[Run]:
    """Change one setting after another, keeping the fastest so far; the first of each are the start."""
    runs = [run({name: values[0] for name, values in tried.items()})]
    for name, values in tried.items():
        best = min(runs, key=_wall).settings
        runs += [run({**best, name: value}) for value in values[1:]]
    return runs


def run_distributed(bundle: Path, scratch: Path, data_dir: Path, rows: int, settings: dict[str, Any]) -> Run:
    """Run `wdmoe-bs run` as a user would, with fresh device processes."""
    address = free_address() if settings["transport"] == "tcp" else f"ipc://{scratch}/link"
    out = scratch / "run.json"
    out.unlink(missing_ok=True)
    options = ["--bundle", bundle, "--listen", address, "--dataset", DATASET, "--data-dir", data_dir, "--limit", rows]
    options += ["--policy", "exact", "--wire", "fp32", "--threads", settings["threads"]]
    options += ["--stage-workers", settings["stage_workers"]]
    options += ["--batch", settings["batch"], "--in-flight", settings["in_flight"], "--json", out]
    with device_processes(bundle, address, ["--threads", settings["device_threads"]]) as devices:
        cpu = CpuUse([device.pid for device in devices])
        done = subprocess.run(command("wdmoe-bs", "run", *options), stdout=sys.stderr, check=False)
        if done.returncode != 0:
            raise click.ClickException(f"wdmoe-bs ended with exit code {done.returncode}")
        used = cpu.since()
    (result,) = json.loads(out.read_text())["results"]
    progress(f"distributed, {settings}: {result['wall_s']:.1f} s")
    return Run(settings, result["wall_s"], result["tokens"], result["log_likelihoods"], used)


def run_single(bundle: Path, task: LoadedTask, rows: int, threads: int, batch: int, sharing: bool = True) -> Run:
    """Run the same graphs in this process."""
    from tokenizers import Tokenizer

    manifest = read_manifest(bundle / "bs", BsManifest)
    assert manifest.tokenizer is not None
    scorer = OneProcess(bundle, threads, batch)
    warm_up = evaluate_with(scorer, task, min(rows, 3), bundle, manifest, Tokenizer)
    assert warm_up.rows > 0
    scorer.tokens = 0
    cpu, started_s = CpuUse(), time.perf_counter()
    evaluation = evaluate_with(scorer if sharing else WithoutSharing(scorer), task, rows, bundle, manifest, Tokenizer)
    wall_s = time.perf_counter() - started_s
    settings = {"threads": threads, "batch": batch}
    progress(f"one process, {settings}{'' if sharing else ', nothing shared'}: {wall_s:.1f} s")
    return Run(settings, wall_s, scorer.tokens, evaluation.log_likelihoods, cpu.since())


def evaluate_with(
    scorer: OneProcess | WithoutSharing, task: LoadedTask, rows: int, bundle: Path, manifest: BsManifest, kind: Any
) -> Evaluation:
    """Let the judge ask a scorer."""
    tokenizer = kind.from_file(str(bundle / "bs" / str(manifest.tokenizer)))
    positions = min(manifest.model.max_positions, MAX_ROWS)
    return evaluate(
        task, scorer, tokenizer, max_length=positions, limit=rows, prefix_token_id=manifest.model.bos_token_id
    )


def _wall(run: Run) -> float:
    return run.wall_s


def _described(run: Run) -> dict[str, Any]:
    return {**run.settings, "wall_s": run.wall_s, "tokens": run.tokens, "cpu": run.cpu}


def _differs(one: Run, other: Run) -> dict[str, Any]:
    answers = compare_answers(one.log_likelihoods, other.log_likelihoods)
    return {key: answers[key] for key in ("disagreements", "max_abs_ll_difference")}


if __name__ == "__main__":
    main()
