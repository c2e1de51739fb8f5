"""Requests made of a plan, against a loop over pairs."""

from __future__ import annotations

import numpy as np
import pytest

from wdmoe.bs.dispatch import combine, entries, split_by_device
from wdmoe.bs.routing import Plan, route
from wdmoe.runtime.messages import decode, encode


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("devices", [1, 3])
def test_each_pair_that_is_kept_is_asked_for_once_and_each_row_travels_once_to_a_device(
    tokens: int, devices: int
) -> None:
    rng = np.random.default_rng(tokens)
    routing = route(rng.standard_normal((tokens, 8)).astype(np.float32), 3, True)
    hidden = rng.standard_normal((tokens, 4)).astype(np.float32)
    keep = rng.random(routing.experts.shape) < 0.7
    owner = rng.permutation(np.arange(8) % devices)
    names = tuple(f"device-{k}" for k in range(devices))
    shipments = split_by_device(5, routing, Plan(keep, routing.weights * keep), owner, names, hidden, "fp32")

    asked: dict[tuple[int, int], float] = {}
    for shipment in shipments:
        decode([bytes(frame) for frame in encode(shipment.message())], 4)  # what a device checks
        assert shipment.request.block == 5 and (np.diff(shipment.rows) > 0).all()
        np.testing.assert_array_equal(shipment.packed, hidden[shipment.rows])
        for expert, row, weight in zip(*entries(shipment.request), strict=True):
            assert names[owner[expert]] == shipment.device
            asked[int(shipment.rows[row]), int(expert)] = float(weight)
    wanted = {
        (token, int(routing.experts[token, slot])): float(routing.weights[token, slot])
        for token, slot in zip(*np.nonzero(keep), strict=True)
    }
    assert asked == wanted
    assert [shipment.device for shipment in shipments] == sorted({names[owner[expert]] for _, expert in wanted})


def test_partial_sums_meet_at_their_rows() -> None:
    whole, part = np.full((3, 2), 1.0, np.float32), np.full((2, 2), 10.0, np.float32)
    shared = np.full((3, 2), 100.0, np.float32)
    total = combine(3, 2, [(np.arange(3), whole), (np.array([0, 2]), part)], None, shared)
    np.testing.assert_array_equal(total[:, 0], [111, 101, 111])
    half_lost = combine(3, 2, [(np.arange(3), whole)], np.array([0.5, 0, 1], np.float32), None)
    np.testing.assert_array_equal(half_lost[:, 0], [2, 1, 0])
