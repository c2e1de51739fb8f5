"""Trains a carved student end to end: towards the dense model's next tokens, and the text's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from wdmoe.export.training.planning import LOGIT_ROWS
from wdmoe.export.training.student import Student
from wdmoe.export.training.torch_dense import dense_block, last_hidden
from wdmoe.runtime.errors import CheckpointError

# Beside the rate of the low-rank changes, `rate`. Those that do not start at 0 have half of it.
_SCALE_FACTOR = 2.0  # a fifth of it for the norms
_ROUTER_FACTOR = 8 / 3  # times the rms of the block's router
_LAST_FACTOR = 0.02  # rates fall from step to step, down to this
_WARM_UP_STEPS = 20
_SCORED_SHARE = 4  # one position in so many has its logits compared
_TEXT_WEIGHT = 1.0  # of the cross entropy with the text, beside the KL divergence from the dense model
_HIDDEN_WEIGHT = 0.2  # of the last hidden state's relative squared error
_TIE_WEIGHT = 0.5
_LOAD_WEIGHT = 0.02


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How long, and how fast."""

    steps: int = 800
    batch: int = 4  # windows of a step
    rate: float = 1.5e-3  # of the low-rank changes; the others follow it


@dataclass(frozen=True, slots=True)
class Step:
    """What a finished step measured."""

    number: int  # from 1
    loss: float  # KL divergence and cross entropy, nats a token
    divergence: float  # KL from the dense model, nats a token
    ties: float  # near ties, see `Student.forward`


class Keeper(Protocol):
    """What keeps the training, so that it can go on."""

    def load(self) -> tuple[int, dict[str, torch.Tensor]]:
        """Return the number of finished steps and the tensors kept then."""

    def keep(self, step: int, tensors: Callable[[], dict[str, torch.Tensor]]) -> None:
        """Be told that so many steps are finished; asks for the tensors if it wants to keep them."""


