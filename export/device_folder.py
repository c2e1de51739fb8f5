"""Writes the folder of one device: links to its experts, a graph for each, golden answers, how to start it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wdmoe.export.graphs import expert_graph
from wdmoe.export.slicing import ExpertFile
from wdmoe.export.station import write_graph
from wdmoe.export.weights import Weight
from wdmoe.runtime.manifest import ExpertEntry, FileEntry, ModelSpec, Precision, sha256_of
from wdmoe.runtime.tensor_file import write_tensors

GOLDEN_NAME = "golden.safetensors"
_README_NAME = "README.md"
_README = """# Device {device} of {model}

This folder is one device's share of a Mixture-of-Experts model, made by `wdmoe-export`. Copy it to the device
(`rsync -a`, or any other way), install wdmoe there, and start it from inside this folder:

    wdmoe-device --bundle . --bs tcp://BS_HOST:5555

BS_HOST is the base station, which runs `wdmoe-bs` with the folder `bs` of the same bundle.

| what | value |
| --- | --- |
| model | {model} ({family}) |
| experts | {experts} of {n_experts}, in each of {n_blocks} blocks |
| shape of an expert | {d_model} x {d_ff}, {precision} |
| weights | {size_mb:.1f} MB |
| bundle | {bundle_id} |

A device and a base station work together only if their bundle is the same. What the device makes here, `engines/` for
one, fits its own hardware alone and is made anew elsewhere.
"""

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class DeviceFolder:
    """What was written, for the manifest."""

    experts: tuple[ExpertEntry, ...]
    files: dict[str, FileEntry]


def write_device(
    folder: Path,
    store: Path,
    device: int,
    numbers: Sequence[int],
    experts: Sequence[Sequence[ExpertFile]],
    golden_inputs: Sequence[FloatArray],
    spec: ModelSpec,
    precision: Precision,
    bundle_id: str,
) -> DeviceFolder:
    """Write everything but the manifest into an empty folder.

    Args:
        folder: of the device.
        store: where the expert files are.
        device: its number.
        numbers: of the experts that it holds, in every block.
        experts: [block][expert], all of the model.
        golden_inputs: [block], rows of the self-check.
        spec: the model.
        precision: of the experts.
        bundle_id: for the README.
    """
    entries: list[ExpertEntry] = []
    files: dict[str, FileEntry] = {}
    golden: dict[str, FloatArray] = {}
    for block in range(spec.n_blocks):
        golden[f"input.block_{block:02d}"] = golden_inputs[block]
        for number in numbers:
            expert = experts[block][number]
            graph_name = f"block_{block:02d}_expert_{number:02d}.onnx"
            weights = {name: Weight(expert.name, span) for name, span in expert.spans.items()}
            files[graph_name] = write_graph(folder / graph_name, expert_graph(spec.d_model, weights))
            if expert.name not in files:  # two experts may be equal
                _link(store / expert.name, folder / expert.name)
                files[expert.name] = expert.entry
            entries.append(ExpertEntry(block, number, weights=expert.name, graph=graph_name))
            golden[f"output.block_{block:02d}.expert_{number:02d}"] = expert.outputs
    size_bytes = sum(entry.size_bytes for entry in files.values())
    files |= _write_golden_and_readme(folder, golden, _readme(device, numbers, spec, precision, size_bytes, bundle_id))
    return DeviceFolder(tuple(entries), files)


def _readme(
    device: int, numbers: Sequence[int], spec: ModelSpec, precision: Precision, size_bytes: int, bundle_id: str
) -> str:
    return _README.format(
        device=device,
        model=spec.name,
        family=spec.family,
        experts=", ".join(map(str, numbers)),
        n_experts=spec.n_experts,
        n_blocks=spec.n_blocks,
        d_model=spec.d_model,
        d_ff=spec.d_ff,
        precision=precision,
        size_mb=size_bytes / 1e6,
        bundle_id=bundle_id,
    )


def _write_golden_and_readme(folder: Path, golden: Mapping[str, FloatArray], readme: str) -> dict[str, FileEntry]:
    write_tensors(folder / GOLDEN_NAME, golden)
    (folder / _README_NAME).write_text(readme, encoding="utf-8")
    paths = [folder / GOLDEN_NAME, folder / _README_NAME]
    return {path.name: FileEntry(sha256_of(path), path.stat().st_size) for path in paths}


def _link(source: Path, target: Path) -> None:
    """Make a hard link, or a copy where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def can_link(folder: Path) -> bool:
    """Say whether the file system of a folder has hard links."""
    first, second = folder / "link-test-a", folder / "link-test-b"
    try:
        first.touch()
        os.link(first, second)
    except OSError:
        return False
    finally:
        first.unlink(missing_ok=True)
        second.unlink(missing_ok=True)
    return True
