"""Any placement answers alike; experts on two devices stand in for each other wherever they lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from inprocess import open_system, run_sequence

from wdmoe.export.placement import PlacementOptions
from wdmoe.export.replacing import place_again

PROMPT = list(b"How does one keep bread fresh?")


@pytest.mark.parametrize(
    "options",
    [PlacementOptions(devices=2), PlacementOptions(balance=True, speeds=(3.0, 1.0, 2.0)), PlacementOptions(replicas=3)],
    ids=["two devices", "balanced", "replicas"],
)
def test_every_placement_gives_the_same_answer(any_bundle: Path, tmp_path: Path, options: PlacementOptions) -> None:
    place_again(any_bundle, tmp_path / "placed", options.place(2, 8))
    with open_system(any_bundle) as system:
        expected = run_sequence(system, PROMPT)
    with open_system(tmp_path / "placed") as system:
        np.testing.assert_allclose(run_sequence(system, PROMPT), expected, atol=1e-5)


def test_with_a_replica_of_every_expert_any_device_may_be_lost(bundle: Path, tmp_path: Path) -> None:
    place_again(bundle, tmp_path / "placed", PlacementOptions(replicas=8).place(2, 8))
    for lost in range(4):
        with open_system(tmp_path / "placed") as system:
            expected = run_sequence(system, PROMPT)
            system.link.peers[f"device-{lost}".encode()] = lambda frames: []
            np.testing.assert_allclose(run_sequence(system, PROMPT), expected, atol=1e-5)
