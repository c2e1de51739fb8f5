"""Makes a bundle of a checkpoint. Everything is written beside the final name, manifests last, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from wdmoe.export.calibration import golden_calibration
from wdmoe.export.checkpoint import Checkpoint, open_checkpoint
from wdmoe.export.conversion import Losses
from wdmoe.export.device_folder import Frame, can_link, write_device
from wdmoe.export.families import FAMILIES, Config, ModelLayout, check_family
from wdmoe.export.journal import JOURNAL_NAME, Journal
from wdmoe.export.parallel import OnBytes, default_workers, run_all
from wdmoe.export.placement import Placement, PlacementOptions, device_count, held_by
from wdmoe.export.quantising import rounded_rows
from wdmoe.export.sizing import expert_file_bytes, limit_of, sizes_of
from wdmoe.export.slicing import ExpertFile, ExpertStore, golden_rows
from wdmoe.export.station import StationWeights, put_weights, weight_files, write_station
from wdmoe.export.weights import Part, all_expert_parts, check_tensors, station_parts
from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.manifest import (
    FORMAT,
    MANIFEST_NAME,
    QUANTISED,
    VERSION,
    BsManifest,
    DeviceManifest,
    HalfLosses,
    ModelSpec,
    Precision,
    QuantisationError,
    Source,
    StagePrecision,
    bundle_id,
    read_manifest,
    write_manifest,
)


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """What the user asks for."""

    out: Path = Path("bundle")
    experts_per_device: int | None = None  # None: 2, unless `devices` is given
    devices: int | None = None
    precision: Precision | Literal["auto"] = "auto"
    force: bool = False  # replace a bundle that is already there
    stages: StagePrecision = "fp32"  # weights of the base station
    clamp: bool = False  # turn values that float16 cannot hold into its largest instead of stopping
    workers: int = field(default_factory=default_workers)  # threads
    placement: PlacementOptions | None = None  # in place of the two numbers above
    device_memory_bytes: tuple[int, ...] = ()  # of all devices or of each; heeded by a balanced placement and replicas

    def __post_init__(self) -> None:
        self.placing()  # raises ValueError

    def placing(self) -> PlacementOptions:
        """What was asked for as to placement."""
        return self.placement or PlacementOptions(self.experts_per_device, self.devices)

    def place(self, spec: ModelSpec, precision: Precision) -> Placement:
        """Place the experts of a model; see `PlacementOptions.place`."""
        limit = limit_of(spec, precision, self.device_memory_bytes)
        return self.placing().place(spec.n_blocks, spec.n_experts, limit)


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """An export that can be carried out: the checkpoint was checked, nothing is written yet."""

    checkpoint: Checkpoint
    layout: ModelLayout
    precision: Precision
    stages: StagePrecision
    placement: Placement

    @property
    def total_bytes(self) -> int:
        """Bytes of the checkpoint that will be read."""
        parts = (*station_parts(self.layout), *all_expert_parts(self.layout))
        return sum(self.checkpoint.span(name).size_bytes for part in parts for name, _ in part.sources)

    @property
    def source(self) -> Source:
        """What the manifests say the bundle was made of."""
        return Source(self.checkpoint.source_sha256, f"wdmoe {version('wdmoe')}")


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What an export made."""

    out: Path
    bundle_id: str
    already_there: bool


def plan_export(folder: Path, name: str, config: ExportConfig) -> ExportPlan:
    """Open and check a checkpoint.

    Args:
        folder: of the checkpoint.
        name: what the model shall be called.
        config: precision and placement.

    Raises:
        CheckpointError: it is incomplete, unsafe, or of a kind that cannot be exported.
        ValueError: the placement does not fit the number of experts.
    """
    checkpoint = open_checkpoint(folder)
    layout = layout_of(checkpoint, name)
    check_tensors(checkpoint, layout)
    precision: Precision
    if config.precision == "auto":
        dtypes = {checkpoint.span(name).dtype for part in all_expert_parts(layout) for name, _ in part.sources}
        precision = "fp32" if dtypes <= {"F32", "F64"} else "fp16"
    else:
        precision = config.precision
    return ExportPlan(checkpoint, layout, precision, config.stages, config.place(layout.spec, precision))