class NextToken(torch.autograd.Function):
    """KL divergence from the teacher and cross entropy with the text, mean over rows, in few passes over the logits."""

    @staticmethod
    def forward(
        ctx: Any, own: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take hidden states [rows, hidden] of both and token ids [rows]; return the loss and its KL part."""
        divergence = entropy = 0.0
        gradients = []
        parts = (values.split(LOGIT_ROWS) for values in (own, teacher, text))
        for mine, theirs, ids in zip(*parts, strict=True):
            wanted = F.linear(theirs, head).float().log_softmax(-1)
            got = F.linear(mine, head).float().log_softmax(-1)
            entropy -= got.gather(1, ids[:, None]).sum().item()
            odds = wanted.exp()
            divergence += (odds * wanted.sub_(got)).sum().item()
            gradient = got.exp_().mul_(1 + _TEXT_WEIGHT).sub_(odds)
            gradient.scatter_add_(1, ids[:, None], gradient.new_full((len(ids), 1), -_TEXT_WEIGHT))
            gradients.append((gradient.to(head.dtype) @ head).float())
        ctx.save_for_backward(torch.cat(gradients) / len(own))
        ctx.dtype = own.dtype
        sums = torch.tensor([divergence, entropy], device=own.device) / len(own)
        return sums[0] + _TEXT_WEIGHT * sums[1], sums[0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient by `own`."""
        return (ctx.saved_tensors[0] * gradients[0]).to(ctx.dtype), None, None, None


def train(
    student: Student,
    windows: torch.Tensor,
    config: TrainConfig,
    keeper: Keeper | None = None,
    on_step: Callable[[Step], None] = lambda _step: None,
) -> None:
    """Train all of the student on windows [n, tokens] in their order, again and again if they are few.

    Args:
        student: to be trained, as planned and fitted; goes on from what the keeper has, if that is further.
        windows: token ids.
        config: how long, and how fast.
        keeper: of the state between steps; None: an interruption loses all.
        on_step: told of each finished step.

    Raises:
        CheckpointError: the loss is no longer a number.
    """
    device = student.dense.device
    first, kept = (0, {}) if keeper is None else keeper.load()
    if kept:
        restore_student(student, kept)
    optimizer = torch.optim.Adam(list(_groups(student, config.rate)), betas=(0.9, 0.98), fused=True)
    _restore_moments(student, optimizer, first, kept)
    del kept
    teacher = torch.compile(dense_block, dynamic=False) if student.compiled else dense_block
    batches = windows.split(config.batch)
    warm_up = min(_WARM_UP_STEPS, max(1, config.steps // 4))
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["full"] * min(1.0, (step + 1) / warm_up) * max(_LAST_FACTOR, 1 - step / config.steps)
        batch = batches[step % len(batches)].to(device)
        with torch.no_grad():
            wanted = last_hidden(student.dense, batch, teacher)
        got, ties, loads = student(batch)
        offset = step % min(_SCORED_SHARE, batch.shape[1] - 1)
        scored = slice(offset, -1, _SCORED_SHARE)
        text = batch[:, 1:][:, offset::_SCORED_SHARE].flatten()
        loss, divergence = NextToken.apply(
            got[:, scored].flatten(0, 1), wanted[:, scored].flatten(0, 1), student.dense.head, text
        )
        apart = ((got.float() - wanted.float()).square().sum(-1) / wanted.float().square().sum(-1)).mean()
        optimizer.zero_grad()
        (loss + _HIDDEN_WEIGHT * apart + _TIE_WEIGHT * ties + _LOAD_WEIGHT * loads).backward()
        size = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        done = Step(step + 1, loss.item(), divergence.item(), ties.item())
        if not math.isfinite(done.loss) or not math.isfinite(size.item()):
            raise CheckpointError(
                f"step {done.number}: the loss is no longer a number; begin again with a lower --rate than {config.rate:g}"
            )
        optimizer.step()
        if keeper is not None:
            keeper.keep(done.number, lambda: kept_tensors(student, optimizer))
        on_step(done)


def perplexity(hidden: Callable[[torch.Tensor], torch.Tensor], head: torch.Tensor, windows: torch.Tensor) -> float:
    """Return the perplexity of the model whose last hidden state is given, each window from its second token on."""
    total = 0.0
    with torch.no_grad():
        for window in windows:
            ids = window[None].to(head.device)
            rows = hidden(ids)[0, :-1]
            for part, wanted in zip(rows.split(LOGIT_ROWS), ids[0, 1:].split(LOGIT_ROWS), strict=True):
                total += F.cross_entropy(F.linear(part, head).float(), wanted, reduction="sum").item()
    return math.exp(min(total / (windows.numel() - len(windows)), 700.0))


def kept_tensors(student: Student, optimizer: torch.optim.Optimizer | None = None) -> dict[str, torch.Tensor]:
    """Return all that a training goes on from, float32: the student, and the two moments of each of its parameters."""
    tensors = {f"student.{name}": values for name, values in student.state_dict().items()}
    for name, parameter in student.named_parameters():
        state = optimizer.state[parameter] if optimizer is not None else {}
        tensors |= {f"{moment}.{name}": state[moment] for moment in ("exp_avg", "exp_avg_sq") if moment in state}
    return {name: values.detach().cpu() for name, values in tensors.items()}


def restore_student(student: Student, kept: dict[str, torch.Tensor]) -> None:
    """Give the student its kept parameters and members."""
    prefix = "student."
    student.load_state_dict({name.removeprefix(prefix): kept[name] for name in kept if name.startswith(prefix)})


def _restore_moments(
    student: Student, optimizer: torch.optim.Optimizer, step: int, kept: dict[str, torch.Tensor]
) -> None:
    for name, parameter in student.named_parameters():
        if f"exp_avg.{name}" in kept:
            moments = {moment: kept[f"{moment}.{name}"].to(parameter.device) for moment in ("exp_avg", "exp_avg_sq")}
            count = torch.tensor(float(step), device=parameter.device)
            optimizer.state[parameter] = {"step": count, **moments}


def _groups(student: Student, rate: float) -> Iterator[dict[str, Any]]:
    def group(parameters: list[Any], full: float) -> dict[str, Any]:
        return {"params": parameters, "lr": full, "full": full}

    blocks = list(student.blocks)
    zero = [own.into[name] for own in blocks for name in own.into if name != "down"]
    zero += [own.out[name] for own in blocks for name in own.out if name != "down"]
    yield group(zero, rate)
    fitted = [part for own in blocks for part in (own.into["down"], own.out["down"], own.expert_into, own.expert_out)]
    yield group(fitted, rate / 2)
    yield group([part for own in blocks for part in (own.scales, own.shared)], rate * _SCALE_FACTOR)
    norms = [part for own in blocks for part in (own.input_norm, own.ffn_norm)] + [student.norm]
    yield group(norms, rate * _SCALE_FACTOR / 5)
    for own in blocks:
        yield group([own.router], rate * _ROUTER_FACTOR * own.router_size.item())
