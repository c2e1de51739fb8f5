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
from wdmoe.runtime.manifest import (
    FORMAT,
    VERSION,
    DeviceManifest,
    ExpertEntry,
    FileEntry,
    ModelSpec,
    Precision,
    QuantisationError,
    Source,
    sha256_of,
    write_manifest,
)
from wdmoe.runtime.tensor_file import write_tensors

GOLDEN_NAME = "golden.safetensors"
_README_NAME = "README.md"
_README = """# Device {device} of {model}

This folder is one device's share of a Mixture-of-Experts model, made by `wdmoe-export`. Copy it to the device
(`rsync -a`, or any other way), install wdmoe there, and start it from inside this folder:

    wdmoe-device --bundle . --bs tcp://BS_HOST:5555 --enrol TOKEN

BS_HOST is the base station, which runs `wdmoe-bs` with the folder `bs` of the same bundle. TOKEN is what
`wdmoe-bs enrol device-{device}` prints there; it is for the first start, later ones go without `--enrol TOKEN`. On the base
station's own machine (`--bs tcp://127.0.0.1:5555`) none is needed.

| what | value |
| --- | --- |
| model | {model} ({family}) |
| experts | {experts} |
| shape of an expert | {d_model} x {d_ff}, {precision} |
| weights | {size_mb:.1f} MB |
| bundle | {bundle_id} |

A device and a base station work together only if their bundle is the same.

The first start builds what an engine needs into `engines/`, and so does `wdmoe-device build --bundle .`. Engines are not
built at export: a plan of TensorRT holds for one kind of GPU and one version of the software, and building it measures that
GPU. `engines/` may be copied to a module of exactly the same kind and software; anywhere else it is refused by name, and
built anew.
"""

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Frame:
    """What all folders of a bundle say alike."""

    model: ModelSpec
    source: Source
    precision: Precision
    bundle_id: str
    quantisation_error: QuantisationError | None = None


def write_device(
    folder: Path,
    store: Path,
    device: int,
    held: Sequence[tuple[int, int]],
    experts: Sequence[Sequence[ExpertFile]],
    golden_inputs: Sequence[FloatArray],
    frame: Frame,
    graphs: Mapping[str, tuple[Path, FileEntry]] | None = None,
) -> None:
    """Write a device's folder, its manifest last.

    Args:
        folder: is made.
        store: where the expert files are.
        device: its number.
        held: the experts that it holds, as (block, expert), in order.
        experts: [block][expert], all of the model.
        golden_inputs: [block], rows of the self-check.
        frame: of the bundle.
        graphs: name -> the stub of an expert that is there already; None writes all of them.
    """
    folder.mkdir()
    entries: list[ExpertEntry] = []
    files: dict[str, FileEntry] = {}
    golden: dict[str, FloatArray] = {}
    for block, number in held:
        golden[f"input.block_{block:02d}"] = golden_inputs[block]
        expert = experts[block][number]
        graph_name = f"block_{block:02d}_expert_{number:02d}.onnx"
        if graphs is None:
            weights = {name: Weight(expert.name, span) for name, span in expert.spans.items()}
            files[graph_name] = write_graph(folder / graph_name, expert_graph(frame.model.d_model, weights))
        else:
            source, files[graph_name] = graphs[graph_name]
            link(source, folder / graph_name)
        if expert.name not in files:  # two experts may be equal
            link(store / expert.name, folder / expert.name)
            files[expert.name] = expert.entry
        entries.append(ExpertEntry(block, number, weights=expert.name, graph=graph_name))
        golden[f"output.block_{block:02d}.expert_{number:02d}"] = expert.outputs
    size_bytes = sum(entry.size_bytes for entry in files.values())
    files |= _write_golden_and_readme(folder, golden, _readme(device, held, frame, size_bytes))
    write_manifest(folder, DeviceManifest(
        format=FORMAT, version=VERSION, bundle_id=frame.bundle_id, model=frame.model, source=frame.source,
        precision=frame.precision, device=device, experts=tuple(entries), golden=GOLDEN_NAME, files=files,
        quantisation_error=frame.quantisation_error,
    ))  # fmt: skip


def _readme(device: int, held: Sequence[tuple[int, int]], frame: Frame, size_bytes: int) -> str:
    spec = frame.model
    by_block = [[expert for of, expert in held if of == block] for block in range(spec.n_blocks)]
    if all(row == by_block[0] for row in by_block):
        experts = f"{', '.join(map(str, by_block[0]))} of {spec.n_experts}, in each of {spec.n_blocks} blocks"
    else:
        experts = f"{len(held)} of {spec.n_blocks} x {spec.n_experts}, listed in manifest.json"
    return _README.format(
        device=device,
        model=spec.name,
        family=spec.family,
        experts=experts,
        d_model=spec.d_model,
        d_ff=spec.d_ff,
        precision=frame.precision,
        size_mb=size_bytes / 1e6,
        bundle_id=frame.bundle_id,
    )


def _write_golden_and_readme(folder: Path, golden: Mapping[str, FloatArray], readme: str) -> dict[str, FileEntry]:
    write_tensors(folder / GOLDEN_NAME, golden)
    (folder / _README_NAME).write_text(readme, encoding="utf-8")
    paths = [folder / GOLDEN_NAME, folder / _README_NAME]
    return {path.name: FileEntry(sha256_of(path), path.stat().st_size) for path in paths}


def link(source: Path, target: Path) -> None:
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
