"""Choosing the next token: a function of logits, options and a random generator that is passed in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from wdmoe.bs.routing import Floats
from wdmoe.runtime.errors import EngineError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a text is continued; checked when built."""

    temperature: float = 0.0  # 0: greedy, always the most likely token
    top_p: float = 1.0  # of the most likely tokens, as many as make up this probability
    max_tokens: int = 128
    stop: tuple[str, ...] = ()  # texts that end the answer; they are not part of it
    seed: int = 0  # has no effect when greedy

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature is {self.temperature}, expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p is {self.top_p}, expected more than 0 and at most 1")
        if self.max_tokens < 1:
            raise ValueError(f"max-tokens is {self.max_tokens}, expected at least 1")
        if not all(self.stop):
            raise ValueError("a stop string is empty, expected at least one character")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected 0 or more")

    def rng(self) -> np.random.Generator:
        """Return a generator at the beginning of the seed's sequence."""
        return np.random.default_rng(self.seed)


def sample(logits: Floats, sampling: Sampling, rng: np.random.Generator) -> int:
    """Choose one token.

    Softmax of logits / temperature in float64; of the tokens in falling order, the fewest whose probabilities sum to
    top_p or more are kept; one of them is drawn with one uniform number.

    Args:
        logits: [vocab].
        sampling: temperature and top_p.
        rng: moved by one number for each token that is drawn, and not at all when greedy.
    """
    if not np.isfinite(logits).all():
        raise EngineError(
            "the model's logits are not all finite; an overflow in half precision is the usual cause (try --wire fp32)"
        )
    if sampling.temperature == 0:
        return int(logits.argmax())
    # Sorted by logit and not by probability: equal after rounding is not equal. Ties go to the smaller id, as in argmax.
    order = np.argsort(-logits, kind="stable")
    with np.errstate(over="ignore"):  # at a tiny temperature all but the first are exp(-inf) = 0
        weights = np.exp((logits[order].astype(np.float64) - float(logits[order[0]])) / sampling.temperature)
    cumulative = np.cumsum(weights / weights.sum())
    kept = 1 + int(np.searchsorted(cumulative[:-1], sampling.top_p, side="left"))
    drawn = rng.random() * cumulative[kept - 1]
    return int(order[min(int(np.searchsorted(cumulative[:kept], drawn, side="right")), kept - 1)])
