"""Whether the gates of the carved small model mean something, and what carving costs: perplexities on WikiText-2.

Convention: the file as one text without a BOS token, cut into windows of 1,024 tokens that do not overlap; every token
of a window but its first is scored; the mean runs over scored tokens. transformers on the CPU. Beside the dense model
and the carved one as it is, the carved one with its router tampered with:

- uniform: the chosen experts' weights made equal;
- fixed: the router ignored, in each block always the k experts that it chose most often, with equal weights;
- drop: each token's chosen expert of the smallest weight, or one of the chosen at random, left out; the weights of the
  others renormalised to the same sum.

Exit code 1 if a bar is missed.

    python scripts/bench/carve_quality.py --data-dir DATA --json -
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

sys.path.append(str(Path(__file__).parents[2]))
from scripts.bench._environment import environment, progress, write_json
from wdmoe.export.gguf_checkpoint import GgufCheckpoint, write_checkpoint
from wdmoe.export.smollm2 import default_cache_dir, smollm2_moe_checkpoint, source_gguf

WINDOW = 1024  # tokens
SEED = 0
LEAST_BARS = {"uniform_weights_ppl_ratio": 1.03, "fixed_experts_ppl_ratio": 1.3, "largest_over_smallest_weight": 2.0}
MOST_BARS = {"drop_least_over_drop_random": 0.5, "ppl_ratio": 1.15, "active_share": 2 / 3}

# Takes the block, the gate weights [tokens, k], in falling order, and the experts [tokens, k]; returns both anew.
Change = Callable[[int, Any, Any], tuple[Any, Any]]


@click.command()
@click.option("--data-dir", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--cache-dir", type=click.Path(file_okay=False, path_type=Path), default=default_cache_dir)
@click.option("--text", default="wikitext2/test.txt", show_default=True, help="The text, in the data folder.")
@click.option(
    "--model", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Another carved checkpoint."
)
@click.option("--dense", type=click.Path(exists=True, file_okay=False, path_type=Path), help="What it was carved from.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--limit", type=click.IntRange(min=1), help="Windows to score; all if not given.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--json", "target", type=click.Path(dir_okay=False, allow_dash=True), required=True)
def main(
    data_dir: Path,
    cache_dir: Path,
    text: str,
    model: Path | None,
    dense: Path | None,
    dtype: str,
    limit: int | None,
    threads: int,
    target: str,
) -> None:
    """Score the models and write figures and bars as JSON, to a file or (-) to stdout."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    path = data_dir / text
    if not path.is_file():
        raise click.BadParameter(f"no file {path}", param_hint="--data-dir")
    if (model is None) != (dense is None):
        raise click.UsageError("--model and --dense go together")

    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    folder = smollm2_moe_checkpoint(cache_dir, progress) if model is None else model
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(path.read_text("utf-8"), add_special_tokens=False)
    windows = [window for window in torch.tensor(ids.ids).split(WINDOW)[:limit] if len(window) > 1]
    with dense_folder(dense, cache_dir) as original:
        dense_loss = loss(load(original), windows, "dense")
        neurons = int(load(original).config.intermediate_size)
    carved = load(folder)
    result = {
        **figures(carved, windows, dense_loss),
        "active_share": active_neurons(carved.config) / neurons,
        "scored_tokens": sum(len(window) - 1 for window in windows),
        "convention": f"windows of {WINDOW}, no BOS, first token of each not scored, {dtype}, drops renormalised",
        "checkpoint": folder.name,
        "threads": threads,
        **environment(["torch", "transformers", "numpy", "gguf"]),
    }
    missed = [name for name, bar in LEAST_BARS.items() if result[name] < bar]
    missed += [name for name, bar in MOST_BARS.items() if result[name] > bar]
    write_json(target, result | {"bars": {"at_least": LEAST_BARS, "at_most": MOST_BARS}, "missed": missed})
    sys.exit(1 if missed else 0)


