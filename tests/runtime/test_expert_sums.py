"""Sums of expert outputs, in both ways they are made, against a loop over pairs."""

from __future__ import annotations

import numpy as np
import pytest

from wdmoe.runtime import expert_sums
from wdmoe.runtime.expert_sums import weighted_sums
from wdmoe.runtime.messages import ExpertRequest, Rows


class Multiplier:
    """Expert e returns e + 1 times its rows."""

    name, version, tolerance = "multiplier", "1", 0.0

    def run(self, block: int, expert: int, rows: Rows) -> Rows:
        return rows * np.float32(expert + 1)


@pytest.mark.parametrize("limit", [0, 1 << 22], ids=["as they come", "at the end"])
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_sums_are_those_of_a_loop_over_pairs(monkeypatch: pytest.MonkeyPatch, limit: int, n: int) -> None:
    monkeypatch.setattr(expert_sums, "_LAID_OUT_FLOATS", limit)
    rng = np.random.default_rng(n)
    rows = rng.standard_normal((n, 16)).astype(np.float32)
    wants = rng.random((6, n)) < 0.4
    wants[0] = True  # every row has an expert, and one expert's rows are one piece
    experts = [e for e in range(6) if wants[e].any()]
    index = np.concatenate([np.flatnonzero(wants[e]) for e in experts])
    weights = rng.random(len(index)).astype(np.float32)
    request = ExpertRequest(
        1, 0, n, "fp32", tuple(experts), tuple(int(wants[e].sum()) for e in experts),
        index.astype("<u4").tobytes(), weights.tobytes(),
    )  # fmt: skip
    expected = np.zeros((n, 16))
    owner = np.repeat(experts, request.counts)
    for expert, row, weight in zip(owner, index, weights, strict=True):
        expected[row] += weight * (expert + 1) * rows[row].astype(np.float64)
    np.testing.assert_allclose(weighted_sums(Multiplier(), request, rows), expected, rtol=2e-6, atol=1e-6)


def test_rows_without_an_expert_get_nothing_and_what_lies_in_memory_does_not_matter() -> None:
    rows = np.ones((3, 4), np.float32)
    index = np.array([0, 2, 2], "<u4")
    request = ExpertRequest(1, 0, 3, "fp32", (0, 1), (2, 1), index.tobytes(), np.array([1, 1, 0.5], "<f4").tobytes())
    sums = weighted_sums(Multiplier(), request, rows)
    np.testing.assert_array_equal(sums[:, 0], [1, 0, 2])
