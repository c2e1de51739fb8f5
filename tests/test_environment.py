"""What the benchmarks share: a measurement is repeated while others disturb it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripts.bench._environment import CpuUse, undisturbed


@pytest.mark.parametrize(
    ("shares", "kept", "attempts", "disturbed"),
    [
        ([0.01], 0, 1, False),
        ([0.4, 0.02], 1, 2, False),
        ([0.4, 0.2, 0.3], 1, 3, True),
        ([None], 0, 1, False),  # where the kernel does not say
    ],
)
def test_the_least_disturbed_measurement_counts(
    shares: list[float | None], kept: int, attempts: int, disturbed: bool
) -> None:
    coming, made = iter(shares), iter(range(len(shares)))

    class Use(CpuUse):
        def since(self) -> dict[str, float | None]:
            return {"others_cpu_share": next(coming)}

    measured, said = undisturbed(lambda: next(made), 3, Use)
    assert measured == kept
    assert said == {"others_cpu_share": shares[kept] or 0.0, "disturbed": disturbed, "attempts": attempts}
