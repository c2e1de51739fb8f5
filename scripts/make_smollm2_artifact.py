"""Makes export/data/smollm2-moe.safetensors: how to carve SmolLM2-135M-Instruct into a Mixture-of-Experts model.

The dense weights are never touched: the artefact holds, per block, the order of the neurons, the router and one output
scale per neuron. Plans come from calibration text (`wdmoe.export.carve.plan_block`); then all routers and scales are
trained together against the dense model's next-token distribution. Reads the corpus only: the last twentieth of each
file is held out to judge by, and no evaluation row is read.

    python scripts/make_smollm2_artifact.py --data-dir DATA
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from wdmoe.export.carve import BlockPlan, CarveShape, FfnWeights, plan_block
from wdmoe.export.carve_artefact import CarveArtefact, write_artefact
from wdmoe.export.gguf_checkpoint import GgufCheckpoint, write_checkpoint
from wdmoe.export.smollm2 import ARTEFACT, GGUF_SHA256, default_cache_dir, source_gguf

SHAPE = CarveShape(shared=768, experts=8, expert_neurons=96, experts_per_token=4)
WINDOW = 512  # tokens
BATCH = 4  # windows
HELD_OUT_SHARE = 0.05  # of each corpus file, from its end
HELD_OUT_WINDOWS = 16
CALIBRATION_WINDOWS = 32
PLAN_ROWS = 8192  # rows that a plan is made from
# Routers bear small steps only, while the scales stand at 1. With routers of rms 0.004, perplexity of 12 held-out windows
# after 25 steps, 33.6 at the start: 31.1 with these, 32.5 with a third of these, 33.1 with ten times the router's and a
# tenth of the scales' rate, 35.2 with a hundred times the router's. Training block by block against the dense block's
# output (3 epochs at rates of 1e-4 and 3e-4) made it worse, 34.7 to 37.9 on 32 windows.
ROUTER_RATE = 7.5e-3  # times the rms of the block's router
SCALE_RATE = 1e-2
WANTED_MARGIN = 0.02  # in gate logits; a smaller one counts as a near tie, which training is to move apart
TIE_WEIGHT = 1.5
TIE = 1e-5  # a margin that rounding may turn round; the share of tokens with one is reported
SCORED_SHARE = 4  # one position in so many has its logits compared; the head over all of them takes half the time


class CarvedFfn(nn.Module):
    """A carved block for training: every neuron is computed, those of unchosen experts are multiplied by zero."""

    def __init__(self, weights: FfnWeights, plan: BlockPlan, dtype: torch.dtype) -> None:
        super().__init__()
        order = plan.permutation
        self.register_buffer("gate", torch.tensor(weights.gate[order], dtype=dtype))
        self.register_buffer("up", torch.tensor(weights.up[order], dtype=dtype))
        self.register_buffer("down", torch.tensor(weights.down[:, order], dtype=dtype))
        self.permutation = order
        self.router = nn.Parameter(torch.tensor(plan.router))
        self.scales = nn.Parameter(torch.tensor(plan.scales))
        self.margins = torch.empty(0)  # of the last call: by how much the last chosen logit beats the next, [...]

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the block's output for rows [..., hidden]."""
        logits = F.linear(rows.float(), self.router)
        best = logits.topk(SHAPE.experts_per_token + 1, dim=-1)
        self.margins = best.values[..., -2] - best.values[..., -1]
        weights = torch.zeros_like(logits).scatter(-1, best.indices[..., :-1], best.values[..., :-1].softmax(dim=-1))
        factors = (weights * SHAPE.experts_per_token).repeat_interleave(SHAPE.expert_neurons, dim=-1)
        factors = F.pad(factors, (SHAPE.shared, 0), value=1.0) * self.scales
        activations = F.silu(F.linear(rows, self.gate)) * F.linear(rows, self.up)
        return F.linear(activations * factors.to(rows.dtype), self.down)

    def plan(self) -> BlockPlan:
        """Return the plan as trained."""
        return BlockPlan(self.permutation, self.router.detach().numpy(), self.scales.detach().numpy())


