from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from devices import random_model

from wdmoe.bs.airtime import (
    LatencyModel,
    Load,
    latency_model,
    linear_model,
    load_of,
    makespan,
    pooled_root,
)
from wdmoe.bs.latency import DeviceLatency
from wdmoe.profiles.device_profile import interpolate

CURVE = ((1, 1.0), (4, 1.0), (8, 2.0))


def random_load(rng: np.random.Generator, n_devices: int) -> Load:
    rows = rng.integers(0, 12, n_devices)
    return Load(rows, np.arange(n_devices), rows)


def played(sequence: list[tuple[str, int]], load: Load, model: LatencyModel) -> float:
    """Play a schedule on one channel, message by message, as long as nobody sends a reply that is not ready."""
    compute_ms = load.compute_ms(model)
    now_ms, ready_ms, done_ms = 0.0, {}, 0.0
    for kind, k in sequence:
        if kind == "request":
            now_ms += load.rows[k] * model.down_ms[k]
            ready_ms[k] = now_ms + model.way_ms[k] + compute_ms[k]
        else:
            now_ms = max(now_ms, ready_ms[k]) + load.rows[k] * model.up_ms[k]
            done_ms = max(done_ms, now_ms + model.way_ms[k])
    return done_ms


def test_on_own_links_a_device_takes_what_its_live_model_says() -> None:
    devices = [DeviceLatency(CURVE, 0.5, 1.5, 0.25), DeviceLatency(CURVE, 0.25, 1.0, 0.0), DeviceLatency(CURVE, 9.0)]
    model = latency_model(devices, up_to=20)
    load = Load(np.array([7, 12, 0]), np.array([0, 0, 1]), np.array([6, 2, 12]))
    block = makespan(load, model)
    expected = [devices[0].request_ms([6, 2], rows=7), devices[1].request_ms([12]), 0.0]
    np.testing.assert_allclose(block.finish_ms, expected, rtol=1e-12)
    assert block.total_ms == max(block.finish_ms)


def test_the_tables_are_the_curve() -> None:
    model = latency_model([DeviceLatency(CURVE, 0.0), DeviceLatency(((2, 3.0),), 0.0)], up_to=50)
    for k, curve in enumerate((CURVE, ((2, 3.0),))):
        expected = [interpolate(curve, n) for n in range(51)]
        np.testing.assert_allclose(model.call_ms(np.full(51, k), np.arange(51)), expected, rtol=1e-12)


def test_a_row_travels_once_to_a_device_that_has_two_experts_of_a_token() -> None:
    experts, owner = np.array([[0, 1, 2], [3, 2, 1]]), np.array([0, 0, 1, 1])
    keep = np.array([[True, True, True], [True, True, False]])
    load = load_of(experts, keep, owner[experts], 4, 3)
    np.testing.assert_array_equal(load.rows, [1, 2, 0])
    np.testing.assert_array_equal(load.device, [0, 0, 1, 1])
    np.testing.assert_array_equal(load.tokens, [1, 1, 2, 1])


@pytest.mark.parametrize("seed", range(10))
def test_no_interleaving_of_requests_and_replies_beats_all_requests_first(seed: int) -> None:
    rng = np.random.default_rng(seed)
    model, load = random_model(rng, 3, "shared"), random_load(rng, 3)
    loaded = [k for k in range(3) if load.rows[k]]
    events = [(kind, k) for kind in ("request", "reply") for k in loaded]
    lawful = (
        list(s) for s in permutations(events) if all(s.index(("request", k)) < s.index(("reply", k)) for k in loaded)
    )
    best = min(played(s, load, model) for s in lawful)
    ours = min(makespan(load, model, order).total_ms for order in permutations(range(3)))
    assert ours == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_time_on_a_shared_channel_is_conserved(seed: int) -> None:
    rng = np.random.default_rng(seed)
    model, load = random_model(rng, 5, "shared"), random_load(rng, 5)
    block = makespan(load, model)
    alone = makespan(load, model.with_rates(model.down_ms, model.up_ms))
    assert block.total_ms >= (load.rows * model.row_air_ms).sum()
    assert (block.finish_ms >= alone.finish_ms - 1e-9).all()
    assert ((block.finish_ms > 0) == (load.rows > 0)).all()


def test_the_send_order_costs_at_most_a_percent_on_average() -> None:
    rng = np.random.default_rng(1)
    ratios = []
    for _ in range(60):
        model, load = random_model(rng, 4, "shared"), random_load(rng, 4)
        best = min(makespan(load, model, order).total_ms for order in permutations(range(4)))
        ratios.append(makespan(load, model).total_ms / max(best, 1e-9) if best else 1.0)
    assert min(ratios) > 1 - 1e-9
    assert np.mean(ratios) < 1.01


@pytest.mark.parametrize("seed", range(10))
def test_a_pooled_band_is_used_up_and_all_finish_together(seed: int) -> None:
    rng = np.random.default_rng(seed)
    model, load = random_model(rng, 6, "pooled"), random_load(rng, 6)
    block = makespan(load, model)
    loaded = load.rows > 0
    fixed_ms = (2 * model.way_ms + load.compute_ms(model))[loaded]
    shares = (load.rows * model.row_air_ms)[loaded] / (block.total_ms - fixed_ms)
    assert shares.sum() == pytest.approx(1, rel=1e-9)
    assert set(block.finish_ms.tolist()) <= {0.0, block.total_ms}


def test_an_idle_block_takes_no_time() -> None:
    none = np.zeros(3, np.int64)
    for medium in ("own", "shared", "pooled"):
        model = random_model(np.random.default_rng(0), 3, medium)
        assert makespan(Load(none, np.arange(3), none), model).total_ms == 0


def test_a_linear_model_counts_rows() -> None:
    block = makespan(Load(np.array([3, 0, 2]), np.arange(3), np.array([3, 0, 2])), linear_model(np.arange(1.0, 4), 3))
    np.testing.assert_array_equal(block.finish_ms, [3, 0, 6])


def test_arrays_of_different_lengths_are_refused() -> None:
    one, two = np.zeros(1), np.zeros(2)
    with pytest.raises(ValueError, match="1 devices has arrays of length"):
        LatencyModel(np.zeros((1, 2)), np.zeros(1, np.int64), one, one, two, one, one)


def test_many_devices_share_a_band_as_few_do(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    air, fixed = rng.exponential(1.0, 200).tolist(), rng.uniform(0, 9, 200).tolist()
    air[3] = 0.0
    for fixed[3] in (1.0, 1e4):  # one that needs no air may be done last
        many = pooled_root(air, fixed)
        assert sum(a / (many - f) for a, f in zip(air, fixed, strict=True) if a) <= 1 + 1e-9
        monkeypatch.setattr("wdmoe.bs.airtime._MANY", 1000)
        assert pooled_root(air, fixed) == pytest.approx(many, rel=1e-12)
        monkeypatch.undo()


def test_the_order_of_requests_is_near_the_best_of_all() -> None:
    over = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        model, rows = random_model(rng, 4, "shared"), rng.integers(1, 30, 4)
        load = Load(rows, np.arange(4), rows)
        best_ms = min(makespan(load, model, order).total_ms for order in permutations(range(4)))
        over.append(makespan(load, model).total_ms / best_ms)
    assert min(over) > 1 - 1e-9 and np.mean(over) < 1.01
