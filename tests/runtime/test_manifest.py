from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.manifest import BsManifest, DeviceManifest, read_manifest, verify_files, write_manifest


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    for name in ("bs", "device-0"):
        shutil.copytree(bundle / name, tmp_path / name)
    return tmp_path


def test_a_manifest_survives_read_and_write(copy: Path) -> None:
    bs, device = read_manifest(copy / "bs", BsManifest), read_manifest(copy / "device-0", DeviceManifest)
    write_manifest(copy / "bs", bs)
    write_manifest(copy / "device-0", device)
    assert read_manifest(copy / "bs", BsManifest) == bs
    assert read_manifest(copy / "device-0", DeviceManifest) == device
    verify_files(copy / "bs", bs)
    verify_files(copy / "device-0", device)


def test_both_sides_agree_on_the_model(copy: Path) -> None:
    bs, device = read_manifest(copy / "bs", BsManifest), read_manifest(copy / "device-0", DeviceManifest)
    assert (bs.bundle_id, bs.model, bs.precision) == (device.bundle_id, device.model, device.precision)
    assert bs.n_devices == 4


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: m.update(version=1), "field version is 1, expected 4; export the model again"),
        (lambda m: m.update(format="zip"), "not a wdmoe bundle"),
        (lambda m: m.update(surprise=1), "unknown field `surprise`"),
        (lambda m: m.pop("golden"), "missing required field `golden`"),
        (lambda m: m["model"].update(d_model=0), r"model.d_model"),
        (lambda m: m["experts"][0].update(weights="../../etc/passwd"), "experts"),
        (lambda m: m["experts"][0].update(block=99), "expert 0 of block 99 is outside the model"),
        (lambda m: m["files"].pop("golden.safetensors"), "field files does not list golden.safetensors"),
    ],
)
def test_a_changed_manifest_is_refused_with_file_and_field(
    copy: Path, change: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    edit(copy / "device-0" / "manifest.json", change)
    with pytest.raises(BundleError, match=r"manifest.json") as caught:
        read_manifest(copy / "device-0", DeviceManifest)
    assert caught.match(complaint)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: m["placement"].pop(), "field placement is not 2 blocks x 8 experts"),
        (lambda m: m["placement"][0].__setitem__(0, []), "leaves an expert without a device"),
        (lambda m: m["stages"].pop(), "2 stages for 2 blocks"),
        (lambda m: m["shared"].pop(), "1 shared experts for 2 blocks"),
        (lambda m: m["model"].update(top_k=9), "top_k 9 is more than n_experts 8"),
    ],
)
def test_counts_that_do_not_agree_are_refused(
    copy: Path, change: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    edit(copy / "bs" / "manifest.json", change)
    with pytest.raises(BundleError, match=complaint):
        read_manifest(copy / "bs", BsManifest)


def test_the_other_sides_folder_is_refused(copy: Path) -> None:
    with pytest.raises(BundleError, match="field role is 'bs', expected 'device'"):
        read_manifest(copy / "bs", DeviceManifest)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_what_is_no_manifest_is_refused(copy: Path, text: str) -> None:
    (copy / "bs" / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"manifest.json"):
        read_manifest(copy / "bs", BsManifest)


def test_every_file_is_checked_to_its_last_byte(copy: Path) -> None:
    manifest = read_manifest(copy / "device-0", DeviceManifest)
    for name in manifest.files:
        path = copy / "device-0" / name
        whole = path.read_bytes()
        for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-1]):
            path.unlink()  # the files of a bundle may be hard links
            path.write_bytes(damaged)
            with pytest.raises(BundleError, match=name):
                verify_files(copy / "device-0", manifest)
        path.write_bytes(whole)
    path.unlink()
    with pytest.raises(BundleError, match="missing; copy the folder again"):
        verify_files(copy / "device-0", manifest)


@pytest.mark.parametrize("name", ["bs", "device-0"])
def test_any_flipped_bit_of_a_manifest_is_refused(copy: Path, name: str) -> None:
    kind: Any = BsManifest if name == "bs" else DeviceManifest
    path = copy / name / "manifest.json"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    sound = read_manifest(copy / name, kind)
    for _ in range(300):
        damaged = bytearray(whole)
        at, bit = int(rng.integers(len(whole))), int(rng.integers(8))
        damaged[at] ^= 1 << bit
        path.write_bytes(bytes(damaged))
        try:
            found = read_manifest(copy / name, kind)
        except BundleError:
            continue
        assert found == sound  # white space between fields is not part of what is said


def test_an_edited_manifest_is_refused(copy: Path) -> None:
    edit(copy / "device-0" / "manifest.json", lambda m: m["source"].update(exporter="somebody else"))
    with pytest.raises(BundleError, match="it was damaged or edited"):
        read_manifest(copy / "device-0", DeviceManifest)
