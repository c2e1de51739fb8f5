"""What goes through the model at once: flat rows of tokens, with a mask that says who sees whom.

Rows of several questions, of a trie of choices, of a prompt or of one new token are all the same thing here, so no
row is padding: neither the experts nor the air see any. Only attention, which would cost the square of all rows, looks
at rows lane by lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.bs.questions import Answer, Question, TokenIds
from wdmoe.bs.routing import Bools, Floats, Ints
from wdmoe.runtime.messages import MAX_ROWS

_BATCH_ROWS = 1024  # rows of a microbatch of several questions: beyond, nothing gets faster


class KvCache:
    """Keys and values of one sequence, for every block: grows by appending, moves what it holds only in `reserve`."""

    def __init__(self, n_blocks: int, kv_dim: int, capacity: int) -> None:
        self.length = 0  # tokens that every block holds
        self._keys = np.zeros((n_blocks, capacity, kv_dim), np.float32)
        self._values = np.zeros((n_blocks, capacity, kv_dim), np.float32)

    @property
    def capacity(self) -> int:
        """Tokens it can hold."""
        return self._keys.shape[1]

    def past(self, block: int) -> tuple[Floats, Floats]:
        """Return keys and values of the tokens before this microbatch, each [length, kv_dim]."""
        return self._keys[block, : self.length], self._values[block, : self.length]

    def store(self, block: int, keys: Floats, values: Floats) -> None:
        """Write one block's keys and values of the new tokens, each [new, kv_dim]; `advance` makes them the past."""
        end = self.length + len(keys)
        self._keys[block, self.length : end] = keys
        self._values[block, self.length : end] = values

    def advance(self, tokens: int) -> None:
        """Count the tokens of a finished microbatch as past."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot keep {length} tokens of a KV cache that holds {self.length}")
        self.length = length

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens in all; what is held is copied where it must move."""
        if capacity > self.capacity:
            self._keys, self._values = (self._moved(held, capacity) for held in (self._keys, self._values))

    def _moved(self, held: Floats, capacity: int) -> Floats:
        n_blocks, _, kv_dim = held.shape
        moved = np.zeros((n_blocks, capacity, kv_dim), np.float32)
        moved[:, : self.length] = held[:, : self.length]
        return moved


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Rows to run through the model, in lanes that do not see each other."""

    name: str
    token_ids: Ints  # [n]
    positions: Ints  # [n]
    lanes: Ints  # [b, l], rows of each lane; where a lane is shorter than l, any row stands in
    back: Ints  # [n], index of each row in lanes, flattened
    mask: Floats  # [b, 1, l, past + l], added to attention scores: 0 or -inf
    head_rows: Ints  # [m], rows whose next token is asked for, ascending
    target_rows: Ints  # [t], index into head_rows
    target_ids: Ints  # [t], tokens whose log-probability is asked for
    want_logits: bool = False  # whether the result carries all logits of head_rows
    cache: KvCache | None = None  # of the only lane; None: nothing comes before and nothing is kept
    questions: int = 1  # how many it holds

    def __post_init__(self) -> None:
        """Refuse what no device would take."""
        if not 1 <= len(self.token_ids) <= MAX_ROWS:
            raise ValueError(f"{self.name}: {len(self.token_ids)} tokens in one microbatch, expected 1 to {MAX_ROWS}")


@dataclass(frozen=True, slots=True)
class Result:
    """What the model says to a microbatch."""

    logprobs: Floats  # [t], natural logarithm, of target_ids
    greedy: Bools  # [t], whether target_ids is the most likely token
    logits: Floats | None = None  # [m, vocab] where wanted


@dataclass(frozen=True, slots=True)
class Trie:
    """Token sequences with their shared beginnings merged."""

    token_ids: Ints  # [n]
    depth: Ints  # [n], position of the token in its sequence
    parent: Ints  # [n], row of the token before it, -1 for the first; always smaller than the row itself
    rows: tuple[Ints, ...]  # for each sequence, its rows in order


def merge_prefixes(sequences: Sequence[TokenIds]) -> Trie:
    """Merge what sequences share from their beginning."""
    children: dict[tuple[int, int], int] = {}
    token_ids: list[int] = []
    depth: list[int] = []
    parent: list[int] = []
    rows: list[Ints] = []
    for sequence in sequences:
        node, path = -1, []
        for position, token in enumerate(sequence):
            child = children.get((node, token))
            if child is None:
                child = children[node, token] = len(token_ids)
                token_ids.append(token)
                depth.append(position)
                parent.append(node)
            node = child
            path.append(node)
        rows.append(np.array(path, np.int64))
    return Trie(np.array(token_ids, np.int64), np.array(depth, np.int64), np.array(parent, np.int64), tuple(rows))


def ancestor_mask(parent: Ints, depth: Ints, window: int | None) -> Floats:
    """Let each row see itself and the rows before it on its own path: [n, n] of 0 and -inf.

    Args:
        parent: [n], as in `Trie`.
        depth: [n], as in `Trie`.
        window: how many positions a token sees, itself included; None: all.
    """
    n = len(parent)
    sees = np.zeros((n, n), np.bool_)
    for row, before in enumerate(parent):
        if before >= 0:
            sees[row] = sees[before]
        sees[row, row] = True
    if window is not None:
        sees &= depth[:, None] - depth[None, :] < window
    return np.where(sees, np.float32(0), np.float32(-np.inf))


def causal_mask(new: int, past: int, window: int | None) -> Floats:
    """Mask of `new` tokens of one sequence after `past` cached ones: [new, past + new] of 0 and -inf."""
    position = np.arange(past + new)
    distance = position[past:, None] - position[None, :]
    sees = distance >= 0
    if window is not None:
        sees &= distance < window
    return np.where(sees, np.float32(0), np.float32(-np.inf))


def pack_questions(questions: Sequence[Question], window: int | None) -> Microbatch:
    """Lay questions out, each as a lane of its own.

    The choices of a question are one trie: what they share is computed once, with equal results.

    Args:
        questions: at least one.
        window: how many positions a token sees, itself included; None: all.
    """
    tries = [
        merge_prefixes([choice.context + choice.continuation[:-1] for choice in question.choices])
        for question in questions
    ]
    sizes = [len(trie.token_ids) for trie in tries]
    starts = np.cumsum([0, *sizes[:-1]])
    predicting = [
        rows[len(choice.context) - 1 :] + start
        for question, trie, start in zip(questions, tries, starts, strict=True)
        for choice, rows in zip(question.choices, trie.rows, strict=True)
    ]
    head_rows, target_rows = np.unique(np.concatenate(predicting), return_inverse=True)
    targets = [token for question in questions for choice in question.choices for token in choice.continuation]
    masks = [ancestor_mask(trie.parent, trie.depth, window) for trie in tries]
    return Microbatch(
        questions[0].name if len(questions) == 1 else f"{questions[0].name} and {len(questions) - 1} more",
        np.concatenate([trie.token_ids for trie in tries]),
        np.concatenate([trie.depth for trie in tries]),
        *_lay_in_lanes(masks),
        head_rows,
        target_rows,
        np.array(targets, np.int64),
        questions=len(questions),
    )


def _lay_in_lanes(masks: Sequence[Floats]) -> tuple[Ints, Ints, Floats]:
    """Return lanes, back and mask of a microbatch, from each lane's own mask [n, n]."""
    width = max(len(mask) for mask in masks)
    lanes = np.zeros((len(masks), width), np.int64)
    whole = np.full((len(masks), 1, width, width), -np.inf, np.float32)
    whole[:, :, :, 0] = 0  # what stands in for a row sees something: a softmax over nothing is not a number
    back: list[Ints] = []
    start = 0
    for k, mask in enumerate(masks):
        n = len(mask)
        lanes[k, :n] = np.arange(start, start + n)
        whole[k, 0, :n, :n] = mask
        back.append(np.arange(k * width, k * width + n))
        start += n
    return lanes, np.concatenate(back), whole


