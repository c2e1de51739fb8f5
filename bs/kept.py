"""Experts that the base station keeps in memory and runs itself: which ones, how many fit, and how fast they are here."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np

from wdmoe.bs.routing import Ints
from wdmoe.bs.trace import read_trace
from wdmoe.profiles.base_station import modelled_station
from wdmoe.profiles.device_profile import VERSION, DeviceProfile, Point
from wdmoe.profiles.modelled import ExpertShape
from wdmoe.runtime.engines import ExpertEngine, load_engine
from wdmoe.runtime.engines.timing import quick_points
from wdmoe.runtime.errors import BundleError, DataError, WdmoeError
from wdmoe.runtime.manifest import (
    MANIFEST_NAME,
    BsManifest,
    DeviceManifest,
    ExpertEntry,
    ModelSpec,
    read_manifest,
    sha256_of,
    verify_files,
)
from wdmoe.runtime.memory import available_memory_bytes
from wdmoe.runtime.messages import Rows
from wdmoe.runtime.quantised import resident_bytes
from wdmoe.runtime.tensor_file import read_spans

FREE_SHARE = 0.5  # of the free memory that `auto` takes: the rest is for keys and values, activations, and others
_POINTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

Key = tuple[int, int]  # block, expert


@dataclass(frozen=True, slots=True)
class Choice:
    """Which experts the base station keeps."""

    experts: tuple[Key, ...]  # the most used first
    chosen_by: str  # what says how much they are used
    size_bytes: int  # in memory


@dataclass(frozen=True, slots=True)
class Kept:
    """Experts in memory, ready to run, and how long a call takes."""

    choice: Choice
    engines: Mapping[Key, ExpertEngine]
    profile: DeviceProfile

    def run(self, block: int, expert: int, rows: Rows) -> Rows:
        """Run one of them."""
        return self.engines[block, expert].run(block, expert, rows)


def usage(manifest: BsManifest, path: Path | None) -> tuple[Ints | None, str]:
    """Return how often each expert is used, [n_blocks, n_experts], and where that is known from; None: it is not.

    Args:
        manifest: whose calibration counts, where no file is given.
        path: a trace of `wdmoe-bs trace`, or JSON as `wdmoe-export calibrate --counts` writes it.

    Raises:
        DataError: the file is neither, or of another model.
    """
    if path is None:
        calibration = manifest.calibration
        if not calibration.counts:
            return None, "no counts (wdmoe-export calibrate measures them): the first of every block"
        return np.array(calibration.counts, np.int64), f"the calibration over {calibration.tokens:,} tokens"
    counts = read_trace(path).counts if path.suffix == ".npz" else _read_counts(path)
    expected = (manifest.model.n_blocks, manifest.model.n_experts)
    if counts.shape != expected:
        raise DataError(f"{path}: counts {counts.shape} experts, {manifest.model.name} has {expected}")
    return counts, path.name


def most_used(counts: Ints | None, model: ModelSpec) -> list[Key]:
    """Return all experts of a model, the most used first; of equals, and without counts, those of all blocks in turn."""
    block, expert = np.divmod(np.arange(model.n_blocks * model.n_experts), model.n_experts)
    used = np.zeros(len(block), np.int64) if counts is None else counts.ravel()
    order = np.lexsort((block, expert, -used))
    return [(int(block[n]), int(expert[n])) for n in order]


def choose(
    wanted: str, manifest: BsManifest, counts_path: Path | None, each_bytes: int, free_bytes: int | None
) -> Choice:
    """Choose the experts to keep.

    Args:
        wanted: a number of experts in all, or auto.
        manifest: of the base station.
        counts_path: see `usage`.
        each_bytes: that an expert takes in memory.
        free_bytes: that it may take from; None: not known.

    Raises:
        WdmoeError: so many do not fit, or nobody knows whether any do.
        ValueError: the model has fewer.
    """
    counts, chosen_by = usage(manifest, counts_path)
    ranked = most_used(counts, manifest.model)
    if wanted == "auto":
        if free_bytes is None:
            raise WdmoeError("this machine does not say how much memory is free; give --bs-experts a number")
        number = min(len(ranked), int(FREE_SHARE * free_bytes // each_bytes))
    else:
        number = int(wanted)
        if number > len(ranked):
            raise ValueError(f"--bs-experts is {number}, {manifest.model.name} has {len(ranked)} experts in all")
        if free_bytes is not None and number * each_bytes > free_bytes:
            raise WdmoeError(
                f"--bs-experts {number} takes {number * each_bytes / 1e9:.1f} GB, {free_bytes / 1e9:.1f} GB are free: "
                f"at most {int(free_bytes // each_bytes)} fit, auto takes half of that"
            )
    return Choice(tuple(ranked[:number]), chosen_by, number * each_bytes)


def keep_measured(
    wanted: str, bs_folder: Path, manifest: BsManifest, threads: int, counts_path: Path | None
) -> Kept | None:
    """Load the experts that the base station is to run, and measure them; None if not one fits.

    Args:
        wanted: a number of experts in all, or auto.
        bs_folder: the folder `bs`; the device folders, or else the folder `experts`, lie beside it.
        manifest: of the base station.
        threads: for one call.
        counts_path: see `usage`.

    Raises:
        WdmoeError: they do not fit, are not there, or are damaged.
    """
    everything = sources(bs_folder, manifest)
    choice = choose(wanted, manifest, counts_path, everything.each_bytes, available_memory_bytes())
    if not choice.experts:
        return None
    engines = everything.load(choice.experts, threads)
    model, first = manifest.model, engines[choice.experts[0]]
    unmeasured = DeviceProfile(
        VERSION,
        device=f"base station, {os.cpu_count()} CPUs",
        software=f"{first.name} {first.version}, Python {platform.python_version()}, {platform.platform()}",
        engine=first.name,
        precision=manifest.precision,
        d_model=model.d_model,
        d_ff=model.d_ff,
        points=(Point(1, 1.0, 1.0),),
    )
    points = quick_points(Kept(choice, engines, unmeasured), choice.experts, model.d_model)
    return Kept(choice, engines, msgspec.structs.replace(unmeasured, points=points))


def keep_modelled(
    wanted: str,
    bs_folder: Path,
    manifest: BsManifest,
    threads: int,
    counts_path: Path | None,
    machine: str,
    shape: ExpertShape | None,
) -> Kept | None:
    """Do what `keep_measured` does for a run in virtual time: memory and speed are those of a modelled base station.

    Args:
        wanted, bs_folder, manifest, threads, counts_path: as there.
        machine: of `station_names()`; it holds and computes experts in float32.
        shape: what is charged for; None: the experts of the bundle.

    Raises:
        WdmoeError: as there.
    """
    shape = shape or ExpertShape(manifest.model.d_model, manifest.model.d_ff)
    station = modelled_station(machine)
    choice = choose(wanted, manifest, counts_path, 4 * shape.weights, station.memory_bytes)
    if not choice.experts:
        return None
    engines = sources(bs_folder, manifest).load(choice.experts, threads)
    calls_ms = [(tokens, station.graph_ms(shape.weights, tokens)) for tokens in _POINTS]
    profile = DeviceProfile(
        VERSION,
        device=station.name,
        software="roofline of published figures",
        engine="none",
        precision="fp32",
        d_model=manifest.model.d_model,
        d_ff=manifest.model.d_ff,
        points=tuple(Point(tokens, ms, ms) for tokens, ms in calls_ms),
        origin="modelled",
        sources=station.sources,
    )
    return Kept(choice, engines, profile)


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the base station finds experts: in device folders, with the graphs of ONNX Runtime; else in `experts`."""

    bs_folder: Path
    manifest: BsManifest
    slices: dict[Path, DeviceManifest]  # device folders that hold all experts together; empty: `experts` is used

    @property
    def each_bytes(self) -> int:
        """What one expert takes in memory."""
        spans = read_spans(self._weights(0, 0)).values()
        if self.slices:
            return sum(map(resident_bytes, spans))
        return 4 * 3 * self.manifest.model.d_model * self.manifest.model.d_ff  # numpy holds float32

    def load(self, experts: Sequence[Key], threads: int) -> dict[Key, ExpertEngine]:
        """Check experts against their hashes and load them."""
        wanted = set(experts)
        if not self.slices:
            folder = self.bs_folder.parent / "experts"
            entries = [ExpertEntry(b, e, self._weights(b, e).name, "none") for b, e in experts]
            for entry in entries:
                expected = self.manifest.experts[entry.block][entry.expert]
                if (found := sha256_of(folder / entry.weights)) != expected:
                    raise BundleError(
                        f"{folder / entry.weights}: sha256 is {found}, its name says otherwise; copy the bundle again"
                    )
            return dict.fromkeys(experts, load_engine("numpy", folder, entries, threads))
        engines: dict[Key, ExpertEngine] = {}
        for folder, manifest in self.slices.items():
            mine = [entry for entry in manifest.experts if (entry.block, entry.expert) in wanted - engines.keys()]
            if mine:
                names = {name for entry in mine for name in (entry.weights, entry.graph)}
                files = {name: manifest.files[name] for name in sorted(names)}
                verify_files(folder, msgspec.structs.replace(manifest, files=files))
                engine = load_engine("onnxruntime", folder, mine, threads)
                engines.update(((entry.block, entry.expert), engine) for entry in mine)
        return engines

    def _weights(self, block: int, expert: int) -> Path:
        if self.slices:
            for folder, manifest in self.slices.items():
                for entry in manifest.experts:
                    if (entry.block, entry.expert) == (block, expert):
                        return folder / entry.weights
        return self.bs_folder.parent / "experts" / f"{self.manifest.experts[block][expert]}.safetensors"


