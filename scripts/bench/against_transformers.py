"""PIQA through four device processes against lm-eval's own transformers model: same checkpoint, rows and CPU.

    python scripts/bench/against_transformers.py --data-dir DIR --json -

Our arms run `wdmoe-bs run --policy exact` as a user would, with float32 and with float16 rows on the wire, one question
at a time and several; each is one process for the base station and four for the devices. transformers runs in this process at every batch
size asked for. Both are timed from the first tokenised prompt to the last answer, without loading, and the judge is
the same. With float32 rows every row must be answered as transformers answers it; only where the two choices'
log-likelihoods differ by less than 1e-3 may a rounding decide, and those rows are listed. Exit code 1 otherwise.
"""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
from processes import command, device_processes, exit_on_sigterm, free_address

from scripts.bench._environment import CpuUse, environment, progress, write_json
from wdmoe.bs.config import StationConfig
from wdmoe.bs.evaluation import Evaluation, LoadedTask, evaluate_lm, load_task
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.export.models import SMALL_MODEL, find_checkpoint

NEAR_TIE = 1e-3  # of log-likelihoods
BUSY = 0.05  # share of the processors that others may take without a word
DATASET = "piqa"
_DEFAULTS = StationConfig()

LogLikelihoods = Sequence[Sequence[float]]  # [rows][choices]


@dataclass(frozen=True, slots=True)
class OurArm:
    """One arm of ours."""

    wire: str
    batch: int = 1  # questions in a microbatch
    in_flight: int = 1

    @property
    def described(self) -> str:
        """As the tables call it."""
        several = "one question at a time" if self.batch == 1 else f"batch {self.batch}, {self.in_flight} in flight"
        return f"wdmoe, {self.wire} wire, {several}"


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm of transformers."""

    batch: int
    experts: str  # its implementation of the experts
    wall_s: float
    cpu: dict[str, float | None]
    evaluation: Evaluation


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--json", "target", type=click.Path(dir_okay=False, allow_dash=True), required=True)
@click.option("--model", default=SMALL_MODEL, show_default=True, help="As wdmoe-export takes it.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first rows.")
@click.option(
    "--batch", "batches", type=click.IntRange(min=1), multiple=True, default=(1, 8, 16, 32), show_default=True
)
@click.option(
    "--experts", type=click.Choice(["grouped_mm", "eager"]), multiple=True, default=("grouped_mm", "eager"),
    show_default=True, help="How transformers runs the experts.",
)  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(min=1), default=_DEFAULTS.threads, show_default=True, help="Of wdmoe-bs."
)
@click.option("--our-batch", type=click.IntRange(min=2), default=8, show_default=True, help="Of our batched arms.")
@click.option("--in-flight", type=click.IntRange(min=1), default=2, show_default=True, help="Of our batched arms.")
@click.option("--torch-threads", type=click.IntRange(min=1), help="Of transformers.  [default: torch's own choice]")
def main(
    data_dir: Path,
    target: str,
    model: str,
    limit: int | None,
    batches: tuple[int, ...],
    experts: tuple[str, ...],
    threads: int,
    our_batch: int,
    in_flight: int,
    torch_threads: int | None,
) -> None:
    """Compare answers and wall time."""
    exit_on_sigterm()
    described = environment(("lm-eval", "torch", "transformers", "numpy", "onnxruntime", "pyzmq"))
    checkpoint, name = find_checkpoint(model, progress)
    task = load_task(DATASET, data_dir)
    with tempfile.TemporaryDirectory(prefix="wdmoe-against-") as scratch:
        ours = run_wdmoe(checkpoint, name, Path(scratch), data_dir, limit, threads, our_arms(our_batch, in_flight))
    arms = run_transformers(checkpoint, task, limit, batches, experts, torch_threads)
    result = describe(ours, arms) | {
        "model": name,
        "threads": {"wdmoe_bs": threads, "wdmoe_device": 1, "devices": 4, "torch": _torch_threads()},
        **described,
    }
    _print_tables(result)
    write_json(target, result)
    sys.exit(1 if result["disagreements"] else 0)


def our_arms(batch: int, in_flight: int) -> dict[str, OurArm]:
    """Name our arms, as they stand in the result."""
    return {
        "wdmoe": OurArm("fp32"),
        "wdmoe_batched": OurArm("fp32", batch, in_flight),
        "wdmoe_fp16_wire": OurArm("fp16"),
        "wdmoe_fp16_wire_batched": OurArm("fp16", batch, in_flight),
    }


def run_wdmoe(
    checkpoint: Path,
    name: str,
    scratch: Path,
    data_dir: Path,
    limit: int | None,
    threads: int,
    arms: dict[str, OurArm],
) -> dict[str, dict[str, Any]]:
    """Run each arm of ours; returns for each the only result in the JSON of wdmoe-bs."""
    progress(f"{name}: exporting")
    config = ExportConfig(scratch / "bundle", devices=4)
    export_bundle(plan_export(checkpoint, name, config), config)
    address = free_address()
    results: dict[str, dict[str, Any]] = {}
    with device_processes(config.out, address) as devices:
        for key, arm in arms.items():
            progress(f"{arm.described}, 4 device processes")
            out = scratch / f"{key}.json"
            options = ["--bundle", config.out, "--listen", address, "--dataset", DATASET, "--data-dir", data_dir]
            options += ["--policy", "exact", "--wire", arm.wire, "--threads", threads]
            options += ["--batch", arm.batch, "--in-flight", arm.in_flight]
            options += ["--limit", limit] if limit is not None else []
            # Its tables would stand between stdout and whoever reads our JSON there.
            line = command("wdmoe-bs", "run", *options, "--json", out)
            cpu = CpuUse([device.pid for device in devices])
            if (code := subprocess.run(line, stdout=sys.stderr, check=False).returncode) != 0:
                raise click.ClickException(f"wdmoe-bs ended with exit code {code}")
            (result,) = json.loads(out.read_text())["results"]
            results[key] = result | {"cpu": cpu.since(), "arm": arm.described}  # loading included
            progress(f"{arm.described}: {result['wall_s']:.1f} s")
    return results


def run_transformers(
    checkpoint: Path,
    task: LoadedTask,
    limit: int | None,
    batches: Sequence[int],
    experts: Sequence[str],
    threads: int | None,
) -> list[Arm]:
    """Run each arm of transformers, the model loaded anew for each."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    arms: list[Arm] = []
    for implementation in experts:
        for batch in batches:
            progress(f"transformers, {implementation} experts, batch {batch}")
            lm = HFLM(
                str(checkpoint), dtype="float32", device="cpu", batch_size=batch, experts_implementation=implementation
            )
            with torch.no_grad():  # the first calls allocate
                for _ in range(3):
                    lm.model(torch.arange(24).repeat(batch, 1))
            started, cpu = time.perf_counter(), CpuUse()
            evaluation = evaluate_lm(lm, task, limit=limit)
            arms.append(Arm(batch, implementation, time.perf_counter() - started, cpu.since(), evaluation))
            progress(f"transformers, {implementation} experts, batch {batch}: {arms[-1].wall_s:.1f} s")
            del lm
            gc.collect()
    return arms


