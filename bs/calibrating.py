"""Measures what leaving experts out costs in each block: see `wdmoe.bs.sensitivity` for what comes out.

The text is read exactly, then once for each block with only the top experts of that block, then once with a small loss in
all blocks together, which scales what the blocks showed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import numpy.typing as npt

from wdmoe.bs.importance import norms_of_text
from wdmoe.bs.microbatch import Result, pack_questions
from wdmoe.bs.pipeline import Pipeline
from wdmoe.bs.policies import Exact, Policy, Sensitivity, TopCut
from wdmoe.bs.quality import kl_divergence
from wdmoe.bs.questions import Choice, Question
from wdmoe.bs.routing import Floats, route
from wdmoe.bs.sensitivity import FORMAT, VERSION, SensitivityFile
from wdmoe.runtime.errors import DataError
from wdmoe.runtime.manifest import BsManifest

WINDOW = 128  # tokens that see each other
_EVERY = 4  # of which one is compared: the head costs more than a block
_TOGETHER = 0.01  # nats a token: the loss at which all blocks together are measured, and which is split among them

Values = npt.NDArray[np.float64]
Costs = Sequence[
    tuple[Values, Values]
]  # of each block: squared importance of what can go, ascending, and its sum along


@dataclass(frozen=True, slots=True)
class _Window:
    """A piece of text, and what the model says to it exactly."""

    question: Question
    logits: Floats  # [compared, vocab]
    weights: tuple[Floats, ...]  # of each block [tokens, k], descending
    experts: tuple[npt.NDArray[np.int64], ...]  # [tokens, k]


def measure_sensitivity(
    pipeline: Pipeline, manifest: BsManifest, ids: Sequence[int], on_step: Callable[[], None] = lambda: None
) -> SensitivityFile:
    """Measure how far each block by itself, and all together, carry the model from exact.

    Args:
        pipeline: runs the text; it knows what was measured afterwards.
        manifest: of the base station.
        ids: tokens of a text; whole windows of `WINDOW` of it are read, `n_steps` times in all.
        on_step: called after each reading of all windows.

    Raises:
        DataError: the text has no whole window, or the model chooses one expert for a token.
    """
    model = manifest.model
    if model.top_k < 2:
        raise DataError(f"{model.name} chooses one expert for a token: there is nothing to leave out")
    if len(ids) < WINDOW:
        raise DataError(f"the text has {len(ids)} tokens, expected at least {WINDOW}")
    first = () if model.bos_token_id is None else (model.bos_token_id,)
    windows = [
        _exactly(
            pipeline, manifest, Question(f"text/{at}", (Choice((*first, ids[at]), tuple(ids[at + 1 : at + WINDOW])),))
        )
        for at in range(0, len(ids) - WINDOW + 1, WINDOW)
    ]
    on_step()
    divergences = []
    for block in range(model.n_blocks):
        only = tuple(float(b == block) for b in range(model.n_blocks))
        divergences.append(_divergence(pipeline, windows, TopCut(n=1, budget=only), model.sliding_window))
        on_step()
    norms = norms_of_text(manifest)
    by_importance = {"weight": _fit(divergences, _costs(windows, None))}
    if norms is not None:
        by_importance["norm"] = _fit(divergences, _costs(windows, norms))
    alone = SensitivityFile(FORMAT, VERSION, manifest.bundle_id, WINDOW * len(windows), by_importance)
    scaled: dict[str, tuple[Sensitivity, ...]] = {}
    for kind, blocks in by_importance.items():
        pipeline.sensitivity = alone
        expected = _expected(blocks, _costs(windows, norms if kind == "norm" else None))
        policy = TopCut(n=1, importance=kind, loss=_TOGETHER)
        factor = _divergence(pipeline, windows, policy, model.sliding_window) / expected if expected > 0 else 1.0
        # More than one where errors of blocks add up to more than their parts.
        scaled[kind] = tuple(Sensitivity(max(factor, 1e-3) * block.nats, block.share) for block in blocks)
        on_step()
    pipeline.sensitivity = msgspec.structs.replace(alone, by_importance=scaled)
    return pipeline.sensitivity


def n_steps(manifest: BsManifest) -> int:
    """Return how often a text is read."""
    return manifest.model.n_blocks + 2 + (norms_of_text(manifest) is not None)


def equal_price(nats: Sequence[float], costs: Costs, loss: float) -> list[float]:
    """Split a loss among blocks so that the last pair to go costs the same in each: that loses least for what goes.

    Args:
        nats: of each block, a token's loss for each squared importance.
        costs: of each block, squared importances, ascending, and their sums along.
        loss: of all blocks, summed over the tokens.

    Returns:
        the share of each block; they sum to 1.
    """

    def spent(price: float) -> Values:
        at = [int(np.searchsorted(cost, price / max(s, 1e-30))) for s, (cost, _) in zip(nats, costs, strict=True)]
        return np.array([s * along[n] for s, n, (_, along) in zip(nats, at, costs, strict=True)])

    low, high = (
        0.0,
        max((s * float(cost[-1]) for s, (cost, _) in zip(nats, costs, strict=True) if len(cost)), default=0.0) * 2,
    )
    for _ in range(60):
        price = (low + high) / 2
        low, high = (price, high) if spent(price).sum() < loss else (low, price)
    shares = spent(high)
    if not shares.sum() > 0:
        return [1 / len(nats)] * len(nats)
    return [float(share) for share in shares / shares.sum()]


def _exactly(pipeline: Pipeline, manifest: BsManifest, question: Question) -> _Window:
    model = manifest.model
    weights: list[Floats] = []
    experts: list[npt.NDArray[np.int64]] = []

    def on_router(block: int, logits: Floats) -> None:
        routing = route(logits, model.top_k, model.norm_top_k)
        weights.append(routing.weights)
        experts.append(routing.experts)

    before, pipeline.on_router = pipeline.on_router, on_router
    try:
        result = _read(pipeline, question, Exact(), model.sliding_window)
    finally:
        pipeline.on_router = before
    assert result.logits is not None
    return _Window(question, result.logits, tuple(weights), tuple(experts))


def _read(pipeline: Pipeline, question: Question, policy: Policy, window: int | None) -> Result:
    whole = pack_questions([question], window)
    none = np.empty(0, np.int64)
    part = replace(whole, head_rows=whole.head_rows[::_EVERY], target_rows=none, target_ids=none, want_logits=True)
    ((_, result, _),) = pipeline.run([part], policy)
    return result


def _divergence(pipeline: Pipeline, windows: Sequence[_Window], policy: Policy, window: int | None) -> float:
    """Return the mean KL from exact, nats a token."""
    values = []
    for one in windows:
        result = _read(pipeline, one.question, policy, window)
        assert result.logits is not None
        values.append(kl_divergence(one.logits, result.logits))
    return float(np.concatenate(values).mean())


def _costs(windows: Sequence[_Window], norms: Floats | None) -> list[tuple[Values, Values]]:
    """Return squared importances of all but the top expert of each token, as a share of one token: see `Costs`."""
    costs = []
    for block in range(len(windows[0].weights)):
        importance = np.concatenate([w.weights[block] for w in windows]).astype(np.float64)
        if norms is not None:
            importance *= norms[block][np.concatenate([w.experts[block] for w in windows])]
        squares = np.sort(importance[:, 1:].ravel() ** 2)
        costs.append((squares, np.concatenate(([0.0], np.cumsum(squares))) / len(importance)))
    return costs


def _fit(divergences: Sequence[float], costs: Costs) -> tuple[Sensitivity, ...]:
    nats = [max(kl, 1e-9) / max(float(along[-1]), 1e-12) for kl, (_, along) in zip(divergences, costs, strict=True)]
    return tuple(Sensitivity(*both) for both in zip(nats, equal_price(nats, costs, _TOGETHER), strict=True))


def _expected(blocks: Sequence[Sensitivity], costs: Costs) -> float:
    """Return what `top-cut` with a loss of `_TOGETHER` should cost, less where all that can go costs less."""
    return sum(min(b.share * _TOGETHER, b.nats * float(along[-1])) for b, (_, along) in zip(blocks, costs, strict=True))
