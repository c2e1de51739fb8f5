"""All ten data sets through four device processes, exact and another policy, against lm-eval's own transformers model.

    python scripts/bench/ten_sets.py --data-dir DIR --rows 300 --json FILE

Ours is `wdmoe-bs run --wire fp32`; transformers answers the same rows of the same checkpoint, in float32. On every set
each row must be answered as transformers answers it; only where two choices' log-likelihoods differ by less than 1e-3
may a rounding decide, and those rows are listed. The first rows are answered by transformers in float64, too: what
float32 itself costs it is the reference, and the median of our error over the median of that must be at most 2. (The
median, because a router near-tie that falls the other way moves a row by far more than rounding does, in transformers as
in ours; `jumps` counts such rows.) Perplexities must agree to 1e-4. With a FILE, what is done is kept and the same command goes on from there.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
from processes import command, device_processes, exit_on_sigterm, free_address

from scripts.bench._environment import environment, progress, write_json
from scripts.bench.against_transformers import NEAR_TIE, compare_answers
from wdmoe.bs.evaluation import PERPLEXITIES, Evaluation, LoadedTask, evaluate_lm, load_task
from wdmoe.bs.harness import MAX_WINDOW
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.export.models import SMALL_MODEL, find_checkpoint

DATASETS = (
    "piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande", "openbookqa", "siqa", "copa", "lambada",
    "wikitext2",
)  # fmt: skip
WHOLE_TEXTS = ("wikitext2",)  # rows are documents of thousands of tokens
MAX_RATIO = 2.0
MAX_PERPLEXITY_DIFFERENCE = 1e-4  # relative
JUMP = 1e-2  # of a log-likelihood: no rounding does that by itself


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--json", "target", type=click.Path(path_type=Path, dir_okay=False), required=True)
@click.option("--model", default=SMALL_MODEL, show_default=True, help="As wdmoe-export takes it.")
@click.option("--dataset", "datasets", multiple=True, default=DATASETS, show_default=True)
@click.option("--policy", default="wlr", show_default=True, help="What runs beside exact.")
@click.option("--rows", type=click.IntRange(min=1), help="Only the first rows of each set.  [default: all]")
@click.option("--documents", type=click.IntRange(min=1), default=10, show_default=True, help="As --rows, of wikitext2.")
@click.option("--double-rows", type=click.IntRange(min=0), default=25, show_default=True, help="In float64, too.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True)
def main(
    data_dir: Path,
    target: Path,
    model: str,
    datasets: tuple[str, ...],
    policy: str,
    rows: int | None,
    documents: int,
    double_rows: int,
    batch: int,
) -> None:
    """Compare answers set by set; exit code 1 if a bar is missed."""
    exit_on_sigterm()
    checkpoint, name = find_checkpoint(model, progress)
    limits = {dataset: documents if dataset in WHOLE_TEXTS else rows for dataset in datasets}
    theirs = target.with_name(target.name + ".transformers")  # the finished sets of earlier runs, by their rows
    ours = run_wdmoe(checkpoint, name, data_dir, limits, policy, batch, target)
    sets: dict[str, dict[str, Any]] = {}
    for dataset, limit in limits.items():
        task = load_task(dataset, data_dir)
        single = answered(theirs, checkpoint, task, limit, "float32", batch)
        first = min(double_rows, task.count(limit)) if dataset not in WHOLE_TEXTS else min(double_rows, 1)
        double = answered(theirs, checkpoint, task, first, "float64", batch) if first else None
        by_policy = {result["policy"]: result for result in ours if result["dataset"] == dataset}
        sets[dataset] = describe(by_policy, single, double)
        progress(f"{dataset}: {sets[dataset]['disagreements']} of {sets[dataset]['rows']} answered otherwise")
    missed = [
        f"{dataset}: {bar}"
        for dataset, found in sets.items()
        for bar, is_missed in (
            (f"disagreements {found['disagreements']}", found["disagreements"] > 0),
            (
                f"perplexity_difference {found['perplexity_difference']}",
                (found["perplexity_difference"] or 0) > MAX_PERPLEXITY_DIFFERENCE,
            ),
            (f"error_over_reference {found['error_over_reference']}", (found["error_over_reference"] or 0) > MAX_RATIO),
        )
        if is_missed
    ]
    result = {
        "model": name,
        "policy": policy,
        "batch": batch,
        "disagreements": sum(found["disagreements"] for found in sets.values()),
        "error_over_reference": max((found["error_over_reference"] or 0.0) for found in sets.values()),
        "bars": {
            "disagreements": 0,
            "near_tie_below": NEAR_TIE,
            "perplexity_difference": MAX_PERPLEXITY_DIFFERENCE,
            "error_over_reference": MAX_RATIO,
        },
        "passed": not missed,
        "sets": sets,
        **environment(("lm-eval", "torch", "transformers", "numpy", "onnxruntime", "pyzmq")),
    }
    print_table(sets, policy)
    write_json(str(target), result)
    progress(f"missed: {'; '.join(missed)}" if missed else "all bars are met")
    sys.exit(1 if missed else 0)


def run_wdmoe(
    checkpoint: Path,
    name: str,
    data_dir: Path,
    limits: dict[str, int | None],
    policy: str,
    batch: int,
    target: Path,
) -> list[dict[str, Any]]:
    """Run exact and the policy on every set; returns the results in the JSON of wdmoe-bs."""
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="wdmoe-sets-") as scratch:
        config = ExportConfig(Path(scratch) / "bundle", devices=4)
        export_bundle(plan_export(checkpoint, name, config), config)
        address = free_address()
        with device_processes(config.out, address):
            for limit in sorted(set(limits.values()), key=str):
                out = target.with_name(f"{target.name}.wdmoe-{limit or 'all'}")
                options: list[object] = ["--bundle", config.out, "--listen", address, "--data-dir", data_dir]
                options += ["--policy", "exact", "--policy", policy, "--wire", "fp32", "--batch", batch, "--json", out]
                options += ["--limit", limit] if limit is not None else []
                for dataset in (dataset for dataset, own in limits.items() if own == limit):
                    options += ["--dataset", dataset]
                line = command("wdmoe-bs", "run", *options)
                if (code := subprocess.run(line, stdout=sys.stderr, check=False).returncode) != 0:
                    raise click.ClickException(f"wdmoe-bs ended with exit code {code}")
                results += json.loads(out.read_text())["results"]
    return results


def answered(
    kept: Path, checkpoint: Path, task: LoadedTask, limit: int | None, dtype: str, batch: int
) -> dict[str, Any]:
    """Let transformers answer, unless an earlier run kept the answers."""
    known: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    key = f"{task.dataset} {task.digest(limit)} {dtype}"
    key += f" {MAX_WINDOW}" if task.dataset in WHOLE_TEXTS else ""
    if key not in known:
        progress(f"transformers, {dtype}: {task.dataset}, {task.count(limit)} rows")
        found = run_transformers(checkpoint, task, limit, dtype, 1 if task.dataset in WHOLE_TEXTS else batch)
        known[key] = {
            "metrics": found.metrics, "log_likelihoods": found.log_likelihoods, "correct": found.correct.get("acc"),
        }  # fmt: skip
        partial = kept.with_name(kept.name + ".partial")
        partial.write_text(json.dumps(known))
        partial.replace(kept)
    result: dict[str, Any] = known[key]
    return result


def run_transformers(checkpoint: Path, task: LoadedTask, limit: int | None, dtype: str, batch: int) -> Evaluation:
    """Answer a set with lm-eval's own model class."""
    from lm_eval.models.huggingface import HFLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    experts = "grouped_mm" if dtype == "float32" else "eager"
    lm = HFLM(
        str(checkpoint),
        dtype=dtype,
        device="cpu",
        batch_size=batch,
        # Whole texts are cut into windows of this many tokens, here as there.
        max_length=MAX_WINDOW if task.dataset in WHOLE_TEXTS else None,
        experts_implementation=experts,
    )
    evaluation = evaluate_lm(lm, task, limit=limit)
    del lm
    gc.collect()
    return evaluation


