"""Bandwidth: how a band is divided among devices, and in which order requests go where the channel cannot be divided.

    uniform      the same share for every device
    static       one split for all blocks, least sum of block times over some sample of blocks (convex; needs SciPy)
    per-block    anew for each block once its loads are known: exact, the least T for which the shares that bring each
                 device to T sum to the band
    best_order   on one shared channel: the order of the requests, by trying all

A device's share serves both directions, one after the other, as in the system model: t = bits/R_down + bits/R_up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import numpy as np

from wdmoe.bs.airtime import FEW, Ints, LatencyModel, Load, Times, makespan, pooled_root
from wdmoe.runtime.errors import WdmoeError

_TRIED_ORDERS = 7  # devices: 5,040 orders
_MS = 1e3


@dataclass(frozen=True, slots=True)
class Radio:
    """A band that devices share, and what each makes of a hertz."""

    bandwidth_hz: float
    row_bits: float  # one row, one way
    down: Times  # [K], see `rate`
    up: Times  # [K]
    rate: Literal["linear", "shannon"] = "linear"  # linear: bit/s/Hz; shannon: P g / N0 in Hz, R = B log2(1 + it / B)

    def row_ms(self, shares_hz: Times) -> tuple[Times, Times]:
        """Return the time of a row on the way down and up, [K] each; infinite without a share."""
        return self._way_ms(shares_hz, self.down), self._way_ms(shares_hz, self.up)

    def _way_ms(self, shares_hz: Times, quality: Times) -> Times:
        if self.rate == "linear" and shares_hz.all():
            linear_ms: Times = _MS * self.row_bits / (shares_hz * quality)
            return linear_ms
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = shares_hz * quality if self.rate == "linear" else shares_hz * np.log2(1 + quality / shares_hz)
            time_ms: Times = np.where(shares_hz > 0, _MS * self.row_bits / rate, np.inf)
        return time_ms

    def model(self, devices: LatencyModel, shares_hz: Times) -> LatencyModel:
        """Put devices on their shares of the band."""
        return devices.with_rates(*self.row_ms(shares_hz))

    def whole(self, devices: LatencyModel, medium: Literal["shared", "pooled"]) -> LatencyModel:
        """Put devices on the whole band: one channel that they share, or a band yet to be divided."""
        return devices.with_rates(*self.row_ms(np.full(len(self.down), self.bandwidth_hz)), medium)


@dataclass(frozen=True, slots=True)
class Allocation:
    """A division of the band, and the block time it gives."""

    shares_hz: Times  # [K]
    total_ms: float


def uniform(radio: Radio) -> Times:
    """Return the same share for each device, [K] Hz."""
    n = len(radio.down)
    return np.full(n, radio.bandwidth_hz / n)


def per_block(load: Load, devices: LatencyModel, radio: Radio) -> Allocation:
    """Divide the band so that the block is done soonest: all loaded devices finish together.

    Args:
        load: of the block.
        devices: their links do not matter here.
        radio: the band.
    """
    shares_hz = np.zeros(len(load.rows))
    if radio.rate == "linear" and len(load.device) <= FEW:
        return _few_per_block(load, devices, radio)
    loaded = np.flatnonzero(load.rows)
    if len(loaded) == 0:
        return Allocation(shares_hz, 0.0)
    fixed_ms = (2 * devices.way_ms + load.compute_ms(devices))[loaded]
    bits = load.rows[loaded] * radio.row_bits
    down, up = radio.down[loaded], radio.up[loaded]
    if radio.rate == "linear":
        air_ms = _MS * bits * (1 / down + 1 / up) / radio.bandwidth_hz  # with the whole band
        total_ms = pooled_root(air_ms.tolist(), fixed_ms.tolist())
        shares_hz[loaded] = radio.bandwidth_hz * air_ms / (total_ms - fixed_ms)
    else:
        shares, total_ms = _equal_finish(
            fixed_ms.tolist(), bits.tolist(), down.tolist(), up.tolist(), radio.bandwidth_hz
        )
        shares_hz[loaded] = shares
    shares_hz *= radio.bandwidth_hz / shares_hz.sum()  # what rounding left over
    return Allocation(shares_hz, total_ms)


def _few_per_block(load: Load, devices: LatencyModel, radio: Radio) -> Allocation:
    loaded, asked = load.few(devices)
    per_row_ms = _MS * radio.row_bits / radio.bandwidth_hz
    air_ms = [per_row_ms * int(load.rows[k]) * (1 / float(radio.down[k]) + 1 / float(radio.up[k])) for k in loaded]
    fixed_ms = [2 * way + compute for _, way, compute, _ in asked]
    total_ms = pooled_root(air_ms, fixed_ms)
    shares = [air / (total_ms - fixed) for air, fixed in zip(air_ms, fixed_ms, strict=True)]
    scale = radio.bandwidth_hz / sum(shares) if shares else 0.0
    shares_hz = np.zeros(len(load.rows))
    shares_hz[loaded] = [scale * share for share in shares]
    return Allocation(shares_hz, total_ms)


def finish_together(air_ms: Times, fixed_ms: Times) -> Times:
    """Divide a band so that all devices finish at one time T: share = air / (T - fixed).

    Args:
        air_ms: [n], of each device with all the bandwidth; more than 0.
        fixed_ms: [n], what it takes besides.

    Returns:
        [n] shares that sum to 1.
    """
    shares: Times = air_ms / (pooled_root(air_ms.tolist(), fixed_ms.tolist()) - fixed_ms)
    shares /= shares.sum()
    return shares


def static(loads: Sequence[Load], devices: LatencyModel, radio: Radio) -> Times:
    """Find the one split that makes the sum of block times over some blocks least, [K] Hz.

    The sum of maxima of convex functions is convex; as a program: minimise sum T_i, subject to finish_ik(B_k) <= T_i.

    Raises:
        WdmoeError: SciPy is missing; says what to install.
    """
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise WdmoeError(
            f"a static division of the band needs SciPy ({error}): pip install 'wdmoe[scheduler]'"
        ) from error
    rows = np.array([load.rows for load in loads], np.float64)  # [blocks, K]
    fixed_ms = np.array([2 * devices.way_ms + load.compute_ms(devices) for load in loads])
    used = np.flatnonzero(rows.sum(axis=0))
    shares_hz = np.zeros(rows.shape[1])
    if len(used) == 0:
        return uniform(radio)
    rows, fixed_ms = rows[:, used], np.where(rows[:, used] > 0, fixed_ms[:, used], 0.0)
    part = Radio(1.0, radio.row_bits / radio.bandwidth_hz, radio.down[used], radio.up[used], radio.rate)
    if radio.rate == "shannon":
        part = Radio(1.0, part.row_bits, part.down / radio.bandwidth_hz, part.up / radio.bandwidth_hz, "shannon")

    def finish_ms(shares: Times) -> Times:
        down_ms, up_ms = part.row_ms(shares)
        result: Times = rows * (down_ms + up_ms) + fixed_ms
        return result

    def slope_ms(shares: Times) -> Times:
        step = 1e-6 * shares
        result: Times = (finish_ms(shares + step) - finish_ms(shares - step)) / (2 * step)
        return result

    n_blocks, n_used = rows.shape
    start = _balanced(rows, part)
    scale_ms = float(finish_ms(start).max(axis=1).mean())
    variables = np.concatenate((start, finish_ms(start).max(axis=1) / scale_ms))
    gradient = np.concatenate((np.zeros(n_used), np.full(n_blocks, 1 / n_blocks)))

    def slack(x: Times) -> Times:
        result: Times = (x[n_used:, None] - finish_ms(x[:n_used]) / scale_ms).ravel()
        return result

    def slack_slope(x: Times) -> Times:
        jacobian = np.zeros((n_blocks, n_used, n_used + n_blocks))
        jacobian[:, np.arange(n_used), np.arange(n_used)] = -slope_ms(x[:n_used]) / scale_ms
        jacobian[np.arange(n_blocks), :, n_used + np.arange(n_blocks)] = 1.0
        return jacobian.reshape(n_blocks * n_used, -1)

    band = np.concatenate((np.ones(n_used), np.zeros(n_blocks)))
    found = minimize(
        lambda x: float(x[n_used:].mean()),
        variables,
        jac=lambda x: gradient,
        method="SLSQP",
        bounds=[(1e-6, 1.0)] * n_used + [(0.0, None)] * n_blocks,
        constraints=[
            {"type": "ineq", "fun": slack, "jac": slack_slope},
            {"type": "eq", "fun": lambda x: float(band @ x) - 1.0, "jac": lambda x: band},
        ],
        options={"maxiter": 500, "ftol": 1e-14},
    )
    shares = found.x[:n_used] / found.x[:n_used].sum()
    if finish_ms(shares).max(axis=1).sum() > finish_ms(start).max(axis=1).sum():
        shares = start  # the solver went astray: never worse than where it began
    shares_hz[used] = shares * radio.bandwidth_hz
    return shares_hz


def best_order(load: Load, model: LatencyModel) -> Ints:
    """Find the order of requests on a shared channel under which the block is done soonest, by trying all.

    Raises:
        ValueError: too many loaded devices for that; take `airtime.send_order`.
    """
    loaded = np.flatnonzero(load.rows)
    if len(loaded) > _TRIED_ORDERS:
        raise ValueError(f"{len(loaded)} devices have too many orders to try, at most {_TRIED_ORDERS}")
    orders = (np.array(order, np.int64) for order in permutations(loaded.tolist()))
    return min(orders, key=lambda order: makespan(load, model, order).total_ms)


def _balanced(rows: Times, part: Radio) -> Times:
    """Start where shares are in proportion to the time on the air."""
    down_ms, up_ms = part.row_ms(np.ones(rows.shape[1]))
    air = rows.mean(axis=0) * (down_ms + up_ms)
    shares: Times = np.maximum(air, 1e-3 * air.max())
    shares /= shares.sum()
    return shares


def _equal_finish(
    fixed_ms: list[float], bits: list[float], down: list[float], up: list[float], bandwidth_hz: float
) -> tuple[list[float], float]:
    """Bisect on T at Shannon rates; for each T the least bandwidths come from a bisection of their own.

    Both functions are monotone: more bandwidth never makes a device slower, and a later T never asks for more. Newton
    steps, kept inside the bracket, take the place of most halvings.
    """

    def least_hz(k: int, t_ms: float, guess_hz: float) -> float:
        left_ms = t_ms - fixed_ms[k]
        return _inverse(lambda hz: _air_ms(bits[k], down[k], up[k], hz), left_ms, guess_hz, bandwidth_hz)

    n = len(fixed_ms)
    shares = [bandwidth_hz / n] * n
    # With a uniform split all are done by `high`; with the whole band each alone not before `low`.
    high = max(fixed_ms[k] + _air_ms(bits[k], down[k], up[k], shares[k])[0] for k in range(n))
    low = max(fixed_ms[k] + _air_ms(bits[k], down[k], up[k], bandwidth_hz)[0] for k in range(n))
    t_ms = high
    for _ in range(100):
        shares = [least_hz(k, t_ms, shares[k]) for k in range(n)]
        excess = sum(shares) - bandwidth_hz
        low, high = (t_ms, high) if excess > 0 else (low, t_ms)
        if abs(excess) <= 1e-12 * bandwidth_hz or high - low <= 1e-13 * high:
            break
        slope = sum(1 / _air_ms(bits[k], down[k], up[k], shares[k])[1] for k in range(n))  # dB/dT, negative
        newton_ms = t_ms - excess / slope
        t_ms = newton_ms if low < newton_ms < high else (low + high) / 2
    return shares, t_ms


def _air_ms(bits: float, down: float, up: float, hz: float) -> tuple[float, float]:
    """Return time on the air at a bandwidth, and its derivative in ms per Hz."""
    total = slope = 0.0
    for quality in (down, up):
        ratio = quality / hz
        rate = hz * math.log2(1 + ratio)
        change = math.log2(1 + ratio) - ratio / ((1 + ratio) * math.log(2))
        total += _MS * bits / rate
        slope -= _MS * bits / rate**2 * change
    return total, slope


def _inverse(function: Callable[[float], tuple[float, float]], value: float, guess: float, most: float) -> float:
    """Return where a convex falling function with its derivative takes a value, between 0 and `most`."""
    low, high, x = 0.0, most, min(guess, most)
    for _ in range(200):
        at, slope = function(x)
        if at > value:
            low = x
        else:
            high = x
        if abs(at - value) <= 1e-13 * value or high - low <= 1e-14 * high:
            break
        newton = x - (at - value) / slope
        x = newton if low < newton < high else (low + high) / 2
    return x
