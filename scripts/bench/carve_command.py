"""What `wdmoe-export carve` costs and gives: wall time, peak memory, errors of the blocks, perplexity against the dense model.

    python scripts/bench/carve_command.py --data-dir DATA --json -

Carves SmolLM2-135M-Instruct (or `--model DENSE`) by a process of its own for each `--case TOPK:DISTIL`, on the first
19 twentieths of each file of DATA/corpus; `2:end-to-end` trains for `--steps`. Perplexity: transformers, float32, windows of 512 tokens out of the last
twentieths, each scored from its second token on. No evaluation row is read.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT)]

from scripts.bench._environment import CpuUse, environment, progress, write_json
from wdmoe.export.gguf_checkpoint import GgufCheckpoint, write_checkpoint
from wdmoe.export.smollm2 import default_cache_dir, source_gguf

_HELD_OUT = 0.05  # of each file, from its end
_REPORTED = ("active_share", "error_cut", "error", "dense_perplexity", "planned_perplexity", "trained_perplexity")
_COMMAND = "from wdmoe.export.cli import main; main()"


@click.command()
@click.option("--data-dir", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--model", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A dense checkpoint.")
@click.option("--case", "cases", multiple=True, default=["4:none", "4:layer", "2:none", "2:layer"], show_default=True)
@click.option("--experts", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--tokens", type=click.IntRange(min=1), default=32768, show_default=True, help="Of calibration.")
@click.option("--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of a text.")
@click.option("--windows", type=click.IntRange(min=1), default=24, show_default=True, help="To score.")
@click.option("--steps", type=click.IntRange(min=1), default=800, show_default=True, help="Of a training.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--scratch", type=click.Path(path_type=Path, file_okay=False), default=None, help="Where to work.")
@click.option("--json", "target", type=click.Path(dir_okay=False, allow_dash=True), required=True)
def main(
    data_dir: Path, model: Path | None, cases: tuple[str, ...], experts: int, tokens: int, window: int, windows: int,
    steps: int, threads: int, scratch: Path | None, target: str,
) -> None:  # fmt: skip
    """Carve and score; writes JSON to a file or (-) to stdout."""
    import torch

    torch.set_num_threads(threads)
    options = ["--experts", str(experts), "--tokens", str(tokens), "--window", str(window)]
    with tempfile.TemporaryDirectory(prefix="wdmoe-carve-", dir=scratch) as name:
        here = Path(name)
        dense = model or small_dense(here / "dense")
        files = split_corpus(data_dir / "corpus", here)
        if not files:
            raise click.BadParameter(f"no corpus/*.txt in {data_dir}", param_hint="--data-dir")
        texts = [path.with_suffix(".held-out").read_text(encoding="utf-8") for path in files]
        rows = held_out_windows(dense, texts, window, windows)
        dense_perplexity = perplexity(dense, rows)
        results = []
        for case in cases:
            top_k, distil = case.split(":")
            asked = [*options, "--top-k", top_k, "--distil", distil]
            asked += ["--steps", str(steps)] if distil == "end-to-end" else []
            done = carve(dense, files, asked, here / "moe", threads)
            score = perplexity(here / "moe", rows)
            for path in (here / "moe").iterdir():
                path.unlink()
            results.append({"top_k": int(top_k), "distil": distil, **done, "perplexity": score})
            results[-1]["perplexity_ratio"] = score / dense_perplexity
            progress(f"{case}: {results[-1]}")
    result = {
        "dense_perplexity": dense_perplexity, "cases": results, "scored_tokens": len(rows) * (window - 1),
        "calibration_tokens": tokens, "threads": threads, **environment(("numpy", "torch", "transformers")),
    }  # fmt: skip
    write_json(target, result)


def small_dense(folder: Path) -> Path:
    """Write SmolLM2-135M-Instruct, as the exporter gets it, as a dense checkpoint in float32."""
    folder.mkdir()
    with source_gguf(default_cache_dir(), progress) as gguf:
        checkpoint = GgufCheckpoint(gguf)
        write_checkpoint(folder, checkpoint.config(), dict(checkpoint.tensors()), checkpoint)
    return folder


def split_corpus(corpus: Path, here: Path) -> list[Path]:
    """Write the part of each file that may be fitted on, and beside it the held-out one."""
    files: list[Path] = []
    for path in sorted(corpus.glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        cut = int(len(text) * (1 - _HELD_OUT))
        files.append(here / path.name)
        files[-1].write_text(text[:cut], encoding="utf-8")
        files[-1].with_suffix(".held-out").write_text(text[cut:], encoding="utf-8")
    return files


def held_out_windows(folder: Path, texts: Sequence[str], window: int, count: int) -> Any:
    """Cut windows, [count, window], in turn out of all texts."""
    import torch
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    each = -(-count // len(texts))
    rows: list[list[int]] = []
    for text in texts:
        ids = tokenizer.encode(text[: each * window * 8], add_special_tokens=False).ids
        rows += [ids[start : start + window] for start in range(0, len(ids) - window + 1, window)][:each]
    return torch.tensor(rows[:count])


def perplexity(folder: Path, rows: Any) -> float:
    """Score windows with transformers."""
    import torch
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [F.cross_entropy(model(row[None]).logits[0, :-1], row[1:]).item() for row in rows]
    return math.exp(sum(losses) / len(losses))


def carve(dense: Path, files: Sequence[Path], options: Sequence[str], out: Path, threads: int) -> dict[str, Any]:
    """Run the command as a process; say what it took and what it reports."""
    line = [sys.executable, "-c", _COMMAND, "carve", "--model", str(dense), "--out", str(out), *options, "--json"]
    for path in files:
        line += ["--calibration", str(path)]
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    use, started_s = CpuUse(), time.perf_counter()
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env={**os.environ, **limits}) as process:
        assert process.stdout is not None
        report = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"carve ended with exit code {process.returncode}")
    made = json.loads(report)
    return {
        "wall_s": time.perf_counter() - started_s,
        "peak_rss_mb": usage.ru_maxrss / 1024,  # KiB on Linux
        **use.since(),
        **{name: made[name] for name in _REPORTED if name in made},
    }


if __name__ == "__main__":
    main()
