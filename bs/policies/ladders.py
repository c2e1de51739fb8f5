"""Ladders: for each device the pairs it may lose, in order, with what each rung costs and what it gains.

All ladders lie end to end in flat arrays, so that nothing loops over devices. The first ladder of a device goes least
important first. Emptying an expert saves the reading of its weights, so further ladders begin with all pairs of some
of the device's experts: as many as can be afforded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from itertools import combinations

import numpy as np

from wdmoe.bs.airtime import LatencyModel, Load, Times
from wdmoe.bs.policies.pairs import Calls, Pairs, by_device
from wdmoe.bs.routing import Bools, Ints

_HINT_FROM = 2048  # rungs, from which it is sooner to count first about where an allowance ends
_PLACES = 1024  # of such a count
_NOBODY = np.empty(0, np.int64)
_ALL_SUBSETS = 3  # experts that a device may be rid of in all combinations; of more, only in the order of their cost


@dataclass(frozen=True, slots=True)
class Chosen:
    """How far to go down on which ladder of each device."""

    ladder: Ints  # [D], one for each loaded device
    rungs: Ints  # [D]


@dataclass(frozen=True, slots=True)
class Ladders:
    """All ladders of one block; [N] are their rungs end to end, from rung 0 to one beyond the last."""

    device: Ints  # [L], of each ladder; ladders of a device stand together
    first: Ints  # [D], the first ladder of each loaded device
    start: Ints  # [L + 1], where each ladder begins in [N]
    lead: Ints  # [N], which pair (flat index of its lead) goes with the step from this rung to the next
    spent: Times  # [N], importance left out at this rung; infinite beyond the last
    alone_ms: Times  # [N], what the device takes by itself at this rung; -1 beyond the last
    step_importance: Times  # [N], of the next pair; 0 while experts are emptied, infinite at the last rung
    most: float  # that a pair counts

    def bring_down(self, allowance: float, steps: int) -> Chosen:
        """Find the least time to which all devices can be brought for an allowance."""
        top_ms = float(self.alone_ms[self.start[self.first]].max())
        descent_ms = top_ms - self.alone_ms
        search = _Search(self.start, descent_ms, top_ms + 2)
        low_ms, high_ms = 0.0, top_ms
        # Rungs of low_ms, which nobody can afford, and of high_ms.
        beyond, at = self.start[1:] - 1, search.below(0.0)
        hints = [] if self.may_empty else _affordable(descent_ms, self.step_importance, top_ms, allowance)
        for _ in range(steps):
            t_ms = top_ms - hints.pop() if hints else (low_ms + high_ms) / 2
            between = search.below(top_ms - t_ms)
            if np.minimum.reduceat(self.spent[between], self.first).sum() <= allowance:
                high_ms, at = t_ms, between
                hints.clear()  # what may be left of them is no farther
            else:
                low_ms, beyond = t_ms, between
            if high_ms - low_ms <= 1e-8 * high_ms or int((beyond - at).sum()) <= 1:  # one rung, which is not affordable
                break
        if not self.may_empty:
            return Chosen(self.first, at - self.start[:-1])
        spent = self.spent[at]
        cheapest = np.minimum.reduceat(spent, self.first)
        group = np.repeat(np.arange(len(self.first)), np.diff(np.append(self.first, len(self.device))))
        candidates = np.flatnonzero(spent == cheapest[group])
        ladder = candidates[np.searchsorted(group[candidates], np.arange(len(self.first)))]
        return Chosen(ladder, (at - self.start[:-1])[ladder])

    def spend(self, base: Chosen, value: Times, allowance: float, steps: int) -> Chosen:
        """Go further down, at the same price everywhere, until an allowance is spent.

        Args:
            base: where to begin.
            value: [K], worth of a row that goes, by device.
            allowance: for all importance that is left out, that of `base` included.
            steps: of the bisection.
        """
        worth = value[self.device[base.ladder]]
        if not worth.any():
            return base
        start = self.start[base.ladder]
        last = self.start[base.ladder + 1] - 2
        most = self.most * (1 + 1e-9) + 1e-300
        search = _Search(self.start, np.minimum(self.step_importance, 2 * most), 3 * most)
        # A device that needs no air has nothing to sell: it is left as it is.
        least_worth, most_worth = float(worth[worth > 0].min()), float(worth.max())
        low, high = 0.0, most / least_worth
        begin = at = start + base.rungs
        too_far, hints = last, list[float]()
        if not self.may_empty:
            rungs = np.diff(self.start)
            costs = self.step_importance
            if base.rungs.any() or not worth.all():  # what lies above is spent whatever the price, or not for sale
                none = np.where(worth > 0, begin, self.start[1:])
                costs = np.where(np.arange(len(costs)) < np.repeat(none, rungs), 0.0, costs)
            prices = self.step_importance * np.repeat(1 / np.maximum(worth, least_worth), rungs)
            hints = _affordable(prices, costs, high, allowance - float(self.spent[begin].sum()))
        for _ in range(steps + int(np.log2(most_worth / least_worth))):
            if int((too_far - at).sum()) <= len(at):
                break  # single pairs are left, which `_fill` looks at
            price = hints.pop() if hints else (low + high) / 2
            further = np.minimum(last, np.maximum(begin, search.below(np.minimum(price * worth, most), base.ladder)))
            if self.spent[further].sum() <= allowance:
                low, at = price, further
                hints.clear()  # as above
            else:
                high, too_far = price, further
        return Chosen(base.ladder, self._fill(at, worth, allowance - float(self.spent[at].sum())) - start)

    def slowest_ms(self, chosen: Chosen) -> float:
        """Return what the slowest device takes by itself."""
        return float(self.alone_ms[self.start[chosen.ladder] + chosen.rungs].max())

    def drop(self, chosen: Chosen, shape: tuple[int, ...]) -> Bools:
        """Return the pairs that are left out, at their leads."""
        drop = np.zeros(shape[0] * shape[1], np.bool_)
        begin = self.start[chosen.ladder]
        length = chosen.rungs
        offset = np.repeat(begin - np.cumsum(length) + length, length)
        drop[self.lead[offset + np.arange(int(length.sum()))]] = True
        return drop.reshape(shape)

    @property
    def may_empty(self) -> bool:
        """Whether some device may be rid of an expert before others."""
        return len(self.device) > len(self.first)

    def top(self) -> Chosen:
        """Leave out nothing."""
        return Chosen(self.first, np.zeros(len(self.first), np.int64))

    def _fill(self, at: Ints, worth: Times, left: float) -> Ints:
        """Use what is left of an allowance for single pairs, the one of the best price first, one for each device on average."""
        at, each = at.copy(), worth.tolist()
        cost: list[float] = (self.spent[at + 1] - self.spent[at]).tolist()
        prices = [(c / w, n) for n, (c, w) in enumerate(zip(cost, each, strict=True)) if c <= left and w > 0]
        heapify(prices)
        taken = 0
        while prices and taken < len(each):
            _, n = prices[0]
            if cost[n] > left:
                heappop(prices)  # for good: no more is left later
                continue
            left -= cost[n]
            taken += 1
            at[n] += 1
            cost[n] = float(self.spent[at[n] + 1] - self.spent[at[n]])
            heapreplace(prices, (cost[n] / each[n], n))
        return at


def make_ladders(
    calls: Calls, pairs: Pairs, may: Bools, load: Load, model: LatencyModel, allowance: float
) -> Ladders | None:
    """Build the ladders of a block, or none if nobody may lose anything.

    Args:
        calls: of the block.
        pairs: of the block.
        may: [tokens, k], leads that may be left out.
        load: with nothing left out.
        model: of the devices.
        allowance: emptying experts for more than this is not looked at.
    """
    at = np.flatnonzero(may)
    if len(at) == 0:
        return None
    importance, device = pairs.importance.ravel(), pairs.device.ravel()
    loaded = np.flatnonzero(load.rows)
    # After the pairs of each loaded device stand two entries that are none, for its last rung and the one beyond.
    item, each = by_device(at, device[at], importance[at], np.concatenate((loaded, loaded)))
    start = np.searchsorted(each, np.append(loaded, model.n_devices))

    owner, emptying = loaded, np.zeros(len(loaded), np.int64)
    if emptied := _emptied(item, start, loaded, calls, pairs, may, allowance):
        pieces, done = [], 0
        for n, firsts in emptied.items():
            begin, end = int(start[n]), int(start[n + 1])
            pieces.append(item[done:end])
            mine, done = item[begin : end - 2], end
            for first in firsts:
                pieces += [first, mine[~np.isin(mine, first)], item[end - 2 : end]]
        item = np.concatenate((*pieces, item[done:]))
        more = np.repeat([*emptied], [len(firsts) for firsts in emptied.values()])
        sizes = [len(first) for firsts in emptied.values() for first in firsts]
        # Further ladders stand after the first one of their device.
        owner, lengths = (np.insert(array, more + 1, array[more]) for array in (owner, np.diff(start)))
        emptying = np.insert(emptying, more + 1, sizes)
        start = np.concatenate(([0], np.cumsum(lengths)))
    lengths = np.diff(start)
    last, beyond = start[1:] - 2, start[1:] - 1  # from the last rung no step goes on
    cost = importance[item].astype(np.float64)
    cost[last] = cost[beyond] = 0.0
    ladder = np.repeat(np.arange(len(owner)), lengths)
    saved_ms = _call_savings(item, ladder, last, owner, calls, pairs, may, model)
    saved_ms += np.repeat((model.row_air_ms + model.staging_ms)[owner], lengths)
    saved_ms[last] = saved_ms[beyond] = 0.0

    alone_ms = (2 * model.way_ms + load.compute_ms(model) + load.rows * model.row_air_ms)[owner]
    flat_ms = np.repeat(alone_ms, lengths) - _along(saved_ms, start)
    spent, most = _along(cost, start), float(cost.max())
    idle = np.flatnonzero(lengths - 2 == load.rows[owner])
    flat_ms[last[idle]] = 0.0
    flat_ms = np.maximum(flat_ms, 0.0)
    flat_ms[beyond], spent[beyond] = -1.0, np.inf
    cost[last] = cost[beyond] = np.inf
    for one in np.flatnonzero(emptying).tolist():
        cost[start[one] : start[one] + emptying[one]] = 0.0
    first = np.arange(len(loaded)) if owner is loaded else np.searchsorted(owner, loaded)
    return Ladders(owner, first, start, item, spent, flat_ms, cost, most)


def _emptied(
    item: Ints, start: Ints, loaded: Ints, calls: Calls, pairs: Pairs, may: Bools, allowance: float
) -> dict[int, list[Ints]]:
    """Return the pairs, least important first, that go when some experts of a device are emptied; for each choice.

    Few experts can be: all their rows must be droppable, and affordable. To empty a device's only one is the end of its first ladder.

    Returns:
        By the number of the device in `loaded`, ascending; only devices that have a choice.
    """
    n_experts, called = calls.n_experts, calls.of_slot
    made = np.flatnonzero(calls.tokens)
    several = np.bincount(made // n_experts) > 1
    if not several.any():
        return {}
    stays = calls.left(pairs, may)[0]  # calls of pairs that may not go
    full = made[(stays[made] == 0) & several[made // n_experts]]
    if len(full) == 0:
        return {}
    of_pair = pairs.importance.ravel()
    if len(pairs.further):
        of_pair = of_pair.copy()
        of_pair[pairs.further] = of_pair[pairs.their_lead]
    # A margin for rounding: what is affordable is decided below, in the order of the pairs.
    candidates = full[np.bincount(called, of_pair)[full] <= allowance * (1 + 1e-6)]
    found: dict[int, list[Ints]] = {}
    for who in np.unique(candidates // n_experts).tolist():
        n = int(np.searchsorted(loaded, who))
        these = candidates[candidates // n_experts == who] % n_experts
        if firsts := _emptied_of(item[start[n] : start[n + 1] - 2], these.tolist(), calls.experts, pairs, allowance):
            found[n] = firsts
    return found


def _emptied_of(mine: Ints, candidates: list[int], experts: Ints, pairs: Pairs, allowance: float) -> list[Ints]:
    """Do the same for one device, of whose pairs and experts that can be emptied are given."""
    k = experts.shape[1]
    token, slot = mine // k, mine % k
    in_pair = pairs.lead_of()[token] == slot[:, None]  # [pairs, k]
    theirs = experts[token]
    value = pairs.importance.ravel()[mine].astype(np.float64)
    touches = {e: (in_pair & (theirs == e)).any(axis=1) for e in candidates}
    cost = {e: float(value[touched].sum()) for e, touched in touches.items()}
    affordable = sorted((e for e in cost if cost[e] <= allowance), key=lambda e: cost[e])
    subsets: list[Sequence[int]] = [affordable[:n] for n in range(1, len(affordable) + 1)]
    if len(affordable) <= _ALL_SUBSETS:
        subsets = [s for n in range(1, len(affordable) + 1) for s in combinations(affordable, n)]
    return [mine[np.logical_or.reduce([touches[e] for e in subset])] for subset in subsets]


def _call_savings(
    item: Ints, ladder: Ints, last: Ints, owner: Ints, calls: Calls, pairs: Pairs, may: Bools, model: LatencyModel
) -> Times:
    """Return what each step saves of expert calls: those of c tokens become calls of c - 1. At the last rungs it means nothing."""
    experts, n_experts = calls.experts, calls.n_experts
    at, group = None, ladder * n_experts + experts.ravel()[item]
    some = _joined(pairs, item, last, may)
    if len(some):  # further experts of a pair
        token, slot = np.divmod(item[some], experts.shape[1])
        lead_of, keys = pairs.lead_of(), [group << 32 | np.arange(len(item))]
        for other in range(1, experts.shape[1]):
            more = np.flatnonzero((lead_of[token, other] == slot) & (slot != other))
            theirs = ladder[some[more]] * n_experts + experts[token[more], other]
            keys.append(theirs << 32 | some[more])
        key = np.concatenate(keys)
        key.sort()
        at, group = key & 0xFFFFFFFF, key >> 32
    elif (group[1:] < group[:-1]).any():
        at = np.argsort(group.astype(np.int16) if len(owner) * n_experts < 1 << 15 else group, kind="stable")
        group = group[at]
    # Of each group (ladder, expert): the first entry ends a call of all tokens, the next one of one less, and so on.
    begins = np.flatnonzero(np.concatenate(([True], group[1:] != group[:-1])))
    sizes = np.diff(np.append(begins, len(group)))
    of_ladder, expert = np.divmod(group[begins], n_experts)
    device = owner[of_ladder]
    width = model.up_to + 1
    first = model.table[device] * width + calls.tokens[device * n_experts + expert] + begins
    index = np.repeat(first, sizes) - np.arange(len(group))
    tables = model.tables.ravel()
    saved_ms = (tables[index] - tables[index - 1]) * np.repeat(model.slowness[device], sizes)
    if at is None:
        return saved_ms
    return np.bincount(at, saved_ms, len(item)).astype(np.float64, copy=False)


def _joined(pairs: Pairs, item: Ints, last: Ints, may: Bools) -> Ints:
    """Return which steps are those of a pair of several experts."""
    joined = np.zeros(may.size, np.bool_)
    joined[pairs.their_lead] = may.ravel()[pairs.their_lead]
    if not joined.any():
        return _NOBODY
    of_item = joined[item]
    of_item[last] = of_item[last + 1] = False
    return np.flatnonzero(of_item)


def _along(steps: Times, start: Ints) -> Times:
    """Sum steps along each ladder: [N], 0 at the top of each; the entry beyond the last rung means nothing."""
    total = np.empty(len(steps))
    total[0] = 0.0
    np.cumsum(steps[:-1], out=total[1:])
    total -= np.repeat(total[start[:-1]], np.diff(start))
    return total


def _affordable(values: Times, costs: Times, up_to: float, allowance: float) -> list[float]:
    """Say about where what lies below has cost an allowance: a value that is not too high, and last, to be looked at first, one that is.

    Args:
        values: [N], in no order.
        costs: [N], infinite for what nobody can afford.
        up_to: which values matter.
        allowance: for all costs.
    """
    if len(values) < _HINT_FROM or not up_to > 0:
        return []
    place = np.minimum(values * (_PLACES / up_to), _PLACES).astype(np.int64)
    below = np.cumsum(np.bincount(place, costs, _PLACES + 1)[:_PLACES])
    n = int(np.searchsorted(below, allowance, side="right"))  # full places that can be afforded
    return [up_to * count / _PLACES for count in (n, n + 1) if count <= _PLACES]


class _Search:
    """Counts, in every ladder at once, the rungs before a value, along which values ascend."""

    def __init__(self, start: Ints, values: Times, beyond: float) -> None:
        """Shift each ladder above the one before; values lie from 0 to less than `beyond`."""
        self._beyond = beyond
        self._ladders = np.arange(len(start) - 1)
        self._flat = values + np.repeat(self._ladders, np.diff(start)) * beyond

    def below(self, value: float | Times, ladders: Ints | None = None) -> Ints:
        """Return, of each ladder, the index of the first rung whose value is not below."""
        ladders = self._ladders if ladders is None else ladders
        return np.searchsorted(self._flat, ladders * self._beyond + value)