def sources(bs_folder: Path, manifest: BsManifest) -> Sources:
    """Find where experts can be read from.

    Raises:
        BundleError: they are neither in device folders beside `bs` nor in `experts`.
    """
    found: dict[Path, DeviceManifest] = {}
    if find_spec("onnxruntime") is not None:
        for folder in sorted(bs_folder.parent.glob("device-*")):
            if (folder / MANIFEST_NAME).exists():
                slice_ = read_manifest(folder, DeviceManifest)
                if slice_.bundle_id == manifest.bundle_id:
                    found[folder] = slice_
    there = {(entry.block, entry.expert) for slice_ in found.values() for entry in slice_.experts}
    if len(there) == manifest.model.n_blocks * manifest.model.n_experts:
        return Sources(bs_folder, manifest, found)
    nothing_but_experts = Sources(bs_folder, manifest, {})
    for block, row in enumerate(manifest.experts):
        for expert in range(len(row)):
            if not (path := nothing_but_experts._weights(block, expert)).exists():
                raise BundleError(
                    f"{path}: missing; --bs-experts needs the folder `experts` of the bundle, or all its device "
                    "folders, beside `bs`"
                )
    return nothing_but_experts


def _read_counts(path: Path) -> Ints:
    try:
        content = msgspec.json.decode(path.read_bytes())
        counts = content["counts"] if isinstance(content, dict) else content
        return np.array(msgspec.convert(counts, list[list[int]]), np.int64)
    except (OSError, KeyError, ValueError, msgspec.MsgspecError) as error:
        raise DataError(
            f"{path}: neither a trace of wdmoe-bs trace nor counts of wdmoe-export calibrate --counts ({error})"
        ) from error
