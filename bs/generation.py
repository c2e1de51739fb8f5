"""Continues a text with the distributed model: prompt in chunks, then token by token over the KV cache.

token ids -> CachedModel.feed -> logits -> sample -> token -> Detokenizer -> StopFilter -> text
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wdmoe.bs.detokenizer import Detokenizer, StopFilter
from wdmoe.bs.microbatch import KvCache, pack_sequence
from wdmoe.bs.pipeline import Pipeline
from wdmoe.bs.policies import Policy
from wdmoe.bs.records import Record
from wdmoe.bs.routing import Floats
from wdmoe.bs.sampling import Sampling, sample
from wdmoe.runtime.clock import Clock
from wdmoe.runtime.manifest import BsManifest, ModelSpec
from wdmoe.runtime.tokenizing import open_tokenizer

Finish = Literal["stop", "length", "eos", "cancelled"]

# Prompt tokens in one microbatch: bounds the rows of a request and the mask, and lets Ctrl-C in.
CHUNK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of one answer went; None where nothing was there to be measured."""

    first_token_ms: float | None  # from the question to the first token, prompt included
    total_ms: float
    tokens_per_s: float | None  # of the tokens after the first
    waiting_ms_per_token: float | None  # of the same: nothing left to do at the base station, devices and link busy

    def describe(self, tokens: int) -> str:
        """Put it on one line."""
        parts = [f"{tokens} token{'' if tokens == 1 else 's'}"]
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:.2f} tokens/s")
        if self.first_token_ms is not None:
            parts.append(f"first token after {self.first_token_ms:.0f} ms")
        if self.waiting_ms_per_token is not None:
            parts.append(f"waiting {self.waiting_ms_per_token:.1f} ms per token")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer."""

    text: str  # without special tokens, up to the stop string if there was one
    token_ids: tuple[int, ...]  # all that the model chose, the end-of-text token included
    finish: Finish
    prompt_tokens: int
    reused_tokens: int  # of the prompt, those that the KV cache held already
    timing: Timing


class CachedModel:
    """The distributed model under one policy, with the KV cache of one token sequence.

    Args:
        pipeline: runs the microbatches.
        model: the shapes.
        policy: decides who computes what.
        chunk_tokens: prompt tokens in one microbatch.
    """

    def __init__(self, pipeline: Pipeline, model: ModelSpec, policy: Policy, chunk_tokens: int = CHUNK_TOKENS) -> None:
        self.records: list[Record] = []  # of the microbatches since `rewind`
        self._pipeline = pipeline
        self._model = model
        self._policy = policy
        self._chunk_tokens = chunk_tokens
        self._cache: KvCache | None = None
        self._held: list[int] = []  # the tokens of the cache

    def rewind(self, prompt: Sequence[int], max_tokens: int) -> int:
        """Keep what the cache shares with the beginning of a prompt, make room, and return how much was kept.

        At least the last token of the prompt is left to be fed: the answer begins with its logits.

        Raises:
            ValueError: the prompt is empty, or prompt and answer do not fit the model.
        """
        needed, limit = len(prompt) + max_tokens, self._model.max_positions
        if not prompt:
            raise ValueError("the prompt has no tokens, expected at least one")
        if needed > limit:
            raise ValueError(
                f"{len(prompt)} prompt tokens and --max-tokens {max_tokens} need {needed} positions, but "
                f"{self._model.name} knows {limit}; shorten the prompt or give --max-tokens {max(0, limit - len(prompt))}"
                " or less"
            )
        if self._cache is None:
            self._cache, self._held = KvCache(self._model.n_blocks, self._model.kv_dim, needed), []
        kept = common_prefix(self._held, prompt[:-1])
        self._cache.truncate(kept)
        self._held = self._held[:kept]
        if needed > self._cache.capacity:  # doubled, so that a long conversation is not copied at each turn
            self._cache.reserve(min(limit, max(needed, 2 * self._cache.capacity)))
        self.records = []
        return kept

    def feed(self, token_ids: Sequence[int], cancelled: Callable[[], bool] = lambda: False) -> Floats | None:
        """Run the next tokens, in chunks; return the logits after the last, [vocab], or None if cancelled before it.

        Raises:
            DeviceError, DevicesMissing: as `Pipeline.run`; the cache is empty then.
        """
        assert self._cache is not None and len(token_ids)
        logits: Floats | None = None
        try:
            for start in range(0, len(token_ids), self._chunk_tokens):
                if cancelled():
                    return None
                chunk = token_ids[start : start + self._chunk_tokens]
                microbatch = pack_sequence("generate", chunk, self._cache, self._model.sliding_window)
                ((_, result, record),) = self._pipeline.run([microbatch], self._policy)
                self._held += chunk
                self.records.append(record)
                logits = result.logits
        except BaseException:
            # Ctrl-C included: a stage that still runs on the worker may write into this cache later.
            self._cache, self._held = None, []
            raise
        assert logits is not None
        last: Floats = logits[-1]
        return last


class Writer:
    """Answers prompts one after another; a prompt that continues the last one costs only what is new.

    Args:
        model: runs tokens.
        tokenizer: a `tokenizers.Tokenizer`.
        eos_token_ids: the tokens that end an answer.
        clock: tells the times that are reported.
    """

    def __init__(self, model: CachedModel, tokenizer: Any, eos_token_ids: Sequence[int], clock: Clock) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._eos = frozenset(eos_token_ids)
        self._clock = clock

    def answer(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        rng: np.random.Generator,
        on_text: Callable[[str], None] = lambda text: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Completion:
        """Continue a prompt.

        Args:
            prompt: token ids.
            sampling: how.
            rng: draws the tokens.
            on_text: called with each piece of text as soon as it is certain.
            cancelled: asked before each microbatch; True ends the answer, and what is there is returned.

        Raises:
            ValueError: prompt and answer do not fit the model.
            DeviceError, DevicesMissing: as `Pipeline.run`.
        """
        started_s = self._clock.now_s()
        reused = self._model.rewind(prompt, sampling.max_tokens)
        detokenizer, stops = Detokenizer(self._tokenizer, prompt), StopFilter(sampling.stop)
        text: list[str] = []

        def show(certain: str) -> None:
            if certain:
                text.append(certain)
                on_text(certain)

        chosen: list[int] = []
        times_s: list[float] = []  # of each token
        finish: Finish | None = None
        step: Sequence[int] = prompt[reused:]
        while finish is None:
            if (logits := self._model.feed(step, cancelled)) is None:
                finish = "cancelled"
                break
            token = sample(logits, sampling, rng)
            chosen.append(token)
            times_s.append(self._clock.now_s())
            step = [token]
            if token in self._eos:
                finish = "eos"
                break
            show(stops.push(detokenizer.push(token)))
            if stops.stopped:
                finish = "stop"
            elif len(chosen) == sampling.max_tokens:
                finish = "length"
        show(stops.push(detokenizer.finish()) + stops.finish())
        if stops.stopped and finish != "cancelled":
            finish = "stop"
        decoding = self._model.records[-(len(chosen) - 1) :] if len(chosen) > 1 else []
        return Completion(
            "".join(text), tuple(chosen), finish, len(prompt), reused,
            _timing(started_s, times_s, self._clock.now_s(), decoding),
        )  # fmt: skip


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences share from their beginning."""
    length = min(len(first), len(second))
    return next((n for n in range(length) if first[n] != second[n]), length)


def load_tokenizer(folder: Path, manifest: BsManifest) -> Any:
    """Open a bundle's tokenizer; truncation and padding that it may ask for are switched off, as in transformers.

    Raises:
        BundleError: there is none, or it is missing or damaged.
        EngineError: `tokenizers` is not installed.
    """
    tokenizer = open_tokenizer(folder, manifest.tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _timing(started_s: float, times_s: list[float], ended_s: float, decoding: list[Record]) -> Timing:
    """Sum up the times; `decoding` are the records of the tokens after the first."""
    waiting_ms = sum(block.waiting_ms for record in decoding for block in record.blocks)
    decoding_s = times_s[-1] - times_s[0] if decoding else 0.0
    return Timing(
        first_token_ms=(times_s[0] - started_s) * 1e3 if times_s else None,
        total_ms=(ended_s - started_s) * 1e3,
        tokens_per_s=len(decoding) / decoding_s if decoding_s > 0 else None,
        waiting_ms_per_token=waiting_ms / len(decoding) if decoding else None,
    )
