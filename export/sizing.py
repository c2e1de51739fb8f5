"""How large a bundle will be, and what memory the base station and a device need, from the config alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wdmoe.export.families import ModelLayout
from wdmoe.export.placement import Placement, device_count, held_by
from wdmoe.export.slicing import GOLDEN_ROWS
from wdmoe.export.station import weight_files
from wdmoe.export.weights import Part, all_expert_parts, embedding_parts, station_parts
from wdmoe.runtime.manifest import PRECISIONS, ModelSpec, Precision, StagePrecision
from wdmoe.runtime.quantised import Layout, expert_layout
from wdmoe.runtime.tensor_file import encode_header, total_bytes

HEADROOM = 0.2  # of the memory, for the system and all else
CONTEXT_TOKENS = 4096  # for which keys and values are counted, if the model takes as many
_ROWS = 1024  # tokens of one microbatch
_DEVICE_PROCESS_BYTES = 300_000_000  # Python, numpy, ONNX Runtime, sockets and a few requests
_STATION_PROCESS_BYTES = 600_000_000  # the tokenizer and lm-eval too
_CHUNK_BYTES = 4 << 20  # weights that the numpy engine converts at a time
# Measured on exports: stubs of experts, graphs of stages, manifests (the BS's lists every hash) are of about this size.
_STUB_BYTES: dict[Precision, int] = {"fp32": 800, "fp16": 800, "int8": 4700, "int4": 3000}
_GRAPH_BYTES = 4000
_ENTRY_BYTES = 260  # of a file or an expert in a manifest


@dataclass(frozen=True, slots=True)
class DeviceSize:
    """One device, in one precision."""

    device: int
    experts: int  # of all blocks together
    disk_bytes: int
    memory_bytes: int  # with an engine that holds weights as stored


@dataclass(frozen=True, slots=True)
class StationSize:
    """The base station."""

    disk_bytes: int
    kv_bytes: int  # keys and values of `context` tokens
    context: int
    memory_bytes: int  # weights, keys and values, scratch


@dataclass(frozen=True, slots=True)
class Sizes:
    """All of a bundle."""

    parameters: int
    station: StationSize
    devices: dict[Precision, tuple[DeviceSize, ...]]

    def bundle_bytes(self, precision: Precision) -> int:
        """Bytes of all folders to be copied; replicas count twice."""
        return self.station.disk_bytes + sum(device.disk_bytes for device in self.devices[precision])


def sizes_of(layout: ModelLayout, placement: Placement, stages: StagePrecision = "fp32") -> Sizes:
    """Work out the sizes of a bundle: weights exactly, graphs and manifests about."""
    spec = layout.spec
    held = [len(held_by(placement, device)) for device in range(device_count(placement))]
    devices = {
        precision: tuple(
            DeviceSize(k, n, n * (expert_file_bytes(layout, precision) + _overhead(spec, n, precision)), device_memory(spec, n, precision))
            for k, n in enumerate(held)
        )
        for precision in PRECISIONS
    }  # fmt: skip
    parts = (*station_parts(layout), *all_expert_parts(layout))
    return Sizes(sum(math.prod(part.shape) for part in parts), station_size(layout, stages), devices)


def expert_file_bytes(layout: ModelLayout, precision: Precision) -> int:
    """Return the size of the file of one expert."""
    return _file_bytes(expert_layout(layout.spec.d_model, layout.spec.d_ff, precision))


def weight_bytes(spec: ModelSpec, precision: Precision) -> int:
    """Return the bytes of the weights of one expert, scales included."""
    return total_bytes(encode_header(expert_layout(spec.d_model, spec.d_ff, precision))[1].values())


def device_memory(spec: ModelSpec, n_held: int, precision: Precision) -> int:
    """Return the memory that a device needs with so many experts, if its engine holds weights as stored."""
    weights = n_held * weight_bytes(spec, precision)
    scratch = _ROWS * (3 * spec.d_model + 3 * spec.d_ff) * 4 + _CHUNK_BYTES
    return weights + scratch + _DEVICE_PROCESS_BYTES


def fits(memory_bytes: int, needed_bytes: int) -> bool:
    """Say whether memory is enough, with headroom."""
    return needed_bytes <= (1 - HEADROOM) * memory_bytes


def most_held(spec: ModelSpec, precision: Precision, memory_bytes: int) -> int:
    """Return how many experts, of all blocks together, fit on a device."""
    free = (1 - HEADROOM) * memory_bytes - device_memory(spec, 0, precision)
    return max(0, int(free // weight_bytes(spec, precision)))


def by_device(memory_bytes: tuple[int, ...], n_devices: int) -> tuple[int, ...]:
    """Return the memory of each device; one size is that of all.

    Raises:
        ValueError: there are as many sizes as neither.
    """
    if len(memory_bytes) not in (1, n_devices):
        raise ValueError(f"{len(memory_bytes)} sizes of memory for {n_devices} devices")
    return memory_bytes if len(memory_bytes) == n_devices else memory_bytes * n_devices


def limit_of(spec: ModelSpec, precision: Precision, memory_bytes: tuple[int, ...]) -> int | tuple[int, ...] | None:
    """Return how many experts fit: on any device, on each of several, or None where nothing is said."""
    limits = tuple(most_held(spec, precision, size_bytes) for size_bytes in memory_bytes)
    return None if not limits else limits[0] if len(limits) == 1 else limits


def advice(layout: ModelLayout, precision: Precision, memory_bytes: int) -> str:
    """Say what to change when a device is too small."""
    spec = layout.spec
    choices = []
    for smaller in PRECISIONS[PRECISIONS.index(precision) :]:
        per_device = min(spec.n_experts, most_held(spec, smaller, memory_bytes) // spec.n_blocks)
        if per_device:
            n_devices = -(-spec.n_experts // per_device)
            option = "" if smaller == precision else f"--precision {smaller} "
            choices.append(
                f"{option}--experts-per-device {per_device} ({n_devices} device{'' if n_devices == 1 else 's'})"
            )
    if choices:
        return "use " + " or ".join(choices)
    smallest = PRECISIONS[-1]
    held = most_held(spec, smallest, memory_bytes)
    if held:
        n_devices = -(-spec.n_blocks * spec.n_experts // held)
        return f"use --precision {smallest} --placement balanced --devices {n_devices}: {held} experts fit on each"
    needed = device_memory(spec, spec.n_blocks, smallest) / (1 - HEADROOM)
    return f"devices that hold one expert of each block in {smallest} need {needed / 1e9:.1f} GB"


def _overhead(spec: ModelSpec, n_held: int, precision: Precision) -> int:
    """Bytes beside each expert file: its stub, golden answers (and its part of the golden rows), manifest entries."""
    golden = GOLDEN_ROWS * spec.d_model * 4 * (n_held + spec.n_blocks)
    rest = n_held * (_STUB_BYTES[precision] + 3 * _ENTRY_BYTES) + _GRAPH_BYTES + spec.head_dim * 12
    return -(-(golden + rest) // n_held)


def station_size(layout: ModelLayout, stages: StagePrecision = "fp32") -> StationSize:
    """Work out the size of the base station, whatever the experts are."""
    spec = layout.spec
    files = weight_files(layout)
    weights = sum(_file_bytes(_stored(parts, stages)) for parts in files.values())
    # ONNX Runtime folds the casts of fp16 matrices when it opens a graph; of the embedding only rows are cast.
    matrices = [parts for parts in files.values() if parts != embedding_parts(layout) or layout.tied_head]
    held = sum(_file_bytes(_stored(parts, "fp32")) for parts in matrices)
    held += _file_bytes(_stored(embedding_parts(layout), stages))
    graphs = len(files) * (_GRAPH_BYTES + 2 * _ENTRY_BYTES) + spec.n_blocks * spec.n_experts * 110
    context = min(CONTEXT_TOKENS, spec.max_positions)
    kv = 2 * spec.n_blocks * spec.kv_dim * context * 4
    mask = _ROWS * (context + _ROWS) * 4 * (1 + spec.n_heads)  # and the scores of one block
    scratch = mask + _ROWS * (spec.vocab_size + 8 * spec.d_model) * 4
    memory = held + kv + scratch + _STATION_PROCESS_BYTES
    return StationSize(weights + graphs, kv, context, memory)


def _stored(parts: tuple[Part, ...], stages: StagePrecision) -> Layout:
    return {part.name: (part.stored_as(stages), part.shape) for part in parts}


def _file_bytes(tensors: Layout) -> int:
    header, spans = encode_header(tensors)
    return len(header) + total_bytes(spans.values())