@click.command()
@click.option("--data-dir", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=ARTEFACT, show_default=True)
@click.option("--cache-dir", type=click.Path(file_okay=False, path_type=Path), default=default_cache_dir)
@click.option("--steps", type=click.IntRange(min=0), default=120, show_default=True, help="Training steps.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
def main(data_dir: Path, out: Path, cache_dir: Path, steps: int, seed: int, threads: int) -> None:
    """Plan, train and write the artefact; prints held-out perplexities of dense and carved, and the share of near ties."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model, tokenizer = load_dense(cache_dir)
    windows, held_out = corpus_windows(data_dir, tokenizer, torch.Generator().manual_seed(seed))
    click.echo(f"{len(windows)} windows of {WINDOW} tokens to train on", err=True)
    student = carve(model, windows[:CALIBRATION_WINDOWS], seed)
    before = perplexity(student, held_out)
    click.echo(f"held-out perplexity: dense {perplexity(model, held_out):.2f}, carved {before:.2f}", err=True)
    distil(model, student, windows[CALIBRATION_WINDOWS:], steps)
    click.echo(f"held-out perplexity: trained {perplexity(student, held_out):.2f}", err=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_artefact(out, CarveArtefact(SHAPE, tuple(layer.mlp.plan() for layer in student.model.layers)), GGUF_SHA256)
    click.echo(f"{out}: {out.stat().st_size:,} bytes", err=True)
    click.echo(f"held-out tokens with a gate logit margin below {TIE}: {tie_share(student, held_out):.2%}", err=True)


def load_dense(cache_dir: Path) -> tuple[Any, Any]:
    """Return the dense model, frozen and in bfloat16, and its tokenizer."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    def report(line: str) -> None:
        click.echo(line, err=True)

    with source_gguf(cache_dir, report) as gguf, tempfile.TemporaryDirectory() as folder:
        dense = GgufCheckpoint(gguf)
        write_checkpoint(Path(folder), dense.config(), dict(dense.tensors()), dense)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return model.eval().requires_grad_(False), Tokenizer.from_file(f"{folder}/tokenizer.json")


def corpus_windows(data_dir: Path, tokenizer: Any, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return windows of tokens, [n, WINDOW] each, to train on and held out; from all files, shuffled."""
    parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for path in sorted((data_dir / "corpus").glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        cut = int(len(text) * (1 - HELD_OUT_SHARE))
        for piece, windows in zip((text[:cut], text[cut:]), parts, strict=True):
            ids = torch.tensor(tokenizer.encode(piece, add_special_tokens=False).ids)
            windows.append(ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW))
    if not parts[0]:
        raise click.BadParameter(f"no corpus/*.txt in {data_dir}", param_hint="--data-dir")
    train, held_out = (torch.cat(windows) for windows in parts)
    train = train[torch.randperm(len(train), generator=generator)]
    return train, held_out[torch.randperm(len(held_out), generator=generator)][:HELD_OUT_WINDOWS]


def ffn_inputs(model: Any, windows: torch.Tensor) -> list[torch.Tensor]:
    """Return what the feed-forward block of each layer sees for the windows, [tokens, hidden] each."""
    seen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]

    def keep(rows: list[torch.Tensor]) -> Any:
        return lambda _module, args: rows.append(args[0].flatten(0, 1).clone())

    layers = zip(model.model.layers, seen, strict=True)
    hooks = [layer.mlp.register_forward_pre_hook(keep(rows)) for layer, rows in layers]
    with torch.no_grad():
        for batch in windows.split(BATCH):
            model.model(batch)
    for hook in hooks:
        hook.remove()
    return [torch.cat(rows) for rows in seen]


def carve(model: Any, windows: torch.Tensor, seed: int) -> Any:
    """Return a copy of the model whose feed-forward blocks are carved, not trained yet."""
    student = copy.deepcopy(model)
    for index, rows in enumerate(ffn_inputs(model, windows)):
        dense = model.model.layers[index].mlp
        weights = FfnWeights(
            *(getattr(dense, f"{name}_proj").weight.float().numpy() for name in ("gate", "up", "down"))
        )
        rng = np.random.default_rng([seed, index])
        some = rng.choice(len(rows), size=min(PLAN_ROWS, len(rows)), replace=False)
        plan = plan_block(weights, rows[some].float().numpy(), SHAPE, rng)
        student.model.layers[index].mlp = CarvedFfn(weights, plan, rows.dtype)
        click.echo(f"block {index} planned", err=True)
    return student


def distil(model: Any, student: Any, windows: torch.Tensor, steps: int) -> None:
    """Train all routers and scales together, so that the student's next-token distribution nears the model's.

    Margins below `WANTED_MARGIN` cost as well, so that few choices are left to rounding.
    """
    blocks = [layer.mlp for layer in student.model.layers]
    groups: list[dict[str, Any]] = [{"params": [block.scales for block in blocks], "lr": SCALE_RATE}]
    for block in blocks:
        size = block.router.detach().square().mean().sqrt().item()
        groups.append({"params": [block.router], "lr": ROUTER_RATE * size})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    started = time.perf_counter()
    batches = windows.split(BATCH)
    for step in range(steps):
        batch = batches[step % len(batches)]
        scored = slice(step % SCORED_SHARE, None, SCORED_SHARE)
        with torch.no_grad():
            wanted = log_probabilities(model, batch, scored)
        got = log_probabilities(student, batch, scored)
        loss = F.kl_div(got, wanted, reduction="batchmean", log_target=True)
        near_ties = torch.stack([F.relu(1 - block.margins / WANTED_MARGIN).mean() for block in blocks]).mean()
        optimizer.zero_grad()
        (loss + TIE_WEIGHT * near_ties).backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == steps - 1:
            seconds = time.perf_counter() - started
            click.echo(
                f"step {step}: KL {loss.item():.4f}, near ties {near_ties.item():.4f}, {seconds:.0f} s", err=True
            )


def log_probabilities(model: Any, batch: torch.Tensor, scored: slice) -> torch.Tensor:
    """Return the log-probabilities of the next token at some positions of each window, [positions, vocabulary]."""
    hidden = model.model(batch).last_hidden_state[:, scored]
    return F.log_softmax(model.lm_head(hidden).flatten(0, 1).float(), dim=-1)


def perplexity(model: Any, windows: torch.Tensor) -> float:
    """Return the perplexity over windows, each scored from its second token on."""
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(batch).logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten()).item()
            for batch in windows.split(BATCH)
        ]
    return math.exp(sum(losses) / len(losses))


def tie_share(student: Any, windows: torch.Tensor) -> float:
    """Return the share of tokens that have, in any block, a margin below `TIE`; leaves the student in float32."""
    blocks = [layer.mlp for layer in student.float().model.layers]
    ties = 0
    with torch.no_grad():
        for batch in windows.split(BATCH):
            student.model(batch)
            smallest = torch.stack([block.margins for block in blocks]).amin(dim=0)
            ties += int((smallest < TIE).sum())
    return ties / int(windows.numel())


if __name__ == "__main__":
    main()
