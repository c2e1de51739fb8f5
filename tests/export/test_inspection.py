"""An inspection says what is there and names what is damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tiny import tiny_checkpoint

from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.export.inspection import inspect_folder, total_bytes
from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.manifest import BsManifest, DeviceManifest, write_manifest


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    config = ExportConfig(folder / "bundle")
    export_bundle(plan_export(tiny_checkpoint(folder / "c", "mixtral"), "tiny", config), config)
    return config.out


def test_a_bundle_and_each_of_its_folders_can_be_inspected(sound: Path) -> None:
    whole = inspect_folder(sound).as_json()
    assert (whole["model"], whole["family"], whole["precision"]) == ("tiny", "mixtral", "fp32")
    assert [device["experts"] for device in whole["devices"]][3] == [[0, 6], [0, 7], [1, 6], [1, 7]]
    bs, device = inspect_folder(sound / "bs").as_json(), inspect_folder(sound / "device-2").as_json()
    assert (bs["devices"], bs["bs_bytes"]) == ([], whole["bs_bytes"])
    assert (device["devices"], device["bs_bytes"]) == ([whole["devices"][2]], None)
    assert bs["bundle_id"] == device["bundle_id"] == whole["bundle_id"]


def test_a_file_with_several_links_is_read_once(sound: Path) -> None:
    read: list[int] = []
    inspect_folder(sound, read.append)
    experts = sum(path.stat().st_size for path in (sound / "experts").iterdir())
    assert experts < sum(read) <= total_bytes(sound)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()  # the other link keeps its content
    path.write_bytes(content)


def _edit_manifest(path: Path, **fields: Any) -> None:
    """Change fields and seal the manifest again: as of another export, not as damaged."""
    kind: Any = BsManifest if path.parent.name == "bs" else DeviceManifest
    edited = json.loads(path.read_text()) | fields
    write_manifest(path.parent, msgspec.json.decode(json.dumps(edited), type=kind))


def _first_expert(bundle: Path) -> Path:
    return min((bundle / "experts").iterdir())


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda b: _flip(b / "bs/stage_01.safetensors"), r"bs/stage_01\.safetensors: sha256"),
    (lambda b: _flip(b / "device-1/golden.safetensors"), r"device-1/golden\.safetensors: sha256"),
    (lambda b: (b / "device-1/README.md").unlink(), r"device-1/README\.md: missing"),
    (lambda b: (b / "bs/head.onnx").write_bytes(b""), r"bs/head\.onnx: size is 0"),
    (lambda b: _flip(_first_expert(b)), r"experts/.*\.safetensors: its content does not have the hash"),
    (lambda b: shutil.rmtree(b / "device-3"), r"device-3/manifest\.json: cannot be read"),
    (lambda b: (b / "bs/manifest.json").write_text("{"), r"bs/manifest\.json: not JSON"),
    (lambda b: _edit_manifest(b / "bs/manifest.json", bundle_id="0" * 64), "bundle_id is 0000"),
    (lambda b: _edit_manifest(b / "device-2/manifest.json", bundle_id="0" * 64), r"device-2/.*bundle_id is 0000"),
    (lambda b: _edit_manifest(b / "device-2/manifest.json", device=1), r"device-2/.*field device is 1, expected 2"),
    (lambda b: _edit_manifest(b / "device-2/manifest.json", experts=[]), "block 0, expert 4 is not what the placement"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_named(sound: Path, tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    bundle = shutil.copytree(sound, tmp_path / "bundle")
    damage(bundle)
    with pytest.raises(BundleError, match=message):
        inspect_folder(bundle)


def test_damage_of_a_single_folder_is_named(sound: Path, tmp_path: Path) -> None:
    device = shutil.copytree(sound / "device-0", tmp_path / "device-0")
    _flip(device / "block_01_expert_00.onnx")
    with pytest.raises(BundleError, match=r"block_01_expert_00\.onnx: sha256"):
        inspect_folder(device)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"bs/manifest\.json: cannot be read"):
        inspect_folder(tmp_path)
