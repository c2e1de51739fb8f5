"""A new placement is a new bundle of the same id, made of links, as an export would have made it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_checkpoint

from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.export.inspection import inspect_folder
from wdmoe.export.placement import PlacementOptions
from wdmoe.export.replacing import place_again
from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.tensor_file import map_tensors, write_tensors


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", "qwen2_moe", dtype="bfloat16")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    return _export(checkpoint, tmp_path_factory.mktemp("bundle") / "bundle", PlacementOptions())


def _export(checkpoint: Path, out: Path, options: PlacementOptions) -> Path:
    config = ExportConfig(out, placement=options)
    return export_bundle(plan_export(checkpoint, "tiny", config), config).out


def _tree(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    "options", [PlacementOptions(devices=3), PlacementOptions(replicas=2), PlacementOptions(devices=1)]
)
def test_it_is_what_an_export_would_have_made(
    checkpoint: Path, bundle: Path, tmp_path: Path, options: PlacementOptions
) -> None:
    place_again(bundle, tmp_path / "placed", options.place(2, 8))
    assert _tree(tmp_path / "placed") == _tree(_export(checkpoint, tmp_path / "exported", options))
    inspect_folder(tmp_path / "placed")
    assert {path.name for path in tmp_path.iterdir()} == {"placed", "exported"}
    assert next((tmp_path / "placed/experts").iterdir()).stat().st_nlink > 2  # shared with the bundle it is from


def test_device_folders_alone_are_enough(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    shutil.rmtree(copy / "experts")
    place_again(copy, tmp_path / "placed", PlacementOptions(devices=2).place(2, 8))
    inspect_folder(tmp_path / "placed")


def test_graphs_stay_those_that_the_golden_answers_were_made_for(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    for stub in copy.glob("device-*/*.onnx"):
        stub.write_bytes(b"of an older release")
    place_again(copy, tmp_path / "placed", PlacementOptions(devices=2).place(2, 8))
    placed = list((tmp_path / "placed").glob("device-*/*.onnx"))
    assert len(placed) == 16 and {stub.read_bytes() for stub in placed} == {b"of an older release"}


def test_folders_of_two_exports_are_refused(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    path = copy / "device-1" / "golden.safetensors"
    golden = {name: np.array(tensor) for name, tensor in map_tensors(path).items()}
    write_tensors(path, golden | {"input.block_01": golden["input.block_01"] + 1})
    with pytest.raises(BundleError, match=r"device-1/golden\.safetensors: not of the same export as the other folders"):
        place_again(copy, tmp_path / "placed", PlacementOptions(devices=2).place(2, 8))


def test_what_is_there_is_not_touched(bundle: Path, tmp_path: Path) -> None:
    placement = PlacementOptions(devices=2).place(2, 8)
    with pytest.raises(BundleError, match="already there"):
        place_again(bundle, bundle, placement)
    copy = shutil.copytree(bundle, tmp_path / "copy")
    (copy / "device-1/golden.safetensors").unlink()
    with pytest.raises(BundleError, match=r"golden\.safetensors: missing"):
        place_again(copy, tmp_path / "placed", placement)
    assert not (tmp_path / "placed").exists()
