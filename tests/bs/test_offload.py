"""What the base station takes over from its devices: never to the block's harm, and not far from the best there is."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from devices import random_model

from wdmoe.bs.airtime import LatencyModel, Load, Medium, makespan, pooled_root
from wdmoe.bs.offload import take_over
from wdmoe.bs.routing import Ints

MEDIA: tuple[Medium, ...] = ("own", "shared", "pooled")
TOKENS = 12
media = pytest.mark.parametrize("medium", MEDIA)


def without_link(model: LatencyModel, station: int) -> LatencyModel:
    """Let one of the devices be the base station."""
    there = np.arange(model.n_devices) != station
    return replace(
        model,
        way_ms=model.way_ms * there,
        down_ms=model.down_ms * there,
        up_ms=model.up_ms * there,
        staging_ms=model.staging_ms * there,
    )


def block_ms(owner: Ints, counts: Ints, model: LatencyModel, station: int) -> float:
    """Predict the block with the functions that policies are told times by."""

    def total_ms(chosen: Ints) -> float:
        rows = np.minimum(np.bincount(owner[chosen], counts[chosen], model.n_devices), TOKENS).astype(np.int64)
        return makespan(Load(rows, owner[chosen], counts[chosen]), model).total_ms

    asked = np.flatnonzero(counts)
    return max(total_ms(asked[owner[asked] == station]), total_ms(asked[owner[asked] != station]))


@media
def test_it_is_never_worse_and_near_the_best_of_all_subsets(medium: Medium) -> None:
    rng = np.random.default_rng(0)
    over: list[float] = []
    for _ in range(60):
        station = int(rng.integers(4))
        model = without_link(random_model(rng, 4, medium), station)
        model = replace(model, slowness=model.slowness * np.where(np.arange(4) == station, rng.uniform(0.3, 4), 1.0))
        devices = [k for k in range(4) if k != station]
        owner = np.array([devices[e % 3] for e in range(8)])
        counts, kept = rng.integers(0, TOKENS, 8), rng.random(8) < 0.7
        before_ms = block_ms(owner, counts, model, station)
        found = take_over(owner, counts, TOKENS, kept, station, model)
        moved = np.flatnonzero(found != owner)
        assert kept[moved].all() and (found[moved] == station).all() and counts[moved].all()
        found_ms = block_ms(found, counts, model, station)
        assert found_ms <= before_ms + 1e-9
        best_ms = before_ms
        choices = [e for e in np.flatnonzero(kept).tolist() if counts[e]]
        for size in range(1, len(choices) + 1):
            for subset in itertools.combinations(choices, size):
                tried = owner.copy()
                tried[list(subset)] = station
                best_ms = min(best_ms, block_ms(tried, counts, model, station))
        over.append(found_ms / best_ms if best_ms else 1.0)
    assert np.mean(over) < 1.05 and max(over) < 1.5


@media
def test_how_fast_it_is_decides_how_much_it_takes(medium: Medium) -> None:
    model = without_link(random_model(np.random.default_rng(1), 3, medium), 0)
    owner, counts, kept = np.array([1, 1, 2, 2]), np.array([5, 9, 3, 7]), np.ones(4, np.bool_)
    taken = []
    for slowness in (1e-6, 1.0, 1e6):
        changed = replace(model, slowness=model.slowness * np.array([slowness, 1, 1]))
        taken.append(int((take_over(owner, counts, TOKENS, kept, 0, changed) == 0).sum()))
    assert taken[0] == 4 and taken[0] >= taken[1] >= taken[2] == 0


def test_what_keeps_it_busy_otherwise_counts() -> None:
    model = without_link(random_model(np.random.default_rng(1), 3, "own"), 0)
    model = replace(model, slowness=model.slowness * np.array([1e-6, 1, 1]))
    owner, counts, kept = np.array([1, 1, 2, 2]), np.array([5, 9, 3, 7]), np.ones(4, np.bool_)
    busy = replace(model, way_ms=np.array([1e3, *model.way_ms[1:]]))
    np.testing.assert_array_equal(take_over(owner, counts, TOKENS, kept, 0, busy), owner)


def test_what_nobody_else_can_run_stays_at_the_base_station() -> None:
    model = without_link(random_model(np.random.default_rng(2), 2, "own"), 0)
    model = replace(model, slowness=model.slowness * np.array([1e6, 1]))
    owner = take_over(np.array([0, 1, 1]), np.array([4, 4, 4]), TOKENS, np.ones(3, np.bool_), 0, model)
    assert owner.tolist() == [0, 1, 1]


@media
def test_a_device_without_a_link_takes_no_part_in_the_air(medium: Medium) -> None:
    """Its block time in the model is its own computing, and the others' is what it is without it."""
    rng = np.random.default_rng(3)
    for slowness in (0.01, 1.0, 100.0):
        model = without_link(random_model(rng, 4, medium), 3)
        model = replace(model, slowness=model.slowness * np.array([1, 1, 1, slowness]))
        others = Load(np.array([5, 6, 7, 0]), np.array([0, 1, 2]), np.array([5, 6, 7]))
        own = Load(np.array([0, 0, 0, 9]), np.array([3]), np.array([9]))
        both = Load(np.array([5, 6, 7, 9]), np.array([0, 1, 2, 3]), np.array([5, 6, 7, 9]))
        own_ms = float(model.tables[3, 9] * model.slowness[3])
        assert makespan(own, model).total_ms == pytest.approx(own_ms)
        expected_ms = max(own_ms, makespan(others, model).total_ms)
        assert makespan(both, model).total_ms == pytest.approx(expected_ms, rel=1e-9)


def test_a_band_is_not_divided_faster_than_the_last_who_needs_none_of_it() -> None:
    assert pooled_root([3.0, 2.0, 0.0], [1.0, 1.0, 50.0]) == 50.0
    assert pooled_root([3.0, 2.0, 0.0], [1.0, 1.0, 0.5]) == pytest.approx(6.0)
