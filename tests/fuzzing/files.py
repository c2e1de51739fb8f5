"""Damaged files of a bundle."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from fuzzing.frames import Tally, flipped
from wdmoe.bs.held import HeldExperts
from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.manifest import BsManifest, DeviceManifest, read_manifest, verify_files

DAMAGES = ("flipped", "cut", "appended", "swapped", "zeroed", "gone")


def fuzz_files(rng: np.random.Generator, bundle: Path, scratch: Path, rounds: int, tally: Tally) -> None:
    """Damage each file of `bs`, of one device folder and of the held experts: it is refused by its name."""
    for role in ("bs", "device-1", "experts"):
        for path in sorted((bundle / role).iterdir()):
            if path.name == "done.jsonl":
                continue  # the exporter's own record; nobody reads it later
            for _ in range(rounds):
                for damage in DAMAGES:
                    _damage_one(rng, bundle, role, path.name, damage, scratch, tally)


def _damage_one(
    rng: np.random.Generator, bundle: Path, role: str, name: str, damage: str, scratch: Path, tally: Tally
) -> None:
    others = [path.name for path in (bundle / role).iterdir() if path.name != name]
    raw = (bundle / role / name).read_bytes()
    at = int(rng.integers(len(raw)))
    other = (bundle / role / others[int(rng.integers(len(others)))]).read_bytes()
    changed = {
        "flipped": flipped(rng, raw, 1), "cut": raw[:at], "appended": raw + rng.bytes(int(rng.integers(1, 9))),
        "swapped": other, "zeroed": raw[:at] + bytes(min(16, len(raw) - at)) + raw[at + 16 :], "gone": None,
    }[damage]  # fmt: skip
    if changed == raw:
        return
    tally.counts["files_damaged"] += 1
    root = scratch / "copy"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for folder in {"bs", role}:
        shutil.copytree(bundle / folder, root / folder, copy_function=_link)
    target = root / role / name
    target.unlink()
    if changed is not None:
        target.write_bytes(changed)
    what = f"{role}/{name} {damage} at {at} of {len(raw)}"
    try:
        read = _read_all(root, role)
    except BundleError as error:
        tally.counts["refused"] += 1
        if name not in str(error):
            tally.accept(f"{what}: refused, but not by its name: {error}")
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        tally.crash(what, error)
    else:
        if read == _read_all(bundle, role) and name == "manifest.json":
            tally.counts["harmless"] += 1  # other bytes, the same content: white space, a number's last digits
        else:
            tally.accept(what)


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def _read_all(root: Path, role: str) -> object:
    """Do what the commands do before they use a folder; return what its manifest says."""
    manifest: BsManifest | DeviceManifest
    if role == "experts":
        manifest = read_manifest(root / "bs", BsManifest)
        held = HeldExperts(root / "bs", manifest, 1)
        rows = np.ones((1, manifest.model.d_model), np.float32)
        for block in range(manifest.model.n_blocks):
            for expert in range(manifest.model.n_experts):
                held.run(block, expert, rows)
        return manifest
    manifest = read_manifest(root / role, BsManifest) if role == "bs" else read_manifest(root / role, DeviceManifest)
    verify_files(root / role, manifest)
    return manifest
