"""Moving rows to replicas: before anything is left out, rows of an expert go from a device that finishes late to another holder.

Nothing changes in what is computed, only where. Moves are planned by what devices take by themselves, and made where the
block, by the latency model and with rows that tokens share counted, is done sooner. Not all divisions are searched.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from heapq import nlargest
from itertools import product
from math import prod

import numpy as np

from wdmoe.bs.airtime import FEW, Asked, LatencyModel, count_calls, few_finish_ms, finish_of
from wdmoe.bs.one_token import RowTimes, asked_of, block_ms
from wdmoe.bs.policies.exact import Replicas
from wdmoe.bs.routing import Bools, Ints, everything

_ALL = 16  # ways to ask for one token's experts that are tried; of more, one expert after another is moved
_SMALL = 4096  # experts times devices
_AGAIN = 512  # tokens, up to which rows that are dealt out evenly are a second beginning
_MANY = 16  # devices with work, from which they always are: few moves might not do
_MOVES, _MOVES_OF_MANY = (24, 8), (8, 1)  # of a block at most, and of these in vain one after another
_SOURCES, _TARGETS = 3, 2  # the slowest devices that are looked at, and the least busy holders of each of their experts
_GAIN = 1 - 1e-9

Move = tuple[int, int, int, int]  # expert, from, to, rows


def move_rows(experts: Ints, owner: Ints, holders: Bools, model: LatencyModel) -> Ints | None:
    """Choose who is asked for each expert of each token: [tokens, k] devices; None: the owners, nobody else helps.

    Args:
        experts: [tokens, k].
        owner: [n_experts], who is asked otherwise.
        holders: [n_experts, K], who may be asked.
        model: of the devices.
    """
    if int(np.count_nonzero(holders)) == len(holders):
        return None
    replicas, few = Replicas.of(holders), len(experts) <= _AGAIN
    blocks = [_Block(experts, owner[experts], replicas, model)]
    before_ms = blocks[0].took_ms
    if few or len(blocks[0].loaded()) > _MANY:
        blocks.append(_Block(experts, replicas.device[replicas.deal(experts)], replicas, model))
    if few:
        for block in blocks:
            block.improve(*_MOVES)
    best = min(blocks, key=lambda block: block.took_ms)
    if not few:
        best.improve(*_MOVES_OF_MANY)
    return best.device if best.took_ms < before_ms * _GAIN else None


def move_token(experts: list[int], device: list[int], holders: Bools, model: RowTimes) -> list[int] | None:
    """Do the same for one token in plain numbers, and try everything while there are few ways.

    Args:
        experts: [k].
        device: [k], who is asked otherwise.
        holders: [n_experts, K], who may be asked.
        model: of the devices.
    """
    holding = _holders(holders.tobytes(), holders.shape[1]) if holders.size <= _SMALL else None
    may = []
    for expert, owner in zip(experts, device, strict=True):
        them = holders[expert].nonzero()[0].tolist() if holding is None else holding[expert]
        may.append([owner, *[k for k in them if k != owner]])
    ways = prod(map(len, may))
    if ways == 1:
        return None

    alone = {k: asked_of(k, 1, model) for them in may for k in them}

    def took_ms(asked: Sequence[int]) -> float:
        if len(set(asked)) == len(asked):
            return block_ms([alone[k] for k in asked], model.medium)
        return block_ms([asked_of(k, asked.count(k), model) for k in dict.fromkeys(asked)], model.medium)

    start = tuple(device)
    best, best_ms = start, took_ms(start)
    if ways <= _ALL:
        tried = list(product(*may))[1:]
    else:
        tried = [(*start[:n], k, *start[n + 1 :]) for n, them in enumerate(may) for k in them[1:]]
    for asked in tried:
        if (ms := took_ms(asked)) < best_ms * _GAIN:
            best, best_ms = asked, ms
    return None if best == start else list(best)


@lru_cache(maxsize=256)
def _holders(holders: bytes, n_devices: int) -> list[list[int]]:
    """Return who holds each expert: for few devices it is sooner to look up what all of them hold than to look through it."""
    by_expert = np.frombuffer(holders, np.bool_).reshape(-1, n_devices)
    return [held.nonzero()[0].tolist() for held in by_expert]


class _Block:
    """Who is asked in one block, and how long that takes; rows move from device to device."""

    def __init__(self, experts: Ints, device: Ints, replicas: Replicas, model: LatencyModel) -> None:
        """Count what is asked of each device: rows, calls by expert, and their time."""
        self._experts, self._model = experts, model
        self.device = device  # [tokens, k]
        self._replicas, n_experts = replicas, len(replicas.count)
        # Where each expert stands, and the other slots of its tokens; flat.
        self._slots: dict[int, tuple[Ints, list[Ints]]] = {}
        self._tables = [memoryview(table) for table in model.tables]  # numbers that are read one by one
        self._table: list[int] = model.table.tolist()
        self._slowness: list[float] = model.slowness.tolist()
        self._staging_ms: list[float] = model.staging_ms.tolist()
        self._way_ms: list[float] = model.way_ms.tolist()
        self._down_ms: list[float] = model.down_ms.tolist()
        self._up_ms: list[float] = model.up_ms.tolist()
        rows, made, tokens = count_calls(experts, everything(*device.shape), device, n_experts, model.n_devices)
        who, called = made // n_experts, made % n_experts
        calls_ms = np.bincount(who, model.call_ms(who, tokens), model.n_devices)
        self._rows: list[int] = rows.tolist()
        self._calls_ms: list[float] = calls_ms.tolist()
        self._calls: list[dict[int, int]] = [{} for _ in self._rows]
        for k, expert, n in zip(who.tolist(), called.tolist(), tokens.tolist(), strict=True):
            self._calls[k][expert] = n
        self._alone_ms = [self._time_alone(k) for k in range(len(self._rows))]
        self.took_ms = self.block_ms()

    def improve(self, moves: int, in_vain: int) -> None:
        """Move rows as long as the block is done sooner.

        Args:
            moves: to try at most.
            in_vain: of these, one after another, after which no more are tried.
        """
        useless = set[tuple[int, int, int]]()
        for _ in range(moves):
            move = self._best_move(useless)
            if move is None:
                break
            (slots, stay, come), target = self._rows_to_move(*move), move[2]
            before = self._move(move, stay, come)
            if (took_ms := self.block_ms()) < self.took_ms * _GAIN:
                self.took_ms = took_ms
                useless.clear()
                self.device = self.device.copy()
                self.device.ravel()[slots] = target
            else:
                self._take_back(move, before)
                useless.add(move[:3])
                if len(useless) == in_vain:
                    break

    def block_ms(self) -> float:
        """Predict the block; see `airtime.makespan`."""
        loaded = self.loaded()
        if len(loaded) > FEW:
            rows = np.array(self._rows)
            return finish_of(rows, np.array(self._calls_ms) + rows * self._model.staging_ms, self._model).total_ms
        return max(few_finish_ms([self._asked(k) for k in loaded], self._model.medium)[0])

    def loaded(self) -> list[int]:
        """Return the devices that have work."""
        return [k for k, n in enumerate(self._rows) if n]

    def _asked(self, k: int) -> Asked:
        n = self._rows[k]
        return n * self._down_ms[k], self._way_ms[k], self._calls_ms[k] + n * self._staging_ms[k], n * self._up_ms[k]

    def _row_ms(self, k: int) -> float:
        return self._down_ms[k] + self._staging_ms[k] + self._up_ms[k]

    def _call_ms(self, k: int, tokens: int) -> float:
        ms: float = self._tables[self._table[k]][tokens] * self._slowness[k]
        return ms

    def _time_alone(self, k: int) -> float:
        return 2 * self._way_ms[k] + self._calls_ms[k] + self._rows[k] * self._row_ms(k) if self._rows[k] else 0.0

    def _best_move(self, useless: set[tuple[int, int, int]]) -> Move | None:
        """Take rows off the device that takes longest by itself and can be helped, so that it and who helps take least."""
        alone_ms = self._alone_ms
        for source in nlargest(_SOURCES, range(len(alone_ms)), key=alone_ms.__getitem__):
            if not self._rows[source]:
                break
            best, best_ms = None, alone_ms[source] * _GAIN
            for expert, calls in self._calls[source].items():
                for target in sorted(self._replicas.of_expert(expert), key=alone_ms.__getitem__)[:_TARGETS]:
                    if target == source or (expert, source, target) in useless or alone_ms[target] >= best_ms:
                        continue
                    for rows, ms in self._balanced(expert, calls, source, target):
                        if ms < best_ms:
                            best, best_ms = (expert, source, target, rows), ms
            if best is not None:
                return best
            if self._model.medium == "own":
                return None  # the block is done no sooner
        return None

    def _balanced(self, expert: int, calls: int, source: int, target: int) -> list[tuple[int, float]]:
        """Return how many rows of an expert might move, and what the slower of both then takes; each row for itself."""
        there = self._calls[target].get(expert, 0)
        idle_ms = 0.0 if self._rows[target] else 2 * self._way_ms[target]
        from_ms = self._alone_ms[source] - self._call_ms(source, calls)
        to_ms = self._alone_ms[target] + idle_ms - self._call_ms(target, there)

        from_table, to_table = self._tables[self._table[source]], self._tables[self._table[target]]
        from_slowness, to_slowness = self._slowness[source], self._slowness[target]
        from_row_ms, to_row_ms = self._row_ms(source), self._row_ms(target)

        def both_ms(n: int) -> tuple[float, float]:
            return (
                from_ms + from_table[calls - n] * from_slowness - n * from_row_ms,
                to_ms + to_table[there + n] * to_slowness + n * to_row_ms,
            )

        low, high = 1, calls  # the most rows with which the source is still the slower, and one more
        while high - low > 1:
            middle = (low + high) // 2
            here, beyond = both_ms(middle)
            low, high = (middle, high) if here > beyond else (low, middle)
        return [(n, max(both_ms(n))) for n in sorted({low, high, calls})]

    def _rows_to_move(self, expert: int, source: int, target: int, rows: int) -> tuple[Ints, int, int]:
        """Choose slots: first those whose row the source is rid of by it, and of them those whose row the target has.

        Returns:
            The slots, how many of their rows stay at the source all the same, and how many are new to the target.
        """
        if expert not in self._slots:
            self._slots[expert] = _others(np.flatnonzero(self._experts.ravel() == expert), self._experts.shape[1])
        slots, others = self._slots[expert]
        asked = self.device.ravel()
        here = np.flatnonzero(asked[slots] == source)
        if len(here) < len(slots):  # some of its rows are elsewhere
            slots, others = slots[here], [other[here] for other in others]
        stays, comes = np.zeros(len(slots), np.bool_), np.ones(len(slots), np.bool_)
        for other in others:
            who = asked[other]
            stays |= who == source
            comes &= who != target
        chosen = np.argsort(2 * stays.view(np.int8) + comes.view(np.int8), kind="stable")[:rows]  # 8 bits sort fast
        return slots[chosen], int(np.count_nonzero(stays[chosen])), int(np.count_nonzero(comes[chosen]))

    def _move(self, move: Move, stay: int, come: int) -> tuple[int, int, float, float]:
        expert, source, target, n = move
        before = (self._rows[source], self._rows[target], self._calls_ms[source], self._calls_ms[target])
        self._rows[source] -= n - stay
        self._rows[target] += come
        for k, by in ((source, -n), (target, n)):
            had = self._calls[k].get(expert, 0)
            self._calls[k][expert] = had + by
            self._calls_ms[k] += self._call_ms(k, had + by) - self._call_ms(k, had)
            if had + by == 0:
                del self._calls[k][expert]
            self._alone_ms[k] = self._time_alone(k)
        return before

    def _take_back(self, move: Move, before: tuple[int, int, float, float]) -> None:
        expert, source, target, n = move
        self._rows[source], self._rows[target], self._calls_ms[source], self._calls_ms[target] = before
        for k, by in ((source, n), (target, -n)):
            self._calls[k][expert] = self._calls[k].get(expert, 0) + by
            if self._calls[k][expert] == 0:
                del self._calls[k][expert]
            self._alone_ms[k] = self._time_alone(k)


def _others(slots: Ints, k: int) -> tuple[Ints, list[Ints]]:
    """Return flat slots, and for each of them the k - 1 others of its token."""
    if k == 2:
        return slots, [slots ^ 1]
    place = slots % k
    return slots, [slots - place + (place + step) % k for step in range(1, k)]