def describe(ours: dict[str, dict[str, Any]], arms: Sequence[Arm]) -> dict[str, Any]:
    """Put answers and times side by side."""
    control = min(arms, key=lambda arm: arm.batch)  # one row at a time, nothing padded
    digests = {run["rows_digest"] for run in ours.values()} | {arm.evaluation.rows_digest for arm in arms}
    if len(digests) != 1:
        raise click.ClickException("the arms were not asked the same rows")
    compared = {
        key: compare_answers(run["log_likelihoods"], control.evaluation.log_likelihoods) for key, run in ours.items()
    }
    exact = [compared["wdmoe"], compared["wdmoe_batched"]]
    best = min(arms, key=lambda arm: arm.wall_s)
    by_experts: dict[str, dict[str, float]] = {}
    for arm in arms:
        by_experts.setdefault(arm.experts, {})[str(arm.batch)] = arm.wall_s
    fastest_experts = min(by_experts.values(), key=lambda walls: min(walls.values()))
    return {
        "rows": control.evaluation.rows,
        "rows_digest": control.evaluation.rows_digest,
        "judge": control.evaluation.judge,
        "disagreements": sum(answers["disagreements"] for answers in exact),  # with float32 rows
        "near_ties": max((answers["near_ties"] for answers in exact), key=len),
        "max_abs_ll_difference": max(answers["max_abs_ll_difference"] for answers in exact),
        "near_tie_below": NEAR_TIE,
        "speedup": {key: best.wall_s / run["wall_s"] for key, run in ours.items()},
        "best_batch": best.batch,
        "best_experts": best.experts,
        **{key: _describe_ours(run) | compared[key] for key, run in ours.items()},
        "transformers": {
            **fastest_experts,
            "by_experts": by_experts,
            "cpu": {f"{arm.experts}, batch {arm.batch}": arm.cpu for arm in arms},
            "accuracy": control.evaluation.metrics,
            # What padding and batching alone change in transformers' own answers.
            "max_abs_ll_difference_between_arms": max(
                compare_answers(arm.evaluation.log_likelihoods, control.evaluation.log_likelihoods)[
                    "max_abs_ll_difference"
                ]
                for arm in arms
            ),
        },
    }