def figures(model: Any, windows: list[Any], dense_loss: float) -> dict[str, float]:
    """Score the carved model with its router as it is and tampered with."""
    import torch

    seen = Routing(len(model.model.layers), model.config.num_experts)
    top_k = model.config.num_experts_per_tok
    generator = torch.Generator().manual_seed(SEED)

    def fixed(block: int, weights: Any, _experts: Any) -> tuple[Any, Any]:
        most = seen.counts[block].topk(top_k).indices
        return torch.full_like(weights, 1 / top_k) * weights.sum(-1, keepdim=True), most.expand(len(weights), top_k)

    def without(places: Any, weights: Any) -> Any:
        kept = weights.scatter(-1, places[:, None], 0.0)
        return kept / kept.sum(-1, keepdim=True) * weights.sum(-1, keepdim=True)

    def random(_block: int, weights: Any, experts: Any) -> tuple[Any, Any]:
        return without(torch.randint(top_k, (len(weights),), generator=generator), weights), experts

    changes: dict[str, Change] = {
        "as it is": seen.note,
        "uniform": lambda _block, weights, experts: (weights.mean(-1, keepdim=True).expand_as(weights), experts),
        "fixed": fixed,
        "drop least": lambda _block, weights, experts: (without(weights.argmin(-1), weights), experts),
        "drop random": random,
    }
    losses: dict[str, float] = {}
    for name, change in changes.items():
        with tampered(model, change):
            losses[name] = loss(model, windows, name)
    plain = losses["as it is"]
    return {
        "dense_perplexity": math.exp(dense_loss),
        "carved_perplexity": math.exp(plain),
        "ppl_ratio": math.exp(plain - dense_loss),
        "uniform_weights_ppl_ratio": math.exp(losses["uniform"] - plain),
        "fixed_experts_ppl_ratio": math.exp(losses["fixed"] - plain),
        "drop_least_loss_increase_nats": losses["drop least"] - plain,
        "drop_random_loss_increase_nats": losses["drop random"] - plain,
        "drop_least_over_drop_random": (losses["drop least"] - plain) / (losses["drop random"] - plain),
        "largest_over_smallest_weight": seen.ratio_sum / seen.tokens,
        "largest_load_over_mean": float((seen.counts.amax(1) / seen.counts.float().mean(1)).max()),
    }


class Routing:
    """Counts what the router does while it is left as it is."""

    def __init__(self, blocks: int, experts: int) -> None:
        import torch

        self.counts = torch.zeros(blocks, experts, dtype=torch.int64)  # tokens that chose each expert
        self.ratio_sum = 0.0  # of largest over smallest chosen weight, over tokens and blocks
        self.tokens = 0  # times blocks

    def note(self, block: int, weights: Any, experts: Any) -> tuple[Any, Any]:
        """Count, and change nothing."""
        self.counts[block] += experts.flatten().bincount(minlength=self.counts.shape[1])
        # A weight below a millionth is nothing: one such token is not to carry the mean.
        self.ratio_sum += float((weights.amax(-1) / weights.amin(-1).clamp(min=1e-6)).clamp(max=100).sum())
        self.tokens += len(weights)
        return weights, experts


@contextmanager
def tampered(model: Any, change: Change) -> Iterator[None]:
    """Put a change behind the router of every block."""

    def hook(block: int) -> Callable[[Any, Any, Any], Any]:
        def changed(_module: Any, _inputs: Any, output: Any) -> Any:
            logits, weights, experts = output
            return (logits, *change(block, weights, experts))

        return changed

    hooks = [layer.mlp.gate.register_forward_hook(hook(block)) for block, layer in enumerate(model.model.layers)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def loss(model: Any, windows: list[Any], name: str) -> float:
    """Return the mean cross entropy over all scored tokens, in nats."""
    import torch
    from torch.nn import functional as F

    total, scored = 0.0, 0
    with torch.no_grad():
        for index, window in enumerate(windows):
            logits = model(window[None]).logits[0, :-1].float()
            total += F.cross_entropy(logits, window[1:], reduction="sum").item()
            scored += len(window) - 1
            if index % 20 == 0:
                progress(f"{name}: window {index + 1} of {len(windows)}, perplexity {math.exp(total / scored):.2f}")
    return total / scored


def active_neurons(config: Any) -> int:
    """Return how many neurons of a block one token uses."""
    return int(config.shared_expert_intermediate_size + config.num_experts_per_tok * config.moe_intermediate_size)


@contextmanager
def dense_folder(given: Path | None, cache_dir: Path) -> Iterator[Path]:
    """Give the folder of the dense checkpoint, made for the time being if none is given."""
    if given is not None:
        yield given
        return
    with source_gguf(cache_dir, progress) as gguf, tempfile.TemporaryDirectory() as folder:
        source = GgufCheckpoint(gguf)
        write_checkpoint(Path(folder), source.config(), dict(source.tensors()), source)
        yield Path(folder)


if __name__ == "__main__":
    main()
