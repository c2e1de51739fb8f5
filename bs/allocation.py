"""Bandwidth: how a band is divided among devices, as shares that sum to one.

    uniform      the same share for every device
    static       one split for all blocks, least sum of block times over some sample of blocks (convex; needs SciPy)
    per-block    anew for each block once its loads are known: exact, the least T for which the shares that bring each
                 device to T sum to the band

A share of the band has the spectral efficiency of the whole and serves both directions, one after the other: with the
share b a row takes air / b, where air is its time there and back with the whole band.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wdmoe.bs.airtime import FEW, Ints, LatencyModel, Load, Times, pooled_root
from wdmoe.runtime.errors import WdmoeError

_STEPS = 300  # of the rough search
_ROUNDS = 60
_LEAST = 1e-9  # share of a device that is never asked
_GAP = 1e-8  # of the optimum, to which static shares are known
USUAL_TOKENS = 64  # of a microbatch, to which static shares are fitted: of a question and its choices
_LEAST_USED = 0.02  # share of a device that is never asked, as far as is known: it may have to stand in for another


def uniform(n_devices: int) -> Times:
    """Return the same share for each device, [K]."""
    return np.full(n_devices, 1 / n_devices)


def with_shares(model: LatencyModel, shares: Times) -> LatencyModel:
    """Put the devices of a model, whose rates are those of the whole band, on shares of it."""
    return model.with_rates(model.down_ms / shares, model.up_ms / shares)


def parts_ms(load: Load, model: LatencyModel) -> tuple[Times, Times]:
    """Return what each device needs of the air with the whole band, and besides: [K] each, 0 if it is idle."""
    return load.rows * model.row_air_ms, np.where(load.rows > 0, 2 * model.way_ms + load.compute_ms(model), 0.0)


def per_block(load: Load, model: LatencyModel) -> tuple[Times, float]:
    """Divide the band so that the block is done soonest: all loaded devices finish together.

    Args:
        load: of the block.
        model: of the devices, with the rates of the whole band; its medium is not looked at.

    Returns:
        [K] shares, 0 of a device that needs no air, and the time of the block in ms.
    """
    if len(load.device) <= FEW:
        loaded, asked = load.few(model)
        air_ms = [down + up for down, _, _, up in asked]
        fixed_ms = [2 * way + compute for _, way, compute, _ in asked]
    else:
        loaded = np.flatnonzero(load.rows).tolist()
        air_ms, fixed_ms = (part[loaded].tolist() for part in parts_ms(load, model))
    parts, total_ms = finish_together(air_ms, fixed_ms)
    shares = np.zeros(len(load.rows))
    shares[loaded] = parts
    return shares, total_ms


def finish_together(air_ms: Sequence[float], fixed_ms: Sequence[float]) -> tuple[list[float], float]:
    """Divide a band among devices that all finish at one time: share = air / (time - fixed).

    Args:
        air_ms: of each with the whole band.
        fixed_ms: what each takes besides.

    Returns:
        Shares that sum to 1, and the time; a device that needs no air has no share.
    """
    total_ms = pooled_root(air_ms, fixed_ms)
    parts = [a / (total_ms - f) if a > 0 else 0.0 for a, f in zip(air_ms, fixed_ms, strict=True)]
    scale = 1 / whole if (whole := sum(parts)) else 0.0  # what rounding, or one that needs no air, left over
    return [scale * part for part in parts], total_ms


def static_of_use(model: LatencyModel, owner: Ints, top_k: int, counts: Ints | None) -> Times:
    """Divide the band once for all blocks, by what microbatches of a usual size ask of the devices under exact: [K].

    Args:
        model: of the devices, with the rates of the whole band.
        owner: [n_blocks, n_experts], the device of each expert.
        top_k: experts of one token.
        counts: how often each expert is used, [n_blocks, n_experts]; None: alike.

    Raises:
        WdmoeError: SciPy is missing.
    """
    parts = []
    for owned, used in zip(owner, np.ones(owner.shape, np.int64) if counts is None else counts, strict=True):
        wanted = np.minimum(1.0, top_k * used / max(1, used.sum()))  # by that part of the tokens
        spared = np.ones(model.n_devices)  # the part that wants none of a device's experts
        np.multiply.at(spared, owned, 1 - wanted)
        rows, tokens = (np.rint(USUAL_TOKENS * part).astype(np.int64) for part in (1 - spared, wanted))
        parts.append(parts_ms(Load(rows, owned, tokens), model))
    shares = np.maximum(static(*map(np.array, zip(*parts, strict=True))), _LEAST_USED)
    floored: Times = np.floor(1e4 * shares / shares.sum()) / 1e4
    return floored


def static(air_ms: Times, fixed_ms: Times) -> Times:
    """Divide the band once for all blocks, so that the mean block time is least: [K].

    A convex program: the mean of T_b, where T_b >= fixed_bk + air_bk u_k for every device that is loaded, and
    u_k >= 1 / share_k. All but the last is linear, and the last is replaced by its tangents: a linear program within a box
    around the best shares so far, which leaves out whoever cannot be last there. What its shares really take is above the
    optimum; where they lie inside the box, what the program says is below it.

    Args:
        air_ms: [blocks, K], on the air with the whole band.
        fixed_ms: [blocks, K], besides.

    Raises:
        WdmoeError: SciPy is missing; says what to install.
    """
    try:
        from scipy.optimize import linprog
        from scipy.sparse import coo_array
    except ImportError as error:
        raise WdmoeError(
            f"a static division of the band needs SciPy ({error}): pip install 'wdmoe[scheduler]'"
        ) from error
    shares = np.zeros(air_ms.shape[1])
    used = np.flatnonzero(air_ms.sum(axis=0))
    if len(used) == 0:
        return uniform(len(shares))
    least_ms = np.where(air_ms > 0, 0.0, fixed_ms).max(axis=1)  # of what needs no air
    air_ms, fixed_ms = air_ms[:, used], np.where(air_ms > 0, fixed_ms, 0.0)[:, used]
    blocks, n = air_ms.shape
    devices = np.arange(n)
    best = _roughly(air_ms, fixed_ms)
    tangents, width = [best], 0.2  # of the box, in logarithms
    for _ in range(_ROUNDS):
        best_ms = float(np.maximum(least_ms, (fixed_ms + air_ms / best).max(axis=1)).mean())
        low, high = best * np.exp(-width), np.minimum(1.0, best * np.exp(width))
        floor_ms = np.maximum(least_ms, (fixed_ms + air_ms / high).max(axis=1))
        block, device = np.nonzero((air_ms > 0) & (fixed_ms + air_ms / low > floor_ms[:, None]))
        # Variables: n shares, n inverse shares, a time of each block.
        row, cuts = np.arange(len(block)), len(tangents) * n
        at = np.concatenate(tangents)
        # u >= 2 / p - share / p^2, the tangent at p; times p.
        values = (air_ms[block, device], -np.ones(len(row)), -1 / at, -at)
        cut_row, of_cut = len(row) + np.arange(cuts), np.tile(devices, len(tangents))
        place = (
            np.concatenate((row, row, cut_row, cut_row)),
            np.concatenate((n + device, 2 * n + block, of_cut, n + of_cut)),
        )
        found = linprog(
            np.concatenate((np.zeros(2 * n), np.full(blocks, 1 / blocks))),
            A_ub=coo_array((np.concatenate(values), place), shape=(len(row) + cuts, 2 * n + blocks)).tocsr(),
            b_ub=np.concatenate((-fixed_ms[block, device], np.full(cuts, -2.0))),
            A_eq=coo_array((np.ones(n), (np.zeros(n, np.int64), devices)), shape=(1, 2 * n + blocks)).tocsr(),
            b_eq=[1.0],
            bounds=np.stack(
                (np.concatenate((low, 1 / high, floor_ms)), np.concatenate((high, np.full(n + blocks, np.inf)))), axis=1
            ),
        )
        if found.x is None:
            break
        split = found.x[:n] / found.x[:n].sum()
        inside = bool(((split > low * (1 + 1e-9)) & (split < high * (1 - 1e-9))).all())
        took_ms = float(np.maximum(least_ms, (fixed_ms + air_ms / split).max(axis=1)).mean())
        if inside and min(best_ms, took_ms) - found.fun <= _GAP * best_ms:
            best = split if took_ms < best_ms else best
            break
        tangents.append(split)
        if took_ms < best_ms:
            best = split
        if inside or took_ms >= best_ms:
            width /= 3
    shares[used] = best
    shares = np.maximum(shares, _LEAST)
    result: Times = shares / shares.sum()
    return result


def _roughly(air_ms: Times, fixed_ms: Times) -> Times:
    """Find about the best shares by multiplicative steps along the subgradient, ever smaller ones."""
    shares: Times = np.sqrt(air_ms.mean(axis=0))
    shares /= shares.sum()
    best, best_ms, blocks = shares, np.inf, np.arange(len(air_ms))
    for step in range(_STEPS):
        finish_ms = fixed_ms + air_ms / shares
        last = finish_ms.argmax(axis=1)
        if (mean_ms := float(finish_ms[blocks, last].mean())) < best_ms:
            best, best_ms = shares, mean_ms
        pull = np.bincount(last, air_ms[blocks, last] / shares[last], len(shares))
        shares = shares * np.exp(0.5 / np.sqrt(step + 1) * pull / pull.max())
        shares = shares / shares.sum()
    return best
