"""The manifest of a bundle: what export writes and both sides check. Format: docs/bundle-format.md.

Needs neither torch nor the exporter: a device reads its slice with this module alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar, get_args

import msgspec

from wdmoe.runtime.errors import BundleError

FORMAT: Final = "wdmoe-bundle"
VERSION = 4
MANIFEST_NAME = "manifest.json"
SENSITIVITY_NAME = "sensitivity.json"  # beside that of `bs/`, if `wdmoe-bs calibrate` made it

Precision = Literal["fp32", "fp16", "int8", "int4"]
PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)  # largest first
QUANTISED: Final[tuple[Precision, ...]] = ("int8", "int4")
StagePrecision = Literal["fp32", "fp16"]  # of the weights of the BS; it computes in float32
Count = Annotated[int, msgspec.Meta(ge=1)]
Index = Annotated[int, msgspec.Meta(ge=0)]
Size = Annotated[float, msgspec.Meta(ge=0)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
# Names only, never paths: nothing a manifest says can reach outside its own folder.
FileName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


class Rope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rotary position embedding, resolved at export: angle = position x inv_freq, then cos and sin x scale."""

    inv_freq: tuple[float, ...]  # float32 values, head_dim / 2 of them, radians per position
    attention_scaling: float = 1.0


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The shapes of a model and the few rules its graphs cannot hold."""

    name: str
    family: str  # the checkpoint's model_type, for example "mixtral"
    n_blocks: Count
    n_experts: Count  # routed experts of each block
    top_k: Count
    d_model: Count
    d_ff: Count  # width of one routed expert
    n_heads: Count
    n_kv_heads: Count
    head_dim: Count
    vocab_size: Count
    max_positions: Count
    norm_top_k: bool  # whether the chosen experts' weights are scaled to sum to one
    rope: Rope
    shared_expert: bool = False  # whether each block has an expert that stays at the BS
    sliding_window: int | None = None  # positions a token can look back; None: all
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def kv_dim(self) -> int:
        """Width of the keys (and of the values) of one token in one block."""
        return self.n_kv_heads * self.head_dim


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file of the folder must be."""

    sha256: Sha256
    size_bytes: Index


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the bundle was made of."""

    checkpoint_sha256: Sha256  # over config.json and the header of every shard, see docs/bundle-format.md
    exporter: str  # for example "wdmoe 0.1.0"


class QuantisationError(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far the answers of quantised experts to the golden rows are from those of the checkpoint's own weights."""

    largest: float  # error of the worst expert, relative to the largest value of its answers
    rms: float  # of all experts together: root of the mean squared error over root of the mean square


class HalfLosses(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What float16 did not hold of the weights that were stored in it."""

    weights: Index  # how many were
    clamped: Index  # too large, now the largest float16
    to_zero: Index  # too small, now zero


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How large the experts' answers are and how often each is chosen; see docs/bundle-format.md, Calibration."""

    source: Literal["golden", "text"]  # the golden rows, all of them by every expert; or what a text was routed to
    norms: tuple[tuple[Size, ...], ...]  # [block][expert] -> mean L2 norm of its answers, before the gate weight
    tokens: Index = 0  # of the text
    counts: tuple[tuple[Index, ...], ...] = ()  # [block][expert] -> how many of them chose it
    tokens_sha256: Sha256 | None = None  # over their ids, 8 bytes each


class Balance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a balanced placement was made of, and what it promises."""

    counts: tuple[tuple[Size, ...], ...]  # [block][expert] -> how often it was chosen, as far as was known
    speeds: tuple[Size, ...]  # of the devices, in any unit
    times: tuple[tuple[Size, ...], ...]  # [block][device] -> share of the choices over share of all speed; 1 is level

    @property
    def slowest(self) -> float:
        """Mean over the blocks of their slowest device's time; 1 cannot be beaten."""
        return sum(map(max, self.times)) / len(self.times)


class ExpertEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One expert of a device's slice."""

    block: Index
    expert: Index
    weights: FileName  # safetensors with gate_proj, up_proj and down_proj; see docs/bundle-format.md, Precision
    graph: FileName  # ONNX, its initializers are byte ranges of `weights`


class BsManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="bs"):
    """manifest.json of the folder `bs/`."""

    format: Literal["wdmoe-bundle"]
    version: int
    bundle_id: Sha256
    model: ModelSpec
    source: Source
    precision: Precision  # of the experts
    experts: tuple[tuple[Sha256, ...], ...]  # [block][expert] -> content hash of its safetensors file
    placement: tuple[tuple[tuple[Index, ...], ...], ...]  # [block][expert] -> numbers of the devices that hold it
    stages: tuple[FileName, ...]  # n_blocks + 1 graphs
    head: FileName
    calibration: Calibration
    tokenizer: FileName | None
    chat_template: FileName | None
    files: dict[FileName, FileEntry]
    shared: tuple[FileName, ...] = ()  # one graph a block where the model has shared experts
    quantisation_error: QuantisationError | None = None  # of all experts, where they are int8 or int4
    stage_precision: StagePrecision = "fp32"
    expert_losses: HalfLosses | None = None  # where experts are fp16
    stage_losses: HalfLosses | None = None  # where stages are fp16
    # NOTE: unset is left out of the file, and so of its hash: bundles from before there was this field stay what they are.
    balance: Balance | msgspec.UnsetType = msgspec.UNSET  # where the placement was balanced
    manifest_sha256: str = ""  # of this manifest with this field empty; set when it is written

    @property
    def n_devices(self) -> int:
        """Number of device folders the placement speaks of."""
        return 1 + max(d for block in self.placement for devices in block for d in devices)


class DeviceManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="device"):
    """manifest.json of a folder `device-k/`."""

    format: Literal["wdmoe-bundle"]
    version: int
    bundle_id: Sha256
    model: ModelSpec
    source: Source
    precision: Precision
    device: Index  # k
    experts: tuple[ExpertEntry, ...]  # ordered by block, then expert
    golden: FileName  # safetensors with input.block_B and output.block_B.expert_E, see docs/bundle-format.md
    files: dict[FileName, FileEntry]
    quantisation_error: QuantisationError | None = None  # as in the manifest of the BS
    manifest_sha256: str = ""  # of this manifest with this field empty; set when it is written


Manifest = BsManifest | DeviceManifest
AnyManifest = TypeVar("AnyManifest", BsManifest, DeviceManifest)


def bundle_id(
    model: ModelSpec, precision: Precision, experts: Iterable[Iterable[str]], bs_files: dict[str, str]
) -> str:
    """Name a model as exported: equal for every placement and replica of it.

    Args:
        model: the shapes.
        precision: of the experts.
        experts: content hash of each expert, [block][expert].
        bs_files: name -> SHA-256 of the graphs and weights of the BS.
    """
    text = json.dumps(
        [msgspec.to_builtins(model), precision, [list(block) for block in experts], sorted(bs_files.items())],
        sort_keys=True,
        separators=(",", ":"),
    )
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json; the last file of a folder to be written."""
    sealed = msgspec.structs.replace(manifest, manifest_sha256=manifest_digest(manifest))
    text = msgspec.json.format(msgspec.json.encode(sealed), indent=1)
    partial = folder / f"{MANIFEST_NAME}.partial"
    partial.write_bytes(text + b"\n")
    partial.replace(folder / MANIFEST_NAME)


def manifest_digest(manifest: Manifest) -> str:
    """Return the SHA-256 over the canonical JSON of a manifest with `manifest_sha256` empty."""
    plain = msgspec.structs.replace(manifest, manifest_sha256="")
    return hashlib.sha256(msgspec.json.encode(plain, order="sorted")).hexdigest()


def read_manifest(folder: Path, kind: type[AnyManifest]) -> AnyManifest:
    """Read and check manifest.json of a folder.

    Raises:
        BundleError: it is missing, damaged, of another version or of the other role.
    """
    path = folder / MANIFEST_NAME
    role = "bs" if kind is BsManifest else "device"
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be read ({error.strerror}); expected the {role} folder of a bundle made by wdmoe-export"
        ) from error
    head = _json_object(path, raw)
    for field, expected in (("format", FORMAT), ("version", VERSION), ("role", role)):
        if head.get(field) != expected:
            raise BundleError(f"{path}: field {field} is {head.get(field)!r}, expected {expected!r}{_REMEDY[field]}")
    try:
        manifest = msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise BundleError(f"{path}: {error}; export the model again") from error
    _check_shape(path, manifest)
    if (found := manifest_digest(manifest)) != manifest.manifest_sha256:
        raise BundleError(
            f"{path}: its sha256 is {found}, field manifest_sha256 says {manifest.manifest_sha256 or 'nothing'}; "
            "it was damaged or edited: copy the folder again"
        )
    return manifest


def verify_files(folder: Path, manifest: Manifest, on_bytes: Callable[[int], None] | None = None) -> None:
    """Check size and SHA-256 of every file the manifest names.

    Args:
        folder: where the manifest lies.
        manifest: what the files must be.
        on_bytes: called with the number of bytes hashed since the last call, for a progress bar.

    Raises:
        BundleError: a file is missing or differs; names file and field.
    """
    for name, entry in manifest.files.items():
        path = folder / name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise BundleError(f"{path}: missing; copy the folder again") from error
        if size != entry.size_bytes:
            raise BundleError(
                f"{path}: size is {size} bytes, the manifest says {entry.size_bytes}; copy the folder again"
            )
        if (found := sha256_of(path, on_bytes)) != entry.sha256:
            raise BundleError(f"{path}: sha256 is {found}, the manifest says {entry.sha256}; copy the folder again")


def sha256_of(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Hash a file in pieces of 4 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
            if on_bytes is not None:
                on_bytes(len(piece))
    return digest.hexdigest()


_REMEDY = {
    "format": "; this is not a wdmoe bundle",
    "version": "; export the model again with this version of wdmoe, or run the version that made it",
    "role": "; give the folder `bs` to wdmoe-bs and a folder `device-K` to wdmoe-device",
}


def _json_object(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        head = json.loads(raw)
    except ValueError as error:
        raise BundleError(f"{path}: not JSON ({error}); copy the folder again") from error
    if not isinstance(head, dict):
        raise BundleError(f"{path}: expected a JSON object, got {type(head).__name__}")
    return head


def _check_shape(path: Path, manifest: Manifest) -> None:
    """Check what field types cannot say: counts that must agree, and files that must be listed."""
    model = manifest.model
    if model.top_k > model.n_experts:
        raise BundleError(f"{path}: top_k {model.top_k} is more than n_experts {model.n_experts}")
    named: list[str]
    if isinstance(manifest, BsManifest):
        grid: dict[str, tuple[tuple[object, ...], ...]] = {
            "experts": manifest.experts,
            "placement": manifest.placement,
            "calibration.norms": manifest.calibration.norms,
        }
        if manifest.calibration.source == "text":
            grid["calibration.counts"] = manifest.calibration.counts
        if isinstance(manifest.balance, Balance):
            grid["balance.counts"] = manifest.balance.counts
            sizes = {len(manifest.balance.speeds), *map(len, manifest.balance.times)}
            if sizes != {manifest.n_devices} or len(manifest.balance.times) != model.n_blocks:
                raise BundleError(
                    f"{path}: field balance is not of {model.n_blocks} blocks, {manifest.n_devices} devices"
                )
        for field, table in grid.items():
            if len(table) != model.n_blocks or any(len(row) != model.n_experts for row in table):
                raise BundleError(f"{path}: field {field} is not {model.n_blocks} blocks x {model.n_experts} experts")
        if any(not devices for row in manifest.placement for devices in row):
            raise BundleError(f"{path}: field placement leaves an expert without a device")
        if len(manifest.stages) != model.n_blocks + 1:
            raise BundleError(f"{path}: {len(manifest.stages)} stages for {model.n_blocks} blocks")
        if len(manifest.shared) != (model.n_blocks if model.shared_expert else 0):
            raise BundleError(f"{path}: {len(manifest.shared)} shared experts for {model.n_blocks} blocks")
        extra = [name for name in (manifest.tokenizer, manifest.chat_template) if name is not None]
        named = [*manifest.stages, *manifest.shared, manifest.head, *extra]
    else:
        for entry in manifest.experts:
            if entry.block >= model.n_blocks or entry.expert >= model.n_experts:
                raise BundleError(f"{path}: expert {entry.expert} of block {entry.block} is outside the model")
        named = [manifest.golden, *(n for e in manifest.experts for n in (e.weights, e.graph))]
    if missing := [name for name in named if name not in manifest.files]:
        raise BundleError(f"{path}: field files does not list {missing[0]}")
