"""Ladders: for each device the pairs it may lose, in order, with what each rung costs and what it gains.

All ladders lie end to end in flat arrays, so that nothing loops over devices. The first ladder of a device goes least
important first. Emptying an expert saves the reading of its weights, so further ladders begin with all pairs of some
of the device's experts: as many as can be afforded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from wdmoe.bs.airtime import LatencyModel, Load, Times
from wdmoe.bs.policies.pairs import Pairs
from wdmoe.bs.routing import Bools, Floats, Ints

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
        descending = _Search(self.start, top_ms - self.alone_ms, top_ms + 2)
        low_ms, high_ms = 0.0, top_ms
        # Rungs of low_ms, which nobody can afford, and of high_ms.
        beyond, at = self.start[1:] - 1, descending.below(0.0)
        for _ in range(steps):
            t_ms = (low_ms + high_ms) / 2
            between = descending.below(top_ms - t_ms)
            if np.minimum.reduceat(self.spent[between], self.first).sum() <= allowance:
                high_ms, at = t_ms, between
            else:
                low_ms, beyond = t_ms, between
            if high_ms - low_ms <= 1e-8 * high_ms or int((beyond - at).sum()) <= 1:  # one rung, which is not affordable
                break
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
        sizes = self.start[base.ladder + 1] - self.start[base.ladder] - 2
        most = self.most * (1 + 1e-9) + 1e-300
        search = _Search(self.start, np.minimum(self.step_importance, 2 * most), 3 * most)

        def rungs_at(price: float) -> Ints:
            at = search.below(np.minimum(price * worth, most), base.ladder) - self.start[base.ladder]
            rungs: Ints = np.minimum(sizes, np.maximum(base.rungs, at))
            return rungs

        def spent_at(rungs: Ints) -> float:
            return float(self.spent[self.start[base.ladder] + rungs].sum())

        low, high = 0.0, most / max(float(worth.min()), 1e-12 * float(worth.max()))
        rungs, too_far = base.rungs, sizes
        for _ in range(steps):
            if int((too_far - rungs).sum()) <= len(rungs):
                break  # single pairs are left, which `_fill` looks at
            price = (low + high) / 2
            further = rungs_at(price)
            if spent_at(further) <= allowance:
                low, rungs = price, further
            else:
                high, too_far = price, further
        return Chosen(base.ladder, self._fill(base.ladder, rungs, worth, allowance - spent_at(rungs)))

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

    def _fill(self, ladder: Ints, rungs: Ints, worth: Times, left: float) -> Ints:
        """Use what is left of an allowance for single pairs, the one of the best price first."""
        rungs, at = rungs.copy(), self.start[ladder] + rungs
        cost = self.spent[at + 1] - self.spent[at]
        price = np.full(len(cost), np.inf)
        np.divide(cost, worth, out=price, where=(cost <= left) & (worth > 0))
        taken = 0
        while taken < len(ladder):
            best = int(price.argmin())
            if not np.isfinite(price[best]):
                break
            if (least := float(cost[best])) > left:
                price[best] = np.inf  # for good: no more is left later
                continue
            left -= least
            taken += 1
            rungs[best] += 1
            at[best] += 1
            cost[best] = self.spent[at[best] + 1] - self.spent[at[best]]
            price[best] = cost[best] / worth[best]  # more than 0: it was taken
        return rungs


def make_ladders(
    experts: Ints, pairs: Pairs, may: Bools, load: Load, model: LatencyModel, allowance: float, n_experts: int
) -> Ladders | None:
    """Build the ladders of a block, or none if nobody may lose anything.

    Args:
        experts: [tokens, k].
        pairs: of the block.
        may: [tokens, k], leads that may be left out.
        load: with nothing left out.
        model: of the devices.
        allowance: emptying experts for more than this is not looked at.
        n_experts: of a block.
    """
    at = np.flatnonzero(may)
    if len(at) == 0:
        return None
    importance, device = pairs.importance.ravel(), pairs.device.ravel()
    at, each = _by_device(at, device[at], importance[at])
    loaded = np.flatnonzero(load.rows)
    bounds = np.searchsorted(each, np.append(loaded, model.n_devices))
    called = (pairs.device * n_experts + experts).ravel()
    calls = np.bincount(called)  # what each device is called for

    owner, lengths, item, emptying = loaded, np.diff(bounds), at, np.zeros(len(loaded), np.int64)
    if emptied := _emptied(at, bounds, loaded, experts, pairs, may, called, calls, n_experts, allowance):
        pieces, done = [], 0
        for n, firsts in emptied.items():
            pieces.append(at[done : bounds[n + 1]])
            mine, done = at[bounds[n] : bounds[n + 1]], bounds[n + 1]
            for first in firsts:
                pieces += [first, mine[~np.isin(mine, first)]]
        item = np.concatenate((*pieces, at[done:]))
        more = np.repeat([*emptied], [len(firsts) for firsts in emptied.values()])
        sizes = [len(first) for firsts in emptied.values() for first in firsts]
        # Further ladders stand after the first one of their device.
        owner, lengths = (np.insert(array, more + 1, array[more]) for array in (owner, lengths))
        emptying = np.insert(emptying, more + 1, sizes)
    start = np.concatenate(([0], np.cumsum(lengths + 2)))
    number = np.arange(len(owner))
    place = np.arange(len(item)) + np.repeat(2 * number, lengths)  # of the step in [N]
    cost = importance[item].astype(np.float64)
    ladder = np.repeat(number, lengths)
    saved_ms = np.repeat((model.row_air_ms + model.staging_ms)[owner], lengths)
    saved_ms += _call_savings(item, ladder, owner, experts, pairs, calls, n_experts, model)

    n = int(start[-1])
    lead, step_importance = np.zeros(n, np.int64), np.full(n, np.inf)
    lead[place], step_importance[place] = item, cost
    for one in np.flatnonzero(emptying).tolist():
        step_importance[start[one] : start[one] + emptying[one]] = 0.0
    alone_ms = (2 * model.way_ms + load.compute_ms(model) + load.rows * model.row_air_ms)[owner]
    flat_ms = np.repeat(alone_ms, lengths + 2) - _along(saved_ms, place, start, lengths)
    spent = _along(cost, place, start, lengths)
    idle = np.flatnonzero(lengths == load.rows[owner])
    flat_ms[start[idle] + lengths[idle]] = 0.0
    flat_ms = np.maximum(flat_ms, 0.0)
    flat_ms[start[1:] - 1], spent[start[1:] - 1] = -1.0, np.inf
    return Ladders(
        owner, np.searchsorted(owner, loaded), start, lead, spent, flat_ms, step_importance, float(cost.max())
    )


def _emptied(
    at: Ints,
    bounds: Ints,
    loaded: Ints,
    experts: Ints,
    pairs: Pairs,
    may: Bools,
    called: Ints,
    calls: Ints,
    n_experts: int,
    allowance: float,
) -> dict[int, list[Ints]]:
    """Return the pairs, least important first, that go when some experts of a device are emptied; for each choice.

    Few experts can be: all their rows must be droppable, and affordable. To empty a device's only one is the end of its first ladder.

    Returns:
        By the number of the device in `loaded`, ascending; only devices that have a choice.
    """
    made = np.flatnonzero(calls)
    several = np.bincount(made // n_experts) > 1
    if not several.any():
        return {}
    stays = np.bincount(called, pairs.keep_without(may).ravel())  # calls of pairs that may not go
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
        if firsts := _emptied_of(at[bounds[n] : bounds[n + 1]], these.tolist(), experts, pairs, allowance):
            found[n] = firsts
    return found


def _emptied_of(mine: Ints, candidates: list[int], experts: Ints, pairs: Pairs, allowance: float) -> list[Ints]:
    """Do the same for one device, of whose pairs and experts that can be emptied are given."""
    k = experts.shape[1]
    token, slot = mine // k, mine % k
    in_pair = pairs.lead_of[token] == slot[:, None]  # [pairs, k]
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
    item: Ints,
    ladder: Ints,
    owner: Ints,
    experts: Ints,
    pairs: Pairs,
    calls: Ints,
    n_experts: int,
    model: LatencyModel,
) -> Times:
    """Return what each step saves of expert calls: those of c tokens become calls of c - 1."""
    at, group = np.arange(len(item)), ladder * n_experts + experts.ravel()[item]
    some = np.flatnonzero(pairs.joined()[item])
    if len(some):  # further experts of a pair
        token, slot = np.divmod(item[some], experts.shape[1])
        for other in range(1, experts.shape[1]):
            more = np.flatnonzero((pairs.lead_of[token, other] == slot) & (slot != other))
            theirs = ladder[some[more]] * n_experts + experts[token[more], other]
            at, group = np.concatenate((at, some[more])), np.concatenate((group, theirs))
    if len(some) or (group[1:] < group[:-1]).any():
        keys = group << 32 | at  # numbers sort far sooner than what is sorted by them
        keys.sort()
        at, group = keys & 0xFFFFFFFF, keys >> 32
    # Of each group (ladder, expert): the first entry ends a call of all tokens, the next one of one less, and so on.
    begins = np.flatnonzero(np.concatenate(([True], group[1:] != group[:-1])))
    sizes = np.diff(np.append(begins, len(group)))
    device = owner[group[begins] // n_experts]
    tokens = calls[device * n_experts + group[begins] % n_experts]
    width = model.up_to + 1
    index = np.repeat(model.table[device] * width + tokens + begins, sizes) - np.arange(len(group))
    tables = model.tables.ravel()
    saved_ms = (tables[index] - tables[index - 1]) * np.repeat(model.slowness[device], sizes)
    return np.bincount(at, saved_ms, len(item)).astype(np.float64, copy=False)


def _along(steps: Times, place: Ints, start: Ints, lengths: Ints) -> Times:
    """Sum steps along each ladder: [N], 0 at the top of each; the entry beyond the last rung means nothing."""
    total = np.zeros(int(start[-1]))
    total[place + 1] = steps
    total = np.cumsum(total)
    result: Times = total - np.repeat(total[start[:-1]], lengths + 2)
    return result


def _by_device(at: Ints, device: Ints, importance: Floats) -> tuple[Ints, Ints]:
    """Sort flat indices by device, then by importance, then as they are; return them, and the device of each."""
    if int(at[-1]) >= 1 << 16 or int(device.max()) >= 1 << 15:
        order = np.lexsort((importance, device))
        return at[order], device[order]
    # In one number: those of a float32 that is not negative stand in the order of its bits.
    keys = device.astype(np.int64) << 48
    keys |= importance.astype(np.float32).view(np.int32).astype(np.int64) << 16
    keys |= at
    keys.sort()
    return keys & 0xFFFF, keys >> 48


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
