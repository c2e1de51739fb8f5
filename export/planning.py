"""The plan of an export, before a byte is written: what goes where, how large it is, and whether devices can hold it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from wdmoe.export.balance import Counts, expected_times
from wdmoe.export.families import ModelLayout
from wdmoe.export.placement import Placement, device_count, held_by
from wdmoe.export.sizing import HEADROOM, DeviceSize, Sizes, advice, by_device, fits, most_held, sizes_of
from wdmoe.runtime.manifest import PRECISIONS, Precision, StagePrecision

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True)
class DryRun:
    """All that is known of an export from the config and the options."""

    layout: ModelLayout
    origin: str  # where the config is from
    precision: Precision
    stages: StagePrecision
    placement: Placement
    sizes: Sizes
    counts: Counts
    speeds: tuple[float, ...]
    device_memory_bytes: tuple[int, ...]  # of each device; empty: not said

    @property
    def too_small(self) -> tuple[int, ...]:
        """The devices whose memory does not hold their experts in the precision chosen."""
        return tuple(d.device for d in self.sizes.devices[self.precision] if self.fits(d) is False)

    def fits(self, device: DeviceSize) -> bool | None:
        """Say whether a device holds its experts; None: its memory is not known."""
        return fits(self.device_memory_bytes[device.device], device.memory_bytes) if self.device_memory_bytes else None

    @property
    def advice(self) -> str | None:
        """What to change, if a device is too small."""
        if not self.too_small:
            return None
        spec, memory = self.layout.spec, self.device_memory_bytes
        room = sum(most_held(spec, self.precision, size_bytes) for size_bytes in memory)
        if len(set(memory)) > 1 and room >= spec.n_blocks * spec.n_experts:
            return "use --placement balanced, which heeds the memory of each"
        return advice(self.layout, self.precision, min(memory))

    def times(self) -> list[float]:
        """Return for each device its mean over the blocks of expected load over speed; 1 is level."""
        by_block = expected_times(self.placement, self.counts, self.speeds)
        return [sum(column) / len(by_block) for column in zip(*by_block, strict=True)]

    def slowest(self) -> float:
        """Return the mean over the blocks of the slowest device's expected load over speed; 1 cannot be beaten."""
        by_block = expected_times(self.placement, self.counts, self.speeds)
        return sum(map(max, by_block)) / len(by_block)

    def as_json(self) -> dict[str, Any]:
        """Say the same for programs."""
        spec, memory = self.layout.spec, self.device_memory_bytes
        said: int | tuple[int, ...] | None = memory or None
        if len(set(memory)) == 1:
            said = memory[0]
        return {
            "model": spec.name,
            "family": spec.family,
            "config": self.origin,
            "parameters": self.sizes.parameters,
            "precision": self.precision,
            "stage_precision": self.stages,
            "n_blocks": spec.n_blocks,
            "n_experts": spec.n_experts,
            "bs": asdict(self.sizes.station),
            "devices": {
                precision: [asdict(size) | {"fits": self.fits(size)} for size in sizes]
                for precision, sizes in self.sizes.devices.items()
            },
            "bundle_bytes": {precision: self.sizes.bundle_bytes(precision) for precision in self.sizes.devices},
            "device_memory_bytes": said,
            "headroom": HEADROOM,
            "fits": not self.too_small if memory else None,
            "advice": self.advice,
            "expected_time": self.times(),
            "expected_time_of_slowest": self.slowest(),
            "placement": self.placement,
        }


def dry_run(
    layout: ModelLayout,
    origin: str,
    precision: Precision,
    placement: Placement,
    counts: Counts,
    speeds: tuple[float, ...],
    device_memory_bytes: tuple[int, ...] = (),
    stages: StagePrecision = "fp32",
) -> DryRun:
    """Work out a plan; arguments as the fields of `DryRun`, speeds may be empty, one memory is that of all devices.

    Raises:
        ValueError: there are neither one nor as many sizes of memory as devices.
    """
    n_devices = device_count(placement)
    memory = by_device(device_memory_bytes, n_devices) if device_memory_bytes else ()
    sizes = sizes_of(layout, placement, stages)
    return DryRun(layout, origin, precision, stages, placement, sizes, counts, speeds or (1.0,) * n_devices, memory)


