"""Makes a bundle with another placement out of one that is there: links and manifests, no second export."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np

from wdmoe.export.conversion import Losses
from wdmoe.export.device_folder import Frame, link, write_device
from wdmoe.export.inspection import Inspection, read_bundle
from wdmoe.export.placement import Placement, device_count, held_by
from wdmoe.export.slicing import ExpertFile, FloatArray, expert_file_name
from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.manifest import SENSITIVITY_NAME, Balance, BsManifest, FileEntry, write_manifest
from wdmoe.runtime.tensor_file import map_tensors, read_spans


def place_again(
    bundle: Path, out: Path, placement: Placement, balance: Balance | msgspec.UnsetType = msgspec.UNSET
) -> Inspection:
    """Write a bundle that differs from another in its placement alone.

    Args:
        bundle: made by wdmoe-export, with all of its device folders.
        out: is made; weights are hard links where the file system allows, copies elsewhere.
        placement: of the new one.
        balance: what it was balanced by, if it was.

    Raises:
        BundleError: something is there already, or a file of the bundle is missing.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BundleError(f"{out}: already there; choose another --out or remove it")
    found = read_bundle(bundle)
    assert found.bs is not None
    experts, golden, graphs = _experts_of(bundle, found)
    partial = out.with_name(out.name + ".placing")  # not `.partial`: an interrupted export may be there
    if partial.exists():
        shutil.rmtree(partial)
    (partial / "experts").mkdir(parents=True)
    for name in {expert.name for row in experts for expert in row}:
        link(_weights_path(bundle, found, name), partial / "experts" / name)
    _write_station(bundle / "bs", partial / "bs", found.bs, placement, balance)
    bs = found.bs
    frame = Frame(bs.model, bs.source, bs.precision, bs.bundle_id, bs.quantisation_error)
    for device in range(device_count(placement)):
        held = held_by(placement, device)
        write_device(partial / f"device-{device}", partial / "experts", device, held, experts, golden, frame, graphs)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return read_bundle(out)


def _write_station(
    source: Path, target: Path, manifest: BsManifest, placement: Placement, balance: Balance | msgspec.UnsetType
) -> None:
    target.mkdir()
    for name in manifest.files:
        if not (source / name).is_file():
            raise BundleError(f"{source / name}: missing; copy the folder again")
        link(source / name, target / name)
    if (source / SENSITIVITY_NAME).is_file():
        link(source / SENSITIVITY_NAME, target / SENSITIVITY_NAME)
    write_manifest(target, msgspec.structs.replace(manifest, placement=placement, balance=balance))


def _experts_of(
    bundle: Path, found: Inspection
) -> tuple[list[list[ExpertFile]], list[FloatArray], dict[str, tuple[Path, FileEntry]]]:
    """Gather what is known of every expert: its file, and its golden answers and stub from a device that holds it.

    Stubs are taken as they are: golden answers are what these give, those of another release might not pass the self-check.
    """
    assert found.bs is not None
    golden: dict[str, FloatArray] = {}
    files: dict[str, FileEntry] = {}
    graphs: dict[str, tuple[Path, FileEntry]] = {}
    for manifest in found.devices:
        files |= manifest.files
        folder = bundle / f"device-{manifest.device}"
        for needed in (manifest.golden, *(entry.graph for entry in manifest.experts)):
            if not (folder / needed).is_file():
                raise BundleError(f"{folder / needed}: missing; copy the folder again")
        for name, tensor in map_tensors(folder / manifest.golden).items():
            if name.startswith("input.") and not np.array_equal(golden.get(name, tensor), tensor):
                raise BundleError(
                    f"{folder / manifest.golden}: not of the same export as the other folders; export again"
                )
            golden[name] = np.array(tensor, np.float32)
        graphs |= {entry.graph: (folder / entry.graph, manifest.files[entry.graph]) for entry in manifest.experts}
    experts: list[list[ExpertFile]] = []
    for block, hashes in enumerate(found.bs.experts):
        row: list[ExpertFile] = []
        for number, sha256 in enumerate(hashes):
            name = expert_file_name(sha256)
            answers = golden.get(f"output.block_{block:02d}.expert_{number:02d}")
            if answers is None or name not in files:
                raise BundleError(f"{bundle}: no device folder knows expert {number} of block {block}; export again")
            row.append(ExpertFile(files[name], read_spans(_weights_path(bundle, found, name)), answers, Losses()))
        experts.append(row)
    return experts, [golden[f"input.block_{block:02d}"] for block in range(len(experts))], graphs


def _weights_path(bundle: Path, found: Inspection, name: str) -> Path:
    """Find the file of an expert: in `experts`, or in a device folder if that is gone."""
    folders = [bundle / "experts", *(bundle / f"device-{d.device}" for d in found.devices if name in d.files)]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise BundleError(f"{folders[0] / name}: missing; copy the bundle again")
