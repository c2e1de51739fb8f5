"""The file that holds a trained carving: what is written is read back, whatever is wrong with it is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wdmoe.export.carve import BlockPlan, CarveShape
from wdmoe.export.carve_artefact import GROUPS, NORMS, BlockChange, CarveArtefact, read_artefact, write_artefact
from wdmoe.export.low_rank import LowRank
from wdmoe.runtime.errors import CheckpointError
from wdmoe.runtime.tensor_file import write_tensors

SHAPE = CarveShape(shared=4, experts=2, expert_neurons=4, experts_per_token=1)
SOURCE = "ab" * 32


def halves(rng: np.random.Generator, *shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return rng.standard_normal(shape).astype(np.float16).astype(np.float32)


def artefact(rng: np.random.Generator) -> CarveArtefact:
    def change(outputs: int, inputs: int) -> LowRank:
        return LowRank(halves(rng, 2, inputs), 1e-3 * halves(rng, outputs, 2))

    plans = [
        BlockPlan(
            rng.integers(0, 10, SHAPE.neurons),
            halves(rng, 2, 6),
            halves(rng, SHAPE.neurons),
            (change(6, 4), change(6, 4)),
        )
        for _ in range(3)
    ]
    changes = [
        BlockChange({group: change(8, 6) for group in GROUPS}, {norm: halves(rng, 6) for norm in NORMS}) for _ in plans
    ]
    return CarveArtefact(SHAPE, tuple(plans), tuple(changes), halves(rng, 6))


def near(got: LowRank, wanted: LowRank) -> bool:
    """Within what rounding both factors to 1/127 of a rank's largest element allows."""
    peaks = np.abs(wanted.out).max(axis=0) @ np.abs(wanted.into).max(axis=1)
    return bool(np.abs(got.matrix() - wanted.matrix()).max() <= peaks / 127 * 1.1)


def test_an_artefact_survives_write_and_read(tmp_path: Path) -> None:
    written = artefact(np.random.default_rng(0))
    write_artefact(tmp_path / "a.safetensors", written, SOURCE)
    read = read_artefact(tmp_path / "a.safetensors", SOURCE)
    assert read.shape == SHAPE
    for got, wanted in zip(read.blocks, written.blocks, strict=True):
        np.testing.assert_array_equal(got.permutation, wanted.permutation)
        np.testing.assert_array_equal(got.router, wanted.router)
        np.testing.assert_array_equal(got.scales, wanted.scales)
        assert all(near(*pair) for pair in zip(got.deltas, wanted.deltas, strict=True))
    for mine, theirs in zip(read.changes, written.changes, strict=True):
        assert all(near(mine.groups[group], theirs.groups[group]) for group in GROUPS)
        for norm in NORMS:
            np.testing.assert_array_equal(mine.norms[norm], theirs.norms[norm])
    assert read.final_norm is not None
    np.testing.assert_array_equal(read.final_norm, written.final_norm)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_artefact_without_changes_has_none_when_read(tmp_path: Path) -> None:
    plan = BlockPlan(np.arange(SHAPE.neurons), np.zeros((2, 6), np.float32), np.ones(SHAPE.neurons, np.float32))
    write_artefact(tmp_path / "a.safetensors", CarveArtefact(SHAPE, (plan,)), SOURCE)
    read = read_artefact(tmp_path / "a.safetensors", SOURCE)
    assert (read.changes, read.final_norm, read.blocks[0].deltas) == ((), None, ())


def test_a_damaged_or_foreign_artefact_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_artefact(path, SOURCE)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_artefact(path, SOURCE)
    write_tensors(path, {"source_sha256": np.zeros(32, np.uint8)})
    with pytest.raises(CheckpointError, match=r"dense weights 0{64}; expected abab"):
        read_artefact(path, SOURCE)


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not make a matrix"):
        LowRank(np.zeros((2, 3), np.float32), np.zeros((4, 3), np.float32))
