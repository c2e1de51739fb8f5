from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.tensor_file import map_tensor, map_tensors, read_spans, write_tensors

TENSORS: dict[str, npt.NDArray[Any]] = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.arange(5, dtype=np.float16),
    "ids": np.array([[1], [2]], np.int64),
    "empty": np.empty((0, 4), np.float32),
}


def test_tensors_survive_write_and_read(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t.safetensors", TENSORS)
    got = map_tensors(tmp_path / "t.safetensors")
    assert set(got) == set(TENSORS)
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(got[name], tensor)
        assert got[name].dtype == tensor.dtype


def test_the_library_reads_what_we_write_and_we_read_what_it_writes(tmp_path: Path) -> None:
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    write_tensors(tmp_path / "ours", TENSORS)
    for name, tensor in safetensors_numpy.load_file(tmp_path / "ours").items():
        np.testing.assert_array_equal(tensor, TENSORS[name])
    safetensors_numpy.save_file(TENSORS, tmp_path / "theirs")
    for name, tensor in map_tensors(tmp_path / "theirs").items():
        np.testing.assert_array_equal(tensor, TENSORS[name])


def test_spans_are_byte_ranges_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    assert write_tensors(path, TENSORS) == read_spans(path)
    span = read_spans(path)["a"]
    raw = path.read_bytes()[span.offset_bytes : span.offset_bytes + span.size_bytes]
    assert raw == TENSORS["a"].tobytes()
    np.testing.assert_array_equal(map_tensor(path, span), TENSORS["a"])


@pytest.mark.parametrize("cut", [0, 4, 40, 200, -1])
def test_a_cut_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(BundleError, match=r"t\.safetensors"):
        read_spans(path)


def test_a_header_that_lies_about_a_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes().replace(b'"shape":[2,3]', b'"shape":[2,4]'))
    with pytest.raises(BundleError, match="does not fill"):
        read_spans(path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, TENSORS)
    before = path.read_bytes()
    complex_numbers = np.zeros(3, np.complex64)  # a type that the format does not have
    with pytest.raises(KeyError):
        write_tensors(path, {"a": complex_numbers})
    assert path.read_bytes() == before
