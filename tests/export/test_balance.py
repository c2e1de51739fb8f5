"""Balanced placements against brute force; replicas do not move the load."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wdmoe.bs.trace import Trace, TraceInfo, write_trace
from wdmoe.export.balance import add_replicas, balanced, expected_times, read_counts, replicas_left_out
from wdmoe.export.placement import held_by
from wdmoe.runtime.errors import BundleError


@pytest.mark.parametrize("seed", range(12))
def test_a_block_is_nearly_as_level_as_it_can_be(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = (tuple(map(float, rng.zipf(1.6, 7).clip(max=60))),)
    speeds = tuple(map(float, rng.uniform(0.5, 2, 3)))
    placement = tuple((device,) for device in (row[0] for row in balanced(counts, speeds, None)[0]))
    best = min(
        max(expected_times((tuple((d,) for d in choice),), counts, speeds)[0])
        for choice in itertools.product(range(3), repeat=7)
        if set(choice) == {0, 1, 2}
    )
    assert max(expected_times((placement,), counts, speeds)[0]) <= 1.1 * best


def test_equal_counts_and_speeds_come_out_level() -> None:
    counts = ((1.0,) * 8,) * 3
    times = expected_times(balanced(counts, (1.0,) * 4, None), counts, (1.0,) * 4)
    assert times == [[1.0] * 4] * 3


def test_no_device_holds_more_than_its_memory() -> None:
    rng = np.random.default_rng(0)
    counts = tuple(tuple(map(float, rng.zipf(1.5, 8))) for _ in range(6))
    placement = balanced(counts, (10.0, 1.0, 1.0), 16)
    assert [len(held_by(placement, device)) for device in range(3)] == [16, 16, 16]
    with pytest.raises(ValueError, match="3 devices hold 45 experts, the model has 48"):
        balanced(counts, (10.0, 1.0, 1.0), 15)


def test_more_devices_than_experts_of_a_block_take_turns() -> None:
    placement = balanced(((1.0,) * 8,) * 32, (1.0,) * 17, None)
    sizes = [len(held_by(placement, device)) for device in range(17)]
    assert (min(sizes), max(sizes)) == (15, 16)


def test_a_device_that_would_hold_nothing_is_told() -> None:
    with pytest.raises(ValueError, match="device 1 is so slow that it would hold no expert"):
        balanced(((1.0,) * 4,), (1.0, 1e-6), None)


def test_replicas_go_to_the_most_used_experts_and_do_not_move_the_load() -> None:
    counts = ((9.0, 1.0, 5.0, 1.0), (1.0, 1.0, 1.0, 7.0))
    speeds = (1.0, 1.0, 1.0)
    first = (((0,), (0,), (1,), (2,)), ((0,), (2,), (2,), (1,)))
    placement = add_replicas(first, counts, speeds, 1, None)
    assert [[e for e, devices in enumerate(row) if len(devices) == 2] for row in placement] == [[0], [3]]
    assert expected_times(placement, counts, speeds)[0] == expected_times(first, counts, speeds)[0]


@pytest.mark.parametrize("speeds", [(1.0, 1.0, 0.5, 2.0), (1.0, 2.0, 2.0), (1.0,) * 12])
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_replicas_that_keep_level_never_make_a_block_slower(speeds: tuple[float, ...], seed: int | None) -> None:
    used = (1.0,) * 12 if seed is None else tuple(map(float, np.random.default_rng(seed).zipf(1.5, 12).clip(max=40)))
    before = balanced((used,) * 2, speeds, None)
    after = add_replicas(before, (used,) * 2, speeds, 6, None, keep_level=True)
    slowest = [[max(row) for row in expected_times(p, (used,) * 2, speeds)] for p in (before, after)]
    assert all(b <= a * (1 + 1e-9) for a, b in zip(*slowest, strict=True))


def test_a_replica_that_takes_the_load_over_goes_where_that_helps() -> None:
    # Expert 0 is on the last device by name: whoever gets the copy is asked for it from then on.
    first = (((1,), (0,), (1,)),)
    assert add_replicas(first, ((4.0, 1.0, 3.0),), (1.0, 1.0), 1, None, True) == (((0, 1), (0,), (1,)),)
    placement = add_replicas(first, ((4.0, 9.0, 3.0),), (1.0, 1.0), 2, None, True)
    assert placement == (((1,), (0, 1), (1,)),) and replicas_left_out(placement, 2) == 1


def test_replicas_end_where_memory_does() -> None:
    counts = ((9.0, 1.0, 5.0, 1.0),)
    first = (((0,), (0,), (1,), (1,)),)
    assert add_replicas(first, counts, (1.0, 1.0), 4, 2) == first
    assert add_replicas(first, counts, (1.0, 1.0), 4, 3) == (((0, 1), (0,), (0, 1), (1,)),)


def test_without_keeping_level_every_expert_gets_its_second_device_where_that_costs_least() -> None:
    first = (((0,), (1,), (2,), (2,)),)
    placement = add_replicas(first, ((1.0, 6.0, 1.0, 8.0),), (1.0, 1.0, 1.0), 4, None)
    assert replicas_left_out(placement, 4) == 0 and placement[0][3] == (0, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ([[1, 2]], "expected 2 blocks of 3 counts"),
        ([[1, 2, 3], [1, 2]], "block 1 is not 3 counts"),
        ([[1, 2, 3], [1, 2, -1]], "block 1 is not 3 counts"),
        ({"counts": [[1, 2, 3], [0, 0, 0]]}, "block 1 has no choice"),
    ],
)
def test_counts_that_do_not_fit_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "counts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(BundleError, match=message):
        read_counts(path, 2, 3)


def test_a_recorded_trace_is_read_for_its_counts(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    info = TraceInfo("wdmoe-trace", 1, "0", "tiny", "0" * 64, 1, True, {}, {})
    counts = np.array([[3, 0, 1], [2, 2, 0]])
    shape = np.zeros((2, 4, 3), np.float16)
    write_trace(path, Trace(info, shape, np.array([0, 4]), counts, np.zeros((2, 3), np.int64)))
    assert read_counts(path, 2, 3) == ((3.0, 0.0, 1.0), (2.0, 2.0, 0.0))
    with pytest.raises(BundleError, match="expected 3 blocks of 3 counts"):
        read_counts(path, 3, 3)
    path.write_bytes(b"PK no")
    with pytest.raises(BundleError, match="not a trace of wdmoe-bs trace"):
        read_counts(path, 2, 3)
