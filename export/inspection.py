"""Says what a bundle, or one of its folders, holds, and checks every byte of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import to_builtins

from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.manifest import (
    MANIFEST_NAME,
    Balance,
    BsManifest,
    DeviceManifest,
    FileEntry,
    HalfLosses,
    bundle_id,
    read_manifest,
    sha256_of,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

OnBytes = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Inspection:
    """A bundle, or a part of it, that was found sound."""

    bs: BsManifest | None
    devices: tuple[DeviceManifest, ...]

    @property
    def any_manifest(self) -> BsManifest | DeviceManifest:
        """A manifest that tells of the model."""
        return self.bs if self.bs is not None else self.devices[0]

    def as_json(self) -> dict[str, Any]:
        """Say the same for programs."""
        manifest = self.any_manifest
        model = manifest.model
        return {
            "bundle_id": manifest.bundle_id,
            "model": model.name,
            "family": model.family,
            "precision": manifest.precision,
            "quantisation_error": None
            if manifest.quantisation_error is None
            else to_builtins(manifest.quantisation_error),
            "calibration": None if self.bs is None else self.bs.calibration.source,
            "calibration_tokens": None if self.bs is None else self.bs.calibration.tokens,
            "stage_precision": None if self.bs is None else self.bs.stage_precision,
            "balance": None
            if self.bs is None or not isinstance(self.bs.balance, Balance)
            else to_builtins(self.bs.balance),
            "losses": None if self.bs is None else {name: _plain(found) for name, found in _losses(self.bs).items()},
            "n_blocks": model.n_blocks,
            "n_experts": model.n_experts,
            "top_k": model.top_k,
            "d_model": model.d_model,
            "d_ff": model.d_ff,
            "vocab_size": model.vocab_size,
            "shared_expert": model.shared_expert,
            "exporter": manifest.source.exporter,
            "checkpoint_sha256": manifest.source.checkpoint_sha256,
            "bs_bytes": None if self.bs is None else _size_of(self.bs.files),
            "devices": [
                {"device": d.device, "bytes": _size_of(d.files), "experts": [[e.block, e.expert] for e in d.experts]}
                for d in self.devices
            ],
        }


def inspect_folder(folder: Path, on_bytes: OnBytes = lambda _: None) -> Inspection:
    """Read and check a bundle, a folder `bs` or a folder `device-K`.

    Raises:
        BundleError: names the first file that is missing or damaged, or the manifests that do not fit each other.
    """
    hashes: dict[tuple[int, int], str] = {}  # by inode: the same expert, linked from two folders, is read once
    if not (folder / MANIFEST_NAME).is_file():
        return _inspect_bundle(folder, hashes, on_bytes)
    if _role(folder) == "device":
        device = read_manifest(folder, DeviceManifest)
        _check_files(folder, device.files, hashes, on_bytes)
        return Inspection(None, (device,))
    bs = read_manifest(folder, BsManifest)
    _check_bs(folder, bs, hashes, on_bytes)
    return Inspection(bs, ())


def read_bundle(folder: Path) -> Inspection:
    """Read the manifests of a bundle; its files are not checked."""
    bs = read_manifest(folder / "bs", BsManifest)
    devices = (read_manifest(folder / f"device-{number}", DeviceManifest) for number in range(bs.n_devices))
    return Inspection(bs, tuple(devices))


def total_bytes(folder: Path) -> int:
    """Bytes that an inspection will read, links counted once."""
    found = {(status.st_dev, status.st_ino): status.st_size for status in map(Path.stat, folder.rglob("*.*"))}
    return sum(found.values())


def summary(inspection: Inspection) -> RenderableType:
    """Lay out an inspection for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    manifest = inspection.any_manifest
    model = manifest.model
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")  # a hash is copied, whole or not at all
    rows = {
        "model": f"{model.name} ({model.family})",
        "shape": f"{model.n_blocks} blocks x {model.n_experts} experts, top-{model.top_k}, "
        f"d_model {model.d_model}, d_ff {model.d_ff}, vocabulary {model.vocab_size}"
        + (", shared expert at the BS" if model.shared_expert else ""),
        "precision": f"experts {manifest.precision}",
        "bundle id": manifest.bundle_id,
        "checkpoint": manifest.source.checkpoint_sha256,
        "exporter": manifest.source.exporter,
    }
    if (error := manifest.quantisation_error) is not None:
        rows["precision"] += f" (answers off by {error.rms:.2%} RMS, {error.largest:.2%} at most)"
    if inspection.bs is not None:
        rows["precision"] += f", stages {inspection.bs.stage_precision}"
        calibration = inspection.bs.calibration
        rows["norms"] = f"of {calibration.tokens:,} tokens" if calibration.source == "text" else "of the golden rows"
        if isinstance(balance := inspection.bs.balance, Balance):
            speeds = ", ".join(f"{speed:.3g}" for speed in balance.speeds)
            rows["balanced"] = f"slowest device of each block {balance.slowest:.2f} (1.00 is level), speeds {speeds}"
        rows |= {f"fp16 of {of}": _told(found) for of, found in _losses(inspection.bs).items() if found is not None}
    for name, value in rows.items():
        facts.add_row(name, Text(value))
    table = Table()
    for name in ("folder", "holds", "size"):
        table.add_column(name, justify="right" if name == "size" else "left")
    if inspection.bs is not None:
        table.add_row("bs", f"{len(inspection.bs.stages)} stages, head", _megabytes(_size_of(inspection.bs.files)))
    for device in inspection.devices:
        table.add_row(f"device-{device.device}", _held(device), _megabytes(_size_of(device.files)))
    return Group(facts, table)