def pack_sequence(
    name: str, token_ids: Sequence[int], cache: KvCache, window: int | None, all_logits: bool = False
) -> Microbatch:
    """Lay out the next tokens of one sequence; the result carries the logits of the last one, or of all."""
    new, past = len(token_ids), cache.length
    if past + new > cache.capacity:
        raise ValueError(f"{name}: {past + new} tokens do not fit the KV cache of {cache.capacity}")
    none: npt.NDArray[np.int64] = np.empty(0, np.int64)
    return Microbatch(
        name,
        np.array(token_ids, np.int64),
        np.arange(past, past + new),
        np.arange(new)[None],
        np.arange(new),
        causal_mask(new, past, window)[None, None],
        np.arange(0 if all_logits else new - 1, new),
        none,
        none,
        want_logits=True,
        cache=cache,
    )


def answers_of(questions: Sequence[Question], result: Result) -> list[Answer]:
    """Sum the target tokens' log-probabilities by choice, for the questions of a microbatch in their order."""
    answers: list[Answer] = []
    at = 0
    for question in questions:
        sums: list[float] = []
        greedy: list[bool] = []
        for choice in question.choices:
            part = slice(at, at + len(choice.continuation))
            sums.append(float(result.logprobs[part].sum(dtype=np.float64)))
            greedy.append(bool(result.greedy[part].all()))
            at = part.stop
        answers.append(Answer(tuple(sums), tuple(greedy)))
    return answers


def in_batches(questions: Sequence[Question], batch: int) -> list[tuple[int, ...]]:
    """Divide questions among microbatches, those of like length together: index of each question.

    Args:
        questions: any number.
        batch: questions in one microbatch at most; fewer where they are long. 1 keeps their order.
    """
    if batch == 1:
        return [(number,) for number in range(len(questions))]
    # About what a trie of the choices will hold: they share most of their context, and little of what follows.
    sizes = [sum(len(c.continuation) for c in q.choices) + max(len(c.context) for c in q.choices) for q in questions]
    batches: list[tuple[int, ...]] = []
    for number in sorted(range(len(questions)), key=sizes.__getitem__, reverse=True):
        last = batches[-1] if batches else ()
        if last and len(last) < batch and sizes[number] + sum(sizes[k] for k in last) <= _BATCH_ROWS:
            batches[-1] = (*last, number)
        else:
            batches.append((number,))
    return batches