def layout_of(checkpoint: Checkpoint, name: str) -> ModelLayout:
    """Describe the model of a checkpoint.

    Raises:
        CheckpointError: its family is unknown, or it differs in a way that cannot be exported.
    """
    check_family(checkpoint.config, str(checkpoint.folder / "config.json"))
    generation = checkpoint.json("generation_config.json") or {}
    return FAMILIES[checkpoint.model_type](Config(checkpoint.config, generation, checkpoint.names), name)


def export_bundle(plan: ExportPlan, config: ExportConfig, on_bytes: OnBytes = lambda _: None) -> ExportResult:
    """Write the bundle.

    Args:
        plan: of `plan_export`.
        config: the same as for the plan.
        on_bytes: called with the number of bytes of the checkpoint dealt with since the last call.

    Raises:
        BundleError: something else is at the place of the bundle, or there is no room for it.
        CheckpointError: a weight does not fit the precision.
    """
    out = config.out
    if _is_taken(out) and not config.force:
        present = read_manifest(out / "bs", BsManifest)
        if (difference := _difference(out, present, plan, config.clamp)) is None:
            (out / JOURNAL_NAME).unlink(missing_ok=True)  # of an export killed at its very end
            return ExportResult(out, present.bundle_id, already_there=True)
        raise BundleError(
            f"{out}: already holds a bundle with {difference}; choose another --out, or --force replaces it"
        )

    partial = out.with_name(out.name + ".partial")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir(exist_ok=True)
    with Journal(partial) as journal:
        _clear(partial, plan)
        _check_room(partial, plan)
        made = _write(partial, journal, plan, config, on_bytes)
        _replace(out, partial)
        # Last, so that an export killed anywhere before finds all that it had finished.
        (out / JOURNAL_NAME).unlink()
    return ExportResult(out, made, already_there=False)


def _clear(partial: Path, plan: ExportPlan) -> None:
    """Remove what an interrupted export left, but for experts and weights, which the journal may know."""
    kept = {partial / JOURNAL_NAME, partial / "experts", partial / "bs"}
    for stale in set(partial.iterdir()) - kept:
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    names = weight_files(plan.layout)
    for stale in (partial / "bs").glob("*"):
        if stale.name not in names:
            stale.unlink()


def _write(partial: Path, journal: Journal, plan: ExportPlan, config: ExportConfig, on_bytes: OnBytes) -> str:
    spec, bs_folder = plan.layout.spec, partial / "bs"
    bs_folder.mkdir(exist_ok=True)
    store = ExpertStore(partial / "experts", journal, plan.checkpoint, plan.precision, config.clamp)
    golden = [
        golden_rows(plan.checkpoint, plan.layout.block(block).post_norm, spec.d_model, block)
        for block in range(spec.n_blocks)
    ]
    if plan.precision == "int4":  # some engines round rows: golden ones are such that those that do not answer the same
        golden = list(map(rounded_rows, golden))

    def expert_job(block: int, number: int) -> Callable[[OnBytes], ExpertFile]:
        names = plan.layout.expert(block, number)
        return lambda count: store.put(block, number, names, golden[block], spec.d_ff, count)

    def weights_job(name: str, parts: tuple[Part, ...]) -> Callable[[OnBytes], StationWeights]:
        return lambda count: put_weights(
            bs_folder / name, parts, plan.checkpoint, journal, plan.stages, config.clamp, count
        )

    files = weight_files(plan.layout)
    jobs: list[Callable[[OnBytes], ExpertFile | StationWeights]] = []
    jobs += [expert_job(block, number) for block in range(spec.n_blocks) for number in range(spec.n_experts)]
    jobs += [weights_job(name, parts) for name, parts in files.items()]
    made = run_all(jobs, config.workers, on_bytes)
    flat = [file for file in made if isinstance(file, ExpertFile)]
    experts = [flat[start : start + spec.n_experts] for start in range(0, len(flat), spec.n_experts)]
    weights = [file for file in made if isinstance(file, StationWeights)]
    station = write_station(bs_folder, plan.checkpoint, plan.layout, dict(zip(files, weights, strict=True)))
    store.seal(frozenset(expert.name for expert in flat))

    hashes = tuple(tuple(expert.entry.sha256 for expert in row) for row in experts)
    name = bundle_id(spec, plan.precision, hashes, station.model_hashes)
    losses, stage_losses = _sum(flat), _sum(weights)
    error = None
    if plan.precision in QUANTISED:
        error = QuantisationError(losses.largest_error, losses.rms_error)
    frame = Frame(spec, plan.source, plan.precision, name, error)
    for device in range(device_count(plan.placement)):
        held = held_by(plan.placement, device)
        write_device(partial / f"device-{device}", partial / "experts", device, held, experts, golden, frame)
    write_manifest(bs_folder, BsManifest(
        format=FORMAT, version=VERSION, bundle_id=name, model=spec, source=plan.source, precision=plan.precision,
        experts=hashes, placement=plan.placement, stages=tuple(station.stages), head=station.head,
        calibration=golden_calibration(experts), tokenizer=station.tokenizer, chat_template=station.chat_template, files=station.files,
        shared=tuple(station.shared), quantisation_error=error, stage_precision=plan.stages,
        balance=config.placing().balance_of(plan.placement),
        expert_losses=_half_losses(losses) if plan.precision == "fp16" else None,
        stage_losses=_half_losses(stage_losses) if plan.stages == "fp16" else None,
    ))  # fmt: skip
    return name


