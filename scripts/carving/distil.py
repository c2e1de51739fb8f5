"""Trains a carved student end to end: towards the dense model's next tokens, and the text's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from scripts.carving.dense import Dense, dense_block, rms_norm, rope
from scripts.carving.student import Student

BATCH = 4  # windows
CHANGE_RATE = 1.5e-3  # of the low-rank changes; half of it for those that do not start at 0
SCALE_RATE = 3e-3  # a fifth of it for the norms
ROUTER_RATE = 4e-3  # times the rms of the block's router
WARM_UP_STEPS = 20
SCORED_SHARE = 4  # one position in so many has its logits compared
TEXT_WEIGHT = 1.0  # of the cross entropy with the text, beside the KL divergence from the dense model
HIDDEN_WEIGHT = 0.2  # of the last hidden state's relative squared error
TIE_WEIGHT = 0.5
LOAD_WEIGHT = 0.02
SAVE_EVERY_STEPS = 50


class NextToken(torch.autograd.Function):
    """KL divergence from the teacher and cross entropy with the text, mean over rows, in few passes over the logits."""

    @staticmethod
    def forward(
        ctx: Any, own: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take hidden states [rows, hidden] of both and token ids [rows]; return the loss and its KL part."""
        divergence = entropy = 0.0
        gradients = []
        for mine, theirs, ids in zip(own.split(256), teacher.split(256), text.split(256), strict=True):
            wanted = F.linear(theirs, head).float().log_softmax(-1)
            got = F.linear(mine, head).float().log_softmax(-1)
            entropy -= got.gather(1, ids[:, None]).sum().item()
            odds = wanted.exp()
            divergence += (odds * wanted.sub_(got)).sum().item()
            gradient = got.exp_().mul_(1 + TEXT_WEIGHT).sub_(odds)
            gradient.scatter_add_(1, ids[:, None], torch.full((len(ids), 1), -TEXT_WEIGHT))
            gradients.append((gradient.bfloat16() @ head).float())
        ctx.save_for_backward(torch.cat(gradients) / len(own))
        parts = torch.tensor([divergence, entropy]) / len(own)
        return parts[0] + TEXT_WEIGHT * parts[1], parts[0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient by `own`."""
        return (ctx.saved_tensors[0] * gradients[0]).bfloat16(), None, None, None


def distil(
    student: Student, windows: torch.Tensor, steps: int, state: Path | None, report: Callable[[str], None]
) -> None:
    """Train all of the student; goes on from the file `state` where one is, and keeps it up to date."""
    optimizer = torch.optim.Adam(list(_groups(student)), betas=(0.9, 0.98), fused=True)
    first = 0
    if state is not None and state.exists():
        kept = torch.load(state, weights_only=True)
        student.load_state_dict(kept["student"])
        optimizer.load_state_dict(kept["optimizer"])
        first = kept["step"]
    teacher = torch.compile(dense_block, dynamic=False)
    batches = windows.split(BATCH)
    started = time.perf_counter()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = group["full"] * min(1.0, (step + 1) / WARM_UP_STEPS) * max(0.02, 1 - step / steps)
        batch = batches[step % len(batches)]
        with torch.no_grad():
            wanted = last_hidden(student.dense, batch, teacher)
        got, ties, loads = student(batch)
        scored = slice(step % SCORED_SHARE, -1, SCORED_SHARE)
        text = batch[:, 1:][:, step % SCORED_SHARE :: SCORED_SHARE].flatten()
        loss, divergence = NextToken.apply(
            got[:, scored].flatten(0, 1), wanted[:, scored].flatten(0, 1), student.dense.embedding, text
        )
        apart = ((got.float() - wanted.float()).square().sum(-1) / wanted.float().square().sum(-1)).mean()
        optimizer.zero_grad()
        (loss + HIDDEN_WEIGHT * apart + TIE_WEIGHT * ties + LOAD_WEIGHT * loads).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 9 or step == steps - 1:
            seconds = time.perf_counter() - started
            report(f"step {step + 1}: KL {divergence.item():.3f}, near ties {ties.item():.4f}, {seconds:.0f} s")
        if state is not None and ((step + 1) % SAVE_EVERY_STEPS == 0 or step == steps - 1):
            part = state.with_name(state.name + ".part")
            kept = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(kept, part)
            part.replace(state)


def last_hidden(model: Dense, batch: torch.Tensor, block: Callable[..., torch.Tensor] = dense_block) -> torch.Tensor:
    """Return the dense model's normalised last hidden state, [batch, tokens, hidden]."""
    rows = F.embedding(batch, model.embedding).float()
    cos, sin = rope(model, batch.shape[1])
    for weights in model.blocks:
        rows = block(rows, weights, cos, sin, model.eps, model.heads, model.kv_heads)
    return rms_norm(rows, model.norm, model.eps)


def perplexity(hidden: Callable[[torch.Tensor], torch.Tensor], head: torch.Tensor, windows: torch.Tensor) -> float:
    """Return the perplexity of the model whose last hidden state is given, each window from its second token on."""
    losses = []
    with torch.no_grad():
        for batch in windows.split(BATCH):
            logits = F.linear(hidden(batch)[:, :-1], head).flatten(0, 1).float()
            losses.append(F.cross_entropy(logits, batch[:, 1:].flatten()).item())
    return math.exp(sum(losses) / len(losses))


def _groups(student: Student) -> Iterator[dict[str, Any]]:
    def group(parameters: list[Any], rate: float) -> dict[str, Any]:
        return {"params": parameters, "lr": rate, "full": rate}

    blocks = list(student.blocks)
    zero = [own.into[name] for own in blocks for name in own.into if name != "down"]
    zero += [own.out[name] for own in blocks for name in own.out if name != "down"]
    yield group(zero, CHANGE_RATE)
    fitted = [part for own in blocks for part in (own.into["down"], own.out["down"], own.expert_into, own.expert_out)]
    yield group(fitted, CHANGE_RATE / 2)
    yield group([part for own in blocks for part in (own.scales, own.shared)], SCALE_RATE)
    yield group([part for own in blocks for part in (own.input_norm, own.ffn_norm)] + [student.norm], SCALE_RATE / 5)
    for own in blocks:
        yield group([own.router], ROUTER_RATE * own.router.detach().square().mean().sqrt().item())