def describe(ours: dict[str, dict[str, Any]], single: dict[str, Any], double: dict[str, Any] | None) -> dict[str, Any]:
    """Put exact beside transformers, and the policy beside exact."""
    exact = ours["exact"]
    (other,) = [result for name, result in ours.items() if name != "exact"]
    compared = compare_answers(exact["log_likelihoods"], single["log_likelihoods"])
    if len(exact["log_likelihoods"][0]) == 1 and "acc" in exact["correct"]:  # one continuation: was it the likeliest?
        pairs = zip(exact["correct"]["acc"], single["correct"], strict=True)
        differ = [{"row": row} for row, (our, their) in enumerate(pairs) if our != their]
        compared |= {"disagreements": len(differ), "disagreeing_rows": differ}
    our_values, their_values = (flat(run["log_likelihoods"]) for run in (exact, single))
    perplexity = next((m for m in PERPLEXITIES if m in exact["metrics"]), None)
    ratio = None
    if double is not None:
        true = flat(double["log_likelihoods"])
        ours_off, theirs_off = (np.median(np.abs(v[: len(true)] - true)) for v in (our_values, their_values))
        ratio = float(ours_off / theirs_off)
    return {
        "rows": exact["rows"],
        "variant": exact["variant"],
        "metrics": {"transformers": single["metrics"], "exact": exact["metrics"], "policy": other["metrics"]},
        "stderr": exact["stderr"],
        **compared,
        "median_abs_ll_difference": float(np.median(np.abs(our_values - their_values))),
        "perplexity_difference": None
        if perplexity is None
        else abs(exact["metrics"][perplexity] / single["metrics"][perplexity] - 1),
        "jumps": int((np.abs(our_values - their_values) > JUMP).sum()),
        "error_over_reference": ratio,
        "policy_minus_exact_points": other["accuracy_minus_exact_points"],
        "policy_minus_exact_stderr_points": other["accuracy_minus_exact_stderr_points"],
        "perplexity_over_exact": other["perplexity_over_exact"],
        "dropped_share": other["dropped_share"],
        "bytes": {"exact": exact["bytes_down"] + exact["bytes_up"], "policy": other["bytes_down"] + other["bytes_up"]},
    }


def flat(log_likelihoods: Sequence[Sequence[float]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """All choices of all rows: [sum of choices]."""
    return np.array([value for row in log_likelihoods for value in row])


def print_table(sets: dict[str, dict[str, Any]], policy: str) -> None:
    """Show the table of the sets on stderr."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for heading in ("set", "rows", "metric", "transf.", "exact", policy, "differ", "max ll", "ratio"):
        table.add_column(heading, justify="left" if heading in ("set", "metric") else "right")
    for dataset, found in sets.items():
        metrics = found["metrics"]
        metric = next((m for m in ("acc", "word_perplexity", "perplexity") if m in metrics["exact"]), "?")
        values = [metrics[who][metric] for who in ("transformers", "exact", "policy")]
        table.add_row(
            dataset,
            f"{found['rows']:,}",
            metric.removeprefix("word_"),
            *(f"{value:.4f}" if metric == "acc" else f"{value:.3f}" for value in values),
            str(found["disagreements"]),
            f"{found['max_abs_ll_difference']:.0e}",
            "" if found["error_over_reference"] is None else f"{found['error_over_reference']:.2f}",
        )
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