def _sum(files: Sequence[ExpertFile] | Sequence[StationWeights]) -> Losses:
    total = Losses()
    for file in files:
        total.add(file.losses)
    return total


def _half_losses(losses: Losses) -> HalfLosses:
    return HalfLosses(losses.weights, losses.clamped, losses.to_zero)


def _is_taken(out: Path) -> bool:
    """Whether a bundle is at the place of the new one.

    Raises:
        BundleError: something that is not a bundle is there, which no option may replace.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / "bs" / MANIFEST_NAME).is_file():
        raise BundleError(f"{out}: already there and not a bundle; choose another --out or remove it")
    return True


def _difference(out: Path, present: BsManifest, plan: ExportPlan, clamp: bool) -> str | None:
    """Say in what a bundle differs from the one planned; None if it is the same and complete."""
    planned = {
        "model": plan.layout.spec,
        "source": plan.source,
        "precision": plan.precision,
        "stage_precision": plan.stages,
        "placement": plan.placement,
    }
    for name, value in planned.items():
        if getattr(present, name) != value:
            return f"another {name}"
    clamped = sum(losses.clamped for losses in (present.expert_losses, present.stage_losses) if losses is not None)
    if clamped and not clamp:
        return f"{clamped:,} clamped weights, and --clamp is not given"
    for device in range(device_count(plan.placement)):
        folder = out / f"device-{device}"
        manifest = read_manifest(folder, DeviceManifest)
        sizes = {folder / name: entry.size_bytes for name, entry in manifest.files.items()}
        sizes |= {out / "bs" / name: entry.size_bytes for name, entry in present.files.items()}
        for path, size_bytes in sizes.items():
            if not path.is_file() or path.stat().st_size != size_bytes:
                return f"a damaged file {path.name}"
    return None


def _check_room(partial: Path, plan: ExportPlan) -> None:
    """Refuse to begin what cannot be finished."""
    sizes = sizes_of(plan.layout, plan.placement, plan.stages)
    needed = sizes.bundle_bytes(plan.precision)
    spec = plan.layout.spec
    expert_bytes = expert_file_bytes(plan.layout, plan.precision)
    if can_link(partial):  # one copy of each expert, whoever holds it
        needed += expert_bytes * (
            spec.n_blocks * spec.n_experts - sum(d.experts for d in sizes.devices[plan.precision])
        )
    else:
        needed += expert_bytes * spec.n_blocks * spec.n_experts
    kept = sum(path.stat().st_size for name in ("experts", "bs") for path in (partial / name).glob("*.safetensors"))
    free = shutil.disk_usage(partial).free
    if needed - kept > free:
        raise BundleError(
            f"{partial.absolute().parent}: {free / 1e9:.1f} GB free, the bundle needs {(needed - kept) / 1e9:.1f} GB; "
            "choose another --out"
        )


def _replace(out: Path, partial: Path) -> None:
    """Put the finished folder in its place; what was there is moved away first and deleted last."""
    old = out.with_name(out.name + ".old")
    if out.exists() and any(out.iterdir()):
        if old.exists():
            shutil.rmtree(old)
        out.rename(old)
    for folder in (*partial.iterdir(), partial):
        if folder.is_dir():
            _bring_to_disk(folder)
    partial.rename(out)
    _bring_to_disk(out.absolute().parent)
    if old.exists():
        shutil.rmtree(old)


def _bring_to_disk(folder: Path) -> None:
    """Make the names in a folder survive a power cut.

    NOTE: weights were brought to the disk one by one. Graphs and the other small files were not: what a power cut
    does to them is seen by their hash in the manifest, and they are quickly made again.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
