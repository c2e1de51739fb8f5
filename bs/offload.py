"""Which of its own experts the base station runs in a block: a decision of plain values.

To the scheduler the base station is one more device, without a link: what it runs itself needs no air, but takes its one
worker. So it takes experts off the devices, the most wanted first, as long as the block is done sooner by it.
"""

from __future__ import annotations

from wdmoe.bs.airtime import LatencyModel, few_finish_ms
from wdmoe.bs.routing import Bools, Ints

FEW_TRIALS = 128  # of one step, times the steps that are left: up to here each device's candidate is tried

Score = tuple[float, float]


def take_over(owner: Ints, counts: Ints, tokens: int, kept: Bools, station: int, model: LatencyModel) -> Ints:
    """Return who runs each expert of a block, the base station included.

    One expert after another is taken over, of each device the most wanted first: the one that helps most, where these
    are few, else one of the device that is done last. The best of the states passed through is chosen: the least time of
    the block, of equals the least sum over devices. Subsets are not searched.

    Args:
        owner: [n_experts], who runs each without the base station; where nobody else can, that is `station` already.
        counts: [n_experts], tokens that want each.
        tokens: of the microbatch; no device is sent more rows.
        kept: [n_experts], whether the base station has it in memory.
        station: number of the base station in the model.
        model: of the devices and the base station, whose `way_ms` is what else occupies it, half before and half after.

    Returns:
        [n_experts], indices of devices.
    """
    wanted, holder, devices = counts.tolist(), owner.tolist(), range(model.n_devices)
    compute_ms, rows = [0.0] * len(devices), [0] * len(devices)
    left: list[list[int]] = [[] for _ in devices]  # of each device, what can be taken over, the most wanted last
    for expert in sorted(range(len(wanted)), key=lambda e: (wanted[e], -e)):
        if wanted[expert]:
            k = holder[expert]
            compute_ms[k] += _call_ms(model, k, wanted[expert])
            rows[k] += wanted[expert]
            if kept[expert] and k != station:
                left[k].append(expert)
    way_ms, staging_ms, down_ms, up_ms = (
        array.tolist() for array in (model.way_ms, model.staging_ms, model.down_ms, model.up_ms)
    )

    def finish_ms() -> list[float]:
        """Say when each device is done; the base station does not wait for a channel that others share."""
        loaded = [k for k in devices if rows[k] and k != station]
        n = {k: min(rows[k], tokens) for k in loaded}
        asked = [(n[k] * down_ms[k], way_ms[k], compute_ms[k] + n[k] * staging_ms[k], n[k] * up_ms[k]) for k in loaded]
        done = [0.0] * len(devices)
        for k, at_ms in zip(loaded, few_finish_ms(asked, model.medium)[0], strict=True):
            done[k] = at_ms
        done[station] = compute_ms[station] + 2 * way_ms[station] if rows[station] else 0.0
        return done

    def move(expert: int, source: int, target: int) -> None:
        for k, sign in ((source, -1), (target, 1)):
            rows[k] += sign * wanted[expert]
            compute_ms[k] += sign * _call_ms(model, k, wanted[expert])

    def score() -> Score:
        done_ms = finish_ms()
        return max(done_ms), sum(done_ms)

    def score_with(expert: int, source: int) -> Score:
        move(expert, source, station)
        found = score()
        move(expert, station, source)
        return found

    taken: list[int] = []
    best, best_taken = score(), 0
    while candidates := [k for k in devices if left[k]]:
        if sum(map(len, left)) * len(candidates) <= FEW_TRIALS:
            source = min(candidates, key=lambda k: score_with(left[k][-1], k))
        else:
            done_ms = finish_ms()
            source = max(candidates, key=lambda k: done_ms[k])
        expert = left[source].pop()
        taken.append(expert)
        move(expert, source, station)
        if (now := score()) < best:
            best, best_taken = now, len(taken)
        if compute_ms[station] >= best[0]:  # what is taken over from here on only makes it later
            break
    result = owner.copy()
    result[taken[:best_taken]] = station
    return result


def _call_ms(model: LatencyModel, device: int, tokens: int) -> float:
    return float(model.tables[model.table[device], tokens] * model.slowness[device])