def plan_table(plan: DryRun) -> RenderableType:
    """Lay out a plan for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    spec, station, memory = plan.layout.spec, plan.sizes.station, plan.device_memory_bytes
    uneven = any(count != counts[0] for counts in plan.counts for count in counts) or len(set(plan.speeds)) > 1
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    table.caption = "GB on the disk in the precision chosen, and of memory in each" + (
        "; ! does not fit" if memory else ""
    )
    for name in ("folder", "experts", "load", "disk", *PRECISIONS):
        if uneven or name != "load":
            table.add_column(
                name, justify="left" if name in ("folder", "experts") else "right", no_wrap=name != "experts"
            )
    stages = [gb(station.disk_bytes), *[gb(station.memory_bytes)] * len(PRECISIONS)]
    table.add_row("bs", f"none, stages {plan.stages}", *(["-"] if uneven else []), *stages)
    for device, time in enumerate(plan.times()):
        cells = [f"{time:.2f}"] if uneven else []
        cells.append(gb(plan.sizes.devices[plan.precision][device].disk_bytes))
        for precision in PRECISIONS:
            size = plan.sizes.devices[precision][device]
            cells.append(gb(size.memory_bytes) + ("!" if plan.fits(size) is False else ""))
        table.add_row(f"device-{device}", describe_held(plan.placement, device), *cells)
    notes = [
        f"Experts will be {plan.precision}; all folders together take {gb(plan.sizes.bundle_bytes(plan.precision))} GB.",
        f"Memory of the bs: weights, scratch and {gb(station.kv_bytes)} GB of keys and values ({station.context:,} tokens).",
        (
            "Memory of a device: weights as stored and scratch. onnxruntime holds fp16 as float32; where that does not "
            "fit, the numpy engine maps the files and converts at each use."
        ),
    ]
    if uneven:
        notes.append(
            "Load: expected share of a block's work over share of speed, mean over blocks; 1.00 is level. "
            f"Slowest device of each block: {plan.slowest():.2f}."
        )
    if memory:
        sizes = ", ".join(map(gb, memory if len(set(memory)) > 1 else memory[:1]))
        room = f"devices of {sizes} GB, {HEADROOM:.0%} of it kept free"
        verdict = "fits" if not plan.too_small else f"does not fit device {', '.join(map(str, plan.too_small))}"
        notes.append(f"{plan.precision} on {room}: {verdict}" + (f"; {plan.advice}." if plan.advice else "."))
    heading = [
        f"{spec.name} ({spec.family}, {plan.origin})",
        (
            f"{plan.sizes.parameters / 1e9:.2f} billion parameters, {spec.n_blocks} blocks x {spec.n_experts} experts, "
            f"d_model {spec.d_model}, d_ff {spec.d_ff}"
        ),
    ]
    return Group(*map(Text, heading), table, *map(Text, notes))


def describe_held(placement: Placement, device: int) -> str:
    """Name the experts of a device: their numbers, where they are the same in every block."""
    held = held_by(placement, device)
    by_block = [[expert for of, expert in held if of == block] for block in range(len(placement))]
    if all(row == by_block[0] for row in by_block):
        return f"{spans(by_block[0])} of each block"
    fewest, most = min(map(len, by_block)), max(map(len, by_block))
    return f"{len(held)}: {fewest if fewest == most else f'{fewest}-{most}'} of a block"


def spans(numbers: list[int]) -> str:
    """Write numbers briefly: 0, 1, 2, 5 becomes 0-2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}-{b}" for a, b in runs)


def gb(size_bytes: float) -> str:
    """Write a size in GB (10^9 bytes)."""
    return f"{size_bytes / 1e9:,.2f}" if size_bytes >= 1e7 else f"{size_bytes / 1e9:.4f}"
