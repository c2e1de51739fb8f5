from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from devices import random_model

from wdmoe.bs.airtime import Ints, LatencyModel, Load, Times, makespan
from wdmoe.bs.allocation import parts_ms, per_block, static, uniform, with_shares
from wdmoe.runtime.errors import WdmoeError


def random_load(rng: np.random.Generator, n: int) -> Load:
    rows: Ints = rng.integers(0, 30, n)
    rows[rng.integers(n)] += 1
    return Load(rows, np.arange(n), rows)


def total_ms(load: Load, model: LatencyModel, shares: Times) -> Times:
    """Block times by the equations of the system model, of many splits [..., K]."""
    at = np.flatnonzero(load.rows)
    air, fixed = parts_ms(load, model)
    result: Times = (air[at] / shares[..., at] + fixed[at]).max(axis=-1)
    return result


def best_split_ms(loads: list[Load], model: LatencyModel) -> float:
    """The least sum of block times over three devices, on grids that close in: it is convex."""
    centre, reach, best = np.array([0.5, 0.5]), 0.5, np.inf
    for _ in range(30):
        steps = np.linspace(-reach, reach, 41)
        x, y = (np.clip(c + steps, 1e-9, 1 - 1e-9) for c in centre)
        x, y = np.meshgrid(x, y)
        shares = np.stack((x, (1 - x) * y, (1 - x) * (1 - y)), axis=-1)
        cost = sum((total_ms(load, model, shares) for load in loads), np.zeros(x.shape))
        at = np.unravel_index(cost.argmin(), cost.shape)
        centre, reach, best = np.array([x[at], y[at]]), reach * 0.4, min(best, float(cost[at]))
    return best


@pytest.mark.parametrize("seed", range(6))
def test_per_block_is_within_a_millionth_of_the_best_split(seed: int) -> None:
    rng = np.random.default_rng(seed)
    model, load = random_model(rng, 3, "own"), random_load(rng, 3)
    shares, found_ms = per_block(load, model)
    best_ms = best_split_ms([load], model)
    assert total_ms(load, model, shares) == pytest.approx(best_ms, rel=1e-6)
    assert found_ms == pytest.approx(best_ms, rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 8, 100])
@pytest.mark.parametrize("seed", range(4))
def test_per_block_uses_the_whole_band_and_all_finish_together(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    model, load = random_model(rng, n, "own"), random_load(rng, n)
    shares, found_ms = per_block(load, model)
    assert shares.sum() == pytest.approx(1, rel=1e-12)
    assert ((shares > 0) == (load.rows > 0)).all()
    block = makespan(load, with_shares(model, np.where(load.rows > 0, shares, 1.0)))
    np.testing.assert_allclose(block.finish_ms[load.rows > 0], found_ms, rtol=1e-8)
    assert found_ms <= total_ms(load, model, uniform(n)) * (1 + 1e-12)
    pooled = makespan(load, replace(model, medium="pooled"))
    assert pooled.total_ms == pytest.approx(found_ms, rel=1e-9)


def test_the_order_of_the_devices_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    model, load = random_model(rng, 6, "own"), random_load(rng, 6)
    order = rng.permutation(6)
    names = ("table", "slowness", "staging_ms", "way_ms", "down_ms", "up_ms")
    turned, _ = per_block(
        Load(load.rows[order], np.arange(6), load.rows[order]),
        replace(model, **{name: getattr(model, name)[order] for name in names}),
    )
    np.testing.assert_allclose(turned, per_block(load, model)[0][order], rtol=1e-8)


def test_who_needs_no_air_has_no_share() -> None:
    model = random_model(np.random.default_rng(0), 3, "own")
    model = replace(model, down_ms=np.array([0.0, 0.1, 0.2]), up_ms=np.array([0.0, 0.1, 0.2]))
    rows = np.array([500, 2, 3])
    for slowness in (1.0, 1e3):  # it may be done last
        slow = replace(model, slowness=np.array([slowness, 1.0, 1.0]))
        shares, found_ms = per_block(Load(rows, np.arange(3), np.minimum(rows, 60)), slow)
        assert shares[0] == 0 and shares.sum() == pytest.approx(1)
        assert np.isfinite(found_ms)


@pytest.mark.parametrize("seed", range(5))
def test_static_is_within_a_millionth_of_the_best_split(seed: int) -> None:
    pytest.importorskip("scipy")
    rng = np.random.default_rng(seed)
    model = random_model(rng, 3, "own")
    loads = [random_load(rng, 3) for _ in range(6)]
    shares = static(*(np.array(part) for part in zip(*(parts_ms(load, model) for load in loads), strict=True)))
    assert shares.sum() == pytest.approx(1)
    ours = sum(total_ms(load, model, shares) for load in loads)
    assert ours == pytest.approx(best_split_ms(loads, model), rel=1e-6)


@pytest.mark.parametrize(("blocks", "devices"), [(400, 3), (100, 20)])
def test_no_step_away_from_a_static_split_of_many_blocks_is_any_better(blocks: int, devices: int) -> None:
    pytest.importorskip("scipy")
    rng = np.random.default_rng(0)
    air = rng.poisson(8, (blocks, devices)) * rng.uniform(0.1, 1, devices)
    fixed = np.where(air > 0, rng.uniform(1, 9, (blocks, devices)), 0.0)

    def mean_ms(split: Times) -> float:
        return float((fixed + air / split).max(axis=1).mean())

    shares = static(air, fixed)
    least_ms = mean_ms(shares) * (1 - 1e-6)
    for size in (1e-5, 1e-4, 1e-3, 1e-2, 0.1):
        for _ in range(40):
            other = shares * np.exp(size * rng.standard_normal(devices))
            assert mean_ms(other / other.sum()) >= least_ms


def test_static_gives_next_to_nothing_to_a_device_that_is_never_asked() -> None:
    pytest.importorskip("scipy")
    model, rows = random_model(np.random.default_rng(0), 3, "own"), np.array([3, 0, 5])
    load = Load(rows, np.arange(3), rows)
    shares = static(*(part[None] for part in parts_ms(load, model)))
    assert 0 < shares[1] < 1e-8 and shares.sum() == pytest.approx(1)
    np.testing.assert_allclose(shares, per_block(load, model)[0], rtol=1e-4, atol=1e-8)


def test_without_scipy_static_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(WdmoeError, match=r"needs SciPy .*wdmoe\[scheduler\]"):
        static(np.ones((1, 2)), np.ones((1, 2)))