def _inspect_bundle(folder: Path, hashes: dict[tuple[int, int], str], on_bytes: OnBytes) -> Inspection:
    bs = read_manifest(folder / "bs", BsManifest)
    _check_bs(folder / "bs", bs, hashes, on_bytes)
    for path in sorted((folder / "experts").iterdir()) if (folder / "experts").is_dir() else ():
        if _hash(path, hashes, on_bytes) != path.name.removesuffix(".safetensors"):
            raise BundleError(f"{path}: its content does not have the hash that is its name; export the model again")
    devices = []
    for number in range(bs.n_devices):
        device_folder = folder / f"device-{number}"
        device = read_manifest(device_folder, DeviceManifest)
        _check_files(device_folder, device.files, hashes, on_bytes)
        _check_fits(device_folder / MANIFEST_NAME, device, bs, number)
        devices.append(device)
    return Inspection(bs, tuple(devices))


def _check_bs(folder: Path, manifest: BsManifest, hashes: dict[tuple[int, int], str], on_bytes: OnBytes) -> None:
    _check_files(folder, manifest.files, hashes, on_bytes)
    texts = (manifest.tokenizer, manifest.chat_template)
    named = {name: entry.sha256 for name, entry in manifest.files.items() if name not in texts}
    expected = bundle_id(manifest.model, manifest.precision, manifest.experts, named)
    if manifest.bundle_id != expected:
        raise BundleError(f"{folder / MANIFEST_NAME}: bundle_id is {manifest.bundle_id}, its content gives {expected}")


def _check_fits(path: Path, device: DeviceManifest, bs: BsManifest, number: int) -> None:
    """Check that a device folder is what the base station believes it to be."""
    if device.bundle_id != bs.bundle_id:
        raise BundleError(f"{path}: bundle_id is {device.bundle_id}, that of bs is {bs.bundle_id}")
    if device.device != number:
        raise BundleError(f"{path}: field device is {device.device}, expected {number}")
    held = {(entry.block, entry.expert): entry.weights for entry in device.experts}
    placed = {
        (block, expert): f"{bs.experts[block][expert]}.safetensors"
        for block, row in enumerate(bs.placement)
        for expert, devices in enumerate(row)
        if number in devices
    }
    if held != placed:
        wrong = sorted(key for key in held.keys() | placed.keys() if held.get(key) != placed.get(key))
        raise BundleError(f"{path}: block {wrong[0][0]}, expert {wrong[0][1]} is not what the placement of bs says")


def _check_files(
    folder: Path, files: dict[str, FileEntry], hashes: dict[tuple[int, int], str], on_bytes: OnBytes
) -> None:
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise BundleError(f"{path}: missing; copy the folder again")
        size_bytes = path.stat().st_size
        if size_bytes != entry.size_bytes:
            raise BundleError(f"{path}: size is {size_bytes} bytes, the manifest says {entry.size_bytes}")
        if (found := _hash(path, hashes, on_bytes)) != entry.sha256:
            raise BundleError(f"{path}: sha256 is {found}, the manifest says {entry.sha256}; copy the folder again")


def _hash(path: Path, hashes: dict[tuple[int, int], str], on_bytes: OnBytes) -> str:
    status = path.stat()
    key = (status.st_dev, status.st_ino)
    if key not in hashes:
        hashes[key] = sha256_of(path, on_bytes)
    return hashes[key]


def _role(folder: Path) -> object:
    try:
        content = json.loads((folder / MANIFEST_NAME).read_bytes())
    except ValueError:
        return None  # reading it as the manifest of a BS will say what is wrong
    return content.get("role") if isinstance(content, dict) else None


def _held(device: DeviceManifest) -> str:
    """Name the experts of a device: their numbers, where they are the same in every block."""
    by_block: dict[int, list[int]] = {}
    for entry in device.experts:
        by_block.setdefault(entry.block, []).append(entry.expert)
    rows = list(by_block.values())
    if len(rows) == device.model.n_blocks and all(row == rows[0] for row in rows):
        return f"experts {', '.join(map(str, rows[0]))} of every block"
    return f"{len(device.experts)} experts of {len(rows)} blocks"


def _losses(bs: BsManifest) -> dict[str, HalfLosses | None]:
    return {"experts": bs.expert_losses, "stages": bs.stage_losses}


def _plain(losses: HalfLosses | None) -> dict[str, int] | None:
    return None if losses is None else to_builtins(losses)


def _told(losses: HalfLosses) -> str:
    return f"{losses.weights:,} weights; {losses.clamped:,} clamped, {losses.to_zero:,} too small and now 0"


def _size_of(files: dict[str, FileEntry]) -> int:
    return sum(entry.size_bytes for entry in files.values())


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.3g} MB" if size_bytes < 1e6 else f"{size_bytes / 1e6:,.1f} MB"
