"""Stored bytes become the weights that docs/bundle-format.md says they are."""

from __future__ import annotations

import numpy as np
import pytest

from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.quantised import StoredMatrix, expert_layout, expert_matrices, stored_layout, to_float32


def test_int8_is_a_byte_less_128_times_the_scale_of_its_row() -> None:
    stored = np.array([[1, 128, 255] + 13 * [128], [0, 129, 127] + 13 * [128]], np.uint8)
    scale = np.array([0.5, 2.0], np.float16)
    assert to_float32(stored, scale, 3).tolist() == [[-63.5, 0, 63.5], [-256, 2, -2]]


def test_int4_is_a_nibble_less_8_times_the_scale_of_its_group_and_the_low_one_comes_first() -> None:
    stored = np.full((1, 2, 64), 0x88, np.uint8)
    stored[0, 0, 0], stored[0, 1, 0] = 0x0F, 0xA9
    scale = np.array([[0.5, 4.0]], np.float16)
    weights = to_float32(stored, scale, 130)
    assert weights.shape == (1, 130)
    assert (weights[0, 0], weights[0, 1], weights[0, 128], weights[0, 129]) == (3.5, -4.0, 4.0, 8.0)
    assert np.count_nonzero(weights) == 4


def test_rows_are_padded_to_what_the_kernels_take() -> None:
    assert stored_layout("w", 3, 24, "int8") == {"w": ("U8", (3, 32)), "w.scale": ("F16", (3,))}
    assert stored_layout("w", 3, 130, "int4") == {"w": ("U8", (3, 2, 64)), "w.scale": ("F16", (3, 2))}
    assert stored_layout("w", 3, 24, "fp16") == {"w": ("F16", (3, 24))}
    assert list(expert_layout(32, 24, "int8")) == [
        "gate_proj", "gate_proj.scale", "up_proj", "up_proj.scale", "down_proj", "down_proj.scale",
    ]  # fmt: skip


def test_some_rows_of_a_matrix_are_those_rows() -> None:
    rng = np.random.default_rng(0)
    stored, scale = rng.integers(0, 256, (5, 2, 64), np.uint8), rng.random((5, 2)).astype(np.float16)
    matrix = StoredMatrix(stored, scale, 200)
    assert (matrix.rows, matrix.size) == (5, 1000)
    np.testing.assert_array_equal(matrix.float32(1, 4), matrix.float32()[1:4])


def test_a_file_without_scales_is_refused() -> None:
    tensors = {name: np.zeros((4, 16), np.uint8) for name in ("gate_proj", "up_proj", "down_proj")}
    with pytest.raises(BundleError, match=r"some/file: has no tensor 'gate_proj\.scale'"):
        expert_matrices(tensors, "some/file")