def compare_answers(ours: LogLikelihoods, theirs: LogLikelihoods) -> dict[str, Any]:
    """Compare which choice is picked, row by row; near ties, in either, are listed instead of counted."""
    near_ties: list[dict[str, Any]] = []
    disagreements: list[dict[str, Any]] = []
    largest = 0.0
    for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        largest = max(largest, *(abs(a - b) for a, b in zip(our, their, strict=True)))
        row = {
            "row": number,
            "margin": _margin(our),
            "transformers_margin": _margin(their),
            "same_pick": _pick(our) == _pick(their),
        }
        if min(row["margin"], row["transformers_margin"]) < NEAR_TIE:
            near_ties.append(row)
        elif not row["same_pick"]:
            disagreements.append(row)
    return {
        "disagreements": len(disagreements),
        "disagreeing_rows": disagreements,
        "near_ties": near_ties,
        "max_abs_ll_difference": largest,
    }


def _pick(log_likelihoods: Sequence[float]) -> int:
    return max(range(len(log_likelihoods)), key=log_likelihoods.__getitem__)


def _margin(log_likelihoods: Sequence[float]) -> float:
    first, second = sorted([*log_likelihoods, -math.inf], reverse=True)[:2]
    return first - second


def _describe_ours(run: dict[str, Any]) -> dict[str, Any]:
    return {
        "arm": run["arm"],
        "wall_s": run["wall_s"],
        "tokens": run["tokens"],
        "tokens_per_s": run["tokens_per_s"],
        "latency_p50_ms": run["latency_p50_ms"],
        "latency_p95_ms": run["latency_p95_ms"],
        "accuracy": run["accuracy"],
        # A question's share of its microbatch. Microbatches overlap: these need not sum up to the wall time.
        "split_ms": {
            "bs": run["bs_ms"],
            "waiting_for_devices": run["waiting_ms"],
            "wall": run["wall_s"] * 1e3 / run["questions"],
        },
        "device_ms": run["device_ms"],  # the slowest device of each block; part of it hides behind the shared experts
        "bytes_down": run["bytes_down"],
        "bytes_up": run["bytes_up"],
        "cpu": run["cpu"],
    }


def _torch_threads() -> int:
    import torch

    threads: int = torch.get_num_threads()
    return threads


def _cpu_uses(result: dict[str, Any]) -> list[dict[str, float | None]]:
    ours = [result[key]["cpu"] for key in result["speedup"]]
    return [*ours, *result["transformers"]["cpu"].values()]


def _print_tables(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("what", "wall s", "of the first"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    base = result["wdmoe"]["wall_s"]
    rows = [(result[key]["arm"], result[key]["wall_s"]) for key in result["speedup"]]
    rows += [
        (f"transformers, {experts}, batch {batch}", wall_s)
        for experts, walls in result["transformers"]["by_experts"].items()
        for batch, wall_s in walls.items()
    ]
    for what, wall_s in rows:
        table.add_row(what, f"{wall_s:.1f}", f"{wall_s / base:.2f}")
    console = Console(stderr=True)
    console.print(table)
    shares = [use["others_cpu_share"] for use in _cpu_uses(result) if use["others_cpu_share"] is not None]
    if shares and max(shares) > BUSY:
        console.print(f"others took up to {max(shares):.0%} of this machine's processors: take the times as hints")
    console.print(
        f"{result['rows']} rows, {result['disagreements']} answered otherwise, {len(result['near_ties'])} near ties; "
        f"largest difference of a log-likelihood {result['max_abs_ll_difference']:.1e}"
    )


if __name__ == "__main__":
    main()
