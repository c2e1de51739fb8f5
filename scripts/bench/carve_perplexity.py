"""Perplexity on WikiText-2 of SmolLM2-135M-Instruct and of the Mixture-of-Experts model carved from it.

Convention: the file as one text without a BOS token, cut into windows of 1,024 tokens that do not overlap; every token
of a window but its first is scored; the mean runs over scored tokens. transformers, float32, on the CPU.

    python scripts/bench/carve_perplexity.py --data-dir DATA --json -
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from wdmoe.export.gguf_checkpoint import GgufCheckpoint, write_checkpoint
from wdmoe.export.smollm2 import default_cache_dir, smollm2_moe_checkpoint, source_gguf

WINDOW = 1024  # tokens


@click.command()
@click.option("--data-dir", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--cache-dir", type=click.Path(file_okay=False, path_type=Path), default=default_cache_dir)
@click.option("--json", "target", type=click.Path(dir_okay=False, allow_dash=True), required=True)
@click.option("--limit", type=click.IntRange(min=1), help="Windows to score; all if not given.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
def main(data_dir: Path, cache_dir: Path, target: str, limit: int | None, threads: int) -> None:
    """Score both models and write the perplexities and their ratio as JSON, to a file or (-) to stdout."""
    import torch

    torch.set_num_threads(threads)
    text_path = data_dir / "wikitext2" / "test.txt"
    if not text_path.is_file():
        raise click.BadParameter(f"no file {text_path}", param_hint="--data-dir")
    text = text_path.read_text(encoding="utf-8")
    carved = smollm2_moe_checkpoint(cache_dir, progress)
    with source_gguf(cache_dir, progress) as gguf, tempfile.TemporaryDirectory() as dense:
        checkpoint = GgufCheckpoint(gguf)
        write_checkpoint(Path(dense), checkpoint.config(), dict(checkpoint.tensors()), checkpoint)
        dense_score = score(Path(dense), text, limit)
    carved_score = score(carved, text, limit)
    result = {
        "dense_perplexity": dense_score["perplexity"],
        "carved_perplexity": carved_score["perplexity"],
        "ratio": carved_score["perplexity"] / dense_score["perplexity"],
        "scored_tokens": carved_score["scored_tokens"],
        "rows": len(text.splitlines()),
        "window_tokens": WINDOW,
        "convention": "non-overlapping windows, no BOS, first token of each window not scored, float32",
        "checkpoint": carved.name,
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy", "gguf")}
        | {"python": platform.python_version()},
        "threads": threads,
        "command": " ".join(["python", *sys.argv]),
    }
    with click.open_file(target, "w", encoding="utf-8") as file:
        file.write(json.dumps(result, indent=2) + "\n")


def score(folder: Path, text: str, limit: int | None) -> dict[str, Any]:
    """Return the perplexity of the checkpoint in a folder, and over how many tokens."""
    import torch
    from tokenizers import Tokenizer
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM

    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    windows = torch.tensor(ids).split(WINDOW)[:limit]
    total, scored = 0.0, 0
    with torch.no_grad():
        for index, window in enumerate(windows):
            logits = model(window[None]).logits[0, :-1]
            total += F.cross_entropy(logits, window[1:], reduction="sum").item()
            scored += len(window) - 1
            if index % 20 == 0:
                progress(f"{folder.name}: window {index + 1} of {len(windows)}")
    return {"perplexity": math.exp(total / scored), "scored_tokens": scored}


def hardware() -> str:
    """Return the processor's name and how many cores of it there are."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def progress(line: str) -> None:
    click.echo(line, err=True)


if __name__ == "__main__":
    main()
