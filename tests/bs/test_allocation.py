from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Literal

import numpy as np
import pytest
from devices import random_model

from wdmoe.bs.airtime import Ints, LatencyModel, Load, makespan
from wdmoe.bs.allocation import Radio, best_order, per_block, static, uniform

Rate = Literal["linear", "shannon"]
RATES: tuple[Rate, ...] = ("linear", "shannon")


def random_radio(rng: np.random.Generator, n: int, rate: Rate) -> Radio:
    bandwidth_hz = 20e6
    # Shannon: P g / N0 from 3 to 1,000 times the band, so that efficiency lies between 2 and 10 bit/s/Hz.
    quality = rng.uniform(1, 6, (2, n)) if rate == "linear" else bandwidth_hz * 10 ** rng.uniform(0.5, 3, (2, n))
    return Radio(bandwidth_hz, 65_536.0, quality[0], quality[1], rate)


def random_load(rng: np.random.Generator, n: int) -> Load:
    rows: Ints = rng.integers(0, 30, n)
    rows[rng.integers(n)] += 1
    return Load(rows, np.arange(n), rows)


def totals_ms(load: Load, devices: LatencyModel, radio: Radio, shares_hz: np.ndarray) -> np.ndarray:
    """Block times by the equations of the system model, of many splits [..., K]."""
    at = np.flatnonzero(load.rows)
    b = shares_hz[..., at]
    rates = [b * q[at] if radio.rate == "linear" else b * np.log2(1 + q[at] / b) for q in (radio.down, radio.up)]
    air_ms = 1e3 * load.rows[at] * radio.row_bits * (1 / rates[0] + 1 / rates[1])
    result: np.ndarray = (air_ms + (2 * devices.way_ms + load.compute_ms(devices))[at]).max(axis=-1)
    return result


def total_ms(load: Load, devices: LatencyModel, radio: Radio, shares_hz: np.ndarray) -> float:
    return float(totals_ms(load, devices, radio, shares_hz))


def best_split_ms(loads: list[Load], devices: LatencyModel, radio: Radio) -> float:
    """The least sum of block times over three devices, on grids that close in: it is convex."""
    centre, reach, best = np.array([0.5, 0.5]), 0.5, np.inf
    for _ in range(30):
        steps = np.linspace(-reach, reach, 41)
        x, y = (np.clip(c + steps, 1e-9, 1 - 1e-9) for c in centre)
        x, y = np.meshgrid(x, y)
        shares = radio.bandwidth_hz * np.stack((x, (1 - x) * y, (1 - x) * (1 - y)), axis=-1)
        cost = sum((totals_ms(load, devices, radio, shares) for load in loads), np.zeros(x.shape))
        at = np.unravel_index(cost.argmin(), cost.shape)
        centre, reach, best = np.array([x[at], y[at]]), reach * 0.4, min(best, float(cost[at]))
    return best


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("seed", range(4))
def test_per_block_is_within_a_millionth_of_the_best_split(rate: Rate, seed: int) -> None:
    rng = np.random.default_rng(seed)
    devices, radio, load = random_model(rng, 3, "own"), random_radio(rng, 3, rate), random_load(rng, 3)
    found = per_block(load, devices, radio)
    best_ms = best_split_ms([load], devices, radio)
    assert total_ms(load, devices, radio, found.shares_hz) == pytest.approx(best_ms, rel=1e-6)
    assert found.total_ms == pytest.approx(best_ms, rel=1e-6)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("n", [1, 2, 8, 100])
@pytest.mark.parametrize("seed", range(4))
def test_per_block_uses_the_whole_band_and_all_finish_together(rate: Rate, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    devices, radio, load = random_model(rng, n, "own"), random_radio(rng, n, rate), random_load(rng, n)
    found = per_block(load, devices, radio)
    assert found.shares_hz.sum() == pytest.approx(radio.bandwidth_hz, rel=1e-12)
    assert ((found.shares_hz > 0) == (load.rows > 0)).all()
    block = makespan(load, radio.model(devices, np.where(load.rows > 0, found.shares_hz, 1.0)))
    np.testing.assert_allclose(block.finish_ms[load.rows > 0], found.total_ms, rtol=1e-8)
    assert found.total_ms <= total_ms(load, devices, radio, uniform(radio)) * (1 + 1e-12)


@pytest.mark.parametrize("rate", RATES)
def test_the_order_of_the_devices_does_not_matter(rate: Rate) -> None:
    rng = np.random.default_rng(0)
    devices, radio, load = random_model(rng, 6, "own"), random_radio(rng, 6, rate), random_load(rng, 6)
    order = rng.permutation(6)
    names = ("table", "slowness", "staging_ms", "way_ms", "down_ms", "up_ms")
    turned = per_block(
        Load(load.rows[order], np.arange(6), load.rows[order]),
        replace(devices, **{name: getattr(devices, name)[order] for name in names}),
        replace(radio, down=radio.down[order], up=radio.up[order]),
    )
    np.testing.assert_allclose(turned.shares_hz, per_block(load, devices, radio).shares_hz[order], rtol=1e-8)


def test_a_pooled_band_takes_what_per_block_gives() -> None:
    rng = np.random.default_rng(4)
    devices, radio, load = random_model(rng, 5, "own"), random_radio(rng, 5, "linear"), random_load(rng, 5)
    pooled = makespan(load, radio.whole(devices, "pooled"))
    assert pooled.total_ms == pytest.approx(per_block(load, devices, radio).total_ms, rel=1e-9)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("seed", range(3))
def test_static_is_within_a_millionth_of_the_best_split(rate: Rate, seed: int) -> None:
    pytest.importorskip("scipy")
    rng = np.random.default_rng(seed)
    devices, radio = random_model(rng, 3, "own"), random_radio(rng, 3, rate)
    loads = [random_load(rng, 3) for _ in range(6)]
    shares = static(loads, devices, radio)
    assert shares.sum() == pytest.approx(radio.bandwidth_hz)
    ours = sum(total_ms(load, devices, radio, shares) for load in loads)
    assert ours == pytest.approx(best_split_ms(loads, devices, radio), rel=1e-6)


def test_static_gives_nothing_to_a_device_that_is_never_asked() -> None:
    pytest.importorskip("scipy")
    rng = np.random.default_rng(0)
    devices, radio = random_model(rng, 3, "own"), random_radio(rng, 3, "linear")
    rows = np.array([3, 0, 5])
    shares = static([Load(rows, np.arange(3), rows)], devices, radio)
    assert shares[1] == 0 and shares.sum() == pytest.approx(radio.bandwidth_hz)
    np.testing.assert_allclose(shares, per_block(Load(rows, np.arange(3), rows), devices, radio).shares_hz, rtol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_order_is_the_best(seed: int) -> None:
    rng = np.random.default_rng(seed)
    devices, load = random_model(rng, 4, "shared"), random_load(rng, 4)
    ours = makespan(load, devices, best_order(load, devices)).total_ms
    assert ours == min(makespan(load, devices, order).total_ms for order in permutations(range(4)))
    assert ours <= makespan(load, devices).total_ms


def test_too_many_devices_to_try_all_orders_are_refused() -> None:
    rng = np.random.default_rng(0)
    rows = np.ones(8, np.int64)
    with pytest.raises(ValueError, match="8 devices have too many orders"):
        best_order(Load(rows, np.arange(8), rows), random_model(rng, 8, "shared"))
