"""Which device holds which experts.

By default contiguous ranges, the same for every block; the last device takes what is left over: with so many experts
per device it may hold fewer, with so many devices it may hold more. Otherwise as a file says, or balanced by what was
measured (`balance.py`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import UNSET, UnsetType

from wdmoe.export.balance import Counts, Placement, add_replicas, balanced, expected_times, read_counts
from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.manifest import Balance

__all__ = [
    "Placement",
    "PlacementOptions",
    "device_count",
    "held_by",
    "placement_of",
    "read_placement",
    "split_over_devices",
    "split_per_device",
]

_DEFAULT_PER_DEVICE = 2


@dataclass(frozen=True, slots=True)
class PlacementOptions:
    """What the user says about it; at most one of the first four."""

    experts_per_device: int | None = None  # None: 2, unless another is given
    devices: int | None = None
    file: Path | None = None
    balance: bool = False  # level expected load over speed
    counts: Path | None = None  # how often each expert was chosen; None: all equally often
    speeds: tuple[float, ...] = ()  # of each device, in any unit; empty: all equal
    replicas: int = 0  # of the most used experts of each block, a second device

    def __post_init__(self) -> None:
        if self.experts_per_device is not None and self.devices is not None:
            raise ValueError("give either experts per device or the number of devices, not both")
        if self.file is not None and (self.balance or self.experts_per_device or self.devices):
            raise ValueError("a placement file says all; give no number of experts or devices beside it")
        if (self.counts or self.speeds) and not (self.balance or self.replicas):
            raise ValueError("counts and speeds are for a balanced placement or for replicas")

    def place(
        self,
        n_blocks: int,
        n_experts: int,
        most_held: int | Sequence[int] | None = None,
        current: Placement | None = None,
        measured: Counts | None = None,
    ) -> Placement:
        """Place the experts of a model.

        Args:
            n_blocks: of the model.
            n_experts: of each block.
            most_held: experts, of all blocks together, that fit on one device, the same on all or device by device;
                None: any number. Only a balanced placement and replicas heed it.
            current: placement to begin with, where the options name none.
            measured: how often each expert was chosen, where the options name no file.

        Raises:
            ValueError: the options do not fit the model or each other.
            BundleError: a file is damaged.
        """
        counts = measured if measured and not self.counts else read_counts(self.counts, n_blocks, n_experts)
        if self.file is not None:
            placement = read_placement(self.file, n_blocks, n_experts)
        elif self.balance:
            listed = len(most_held) if isinstance(most_held, Sequence) else 0
            n_devices = self.devices or len(self.speeds) or listed or len(self._groups(n_experts))
            if listed and listed != n_devices:
                raise ValueError(f"{listed} sizes of memory for {n_devices} devices")
            placement = balanced(counts, self._speeds(n_devices), most_held)
        elif current is not None and self.experts_per_device is None and self.devices is None:
            placement = current
        else:
            placement = placement_of(self._groups(n_experts), n_blocks)
        if isinstance(most_held, Sequence) and len(most_held) != device_count(placement):
            raise ValueError(f"{len(most_held)} sizes of memory for {device_count(placement)} devices")
        if self.replicas:
            speeds = self._speeds(device_count(placement))
            placement = add_replicas(placement, counts, speeds, self.replicas, most_held, keep_level=self.balance)
        return placement

    def balance_of(
        self, placement: Placement, measured: Counts | None = None, before: Balance | UnsetType = UNSET
    ) -> Balance | UnsetType:
        """Say what a placement of `place` was balanced by; unset where it was not.

        Args:
            placement: what `place` returned.
            measured: as for `place`.
            before: of the placement that `place` began with: it stays what the new one is balanced by, if the options
                only add replicas.
        """
        n_devices = device_count(placement)
        if self.balance:
            counts = (
                measured
                if measured and not self.counts
                else read_counts(self.counts, len(placement), len(placement[0]))
            )
            speeds = self._speeds(n_devices)
        elif isinstance(before, Balance) and len(before.speeds) == n_devices and not self._places_anew():
            counts, speeds = before.counts, before.speeds
        else:
            return UNSET
        # Floats, as they are read back: a manifest's hash is over its JSON, where 3 and 3.0 differ.
        floats = tuple(tuple(map(float, row)) for row in counts)
        return Balance(floats, speeds, tuple(map(tuple, expected_times(placement, counts, speeds))))

    def _places_anew(self) -> bool:
        return bool(self.file or self.experts_per_device or self.devices)

    def _groups(self, n_experts: int) -> tuple[range, ...]:
        if self.devices is not None:
            return split_over_devices(n_experts, self.devices)
        if self.experts_per_device is not None:
            return split_per_device(n_experts, self.experts_per_device)
        return split_per_device(n_experts, min(_DEFAULT_PER_DEVICE, n_experts))

    def _speeds(self, n_devices: int) -> tuple[float, ...]:
        if self.speeds and len(self.speeds) != n_devices:
            raise ValueError(f"{len(self.speeds)} speeds for {n_devices} devices")
        if any(not speed > 0 for speed in self.speeds):
            raise ValueError("a speed must be more than 0")
        return self.speeds or (1.0,) * n_devices


def split_per_device(n_experts: int, experts_per_device: int) -> tuple[range, ...]:
    """Give each device so many experts, the last one the remainder: 8 by 3 gives 3, 3, 2."""
    if not 1 <= experts_per_device <= n_experts:
        raise ValueError(f"experts per device must be 1 to {n_experts}, the model's experts; got {experts_per_device}")
    starts = range(0, n_experts, experts_per_device)
    return tuple(range(start, min(start + experts_per_device, n_experts)) for start in starts)


def split_over_devices(n_experts: int, n_devices: int) -> tuple[range, ...]:
    """Give each device the same number of experts, the last one the rest as well: 8 over 3 gives 2, 2, 4."""
    if not 1 <= n_devices <= n_experts:
        raise ValueError(f"devices must be 1 to {n_experts}, the model's experts; got {n_devices}")
    each = n_experts // n_devices
    ends = [*range(each, each * n_devices, each), n_experts]
    return tuple(range(each * k, end) for k, end in enumerate(ends))


def placement_of(groups: Sequence[Sequence[int]], n_blocks: int) -> Placement:
    """Tabulate the devices of each expert, the same in every block.

    Args:
        groups: device -> its experts.
        n_blocks: of the model.
    """
    n_experts = 1 + max(expert for group in groups for expert in group)
    block = tuple(tuple(d for d, group in enumerate(groups) if expert in group) for expert in range(n_experts))
    return (block,) * n_blocks


def device_count(placement: Placement) -> int:
    """Return the number of devices of a placement."""
    return 1 + max(device for row in placement for devices in row for device in devices)


def held_by(placement: Placement, device: int) -> tuple[tuple[int, int], ...]:
    """List the experts of a device as (block, expert), in order."""
    return tuple((b, e) for b, row in enumerate(placement) for e, devices in enumerate(row) if device in devices)


def read_placement(path: Path, n_blocks: int, n_experts: int) -> Placement:
    """Read a placement, JSON or TOML.

    It has one field: `placement`, [block][expert] -> devices, or `devices`, [device] -> its experts in every block.

    Raises:
        BundleError: it is damaged or does not fit the model; names the expert.
    """
    content = _read_table(path)
    if set(content) == {"devices"} and _is_list_of_lists(groups := content["devices"]):
        known = range(n_experts)
        table = [[[d for d, group in enumerate(groups) if expert in group] for expert in known]] * n_blocks
        if extra := [expert for group in groups for expert in group if expert not in known]:
            raise BundleError(f"{path}: expert {extra[0]} is outside the model, whose blocks have {n_experts}")
    elif set(content) == {"placement"} and _is_table(content["placement"]):
        table = content["placement"]
    else:
        raise BundleError(
            f"{path}: expected one field, devices ([[0, 1], [2, 3], ...], the experts of each device) or "
            "placement ([block][expert] -> devices)"
        )
    if len(table) != n_blocks or any(len(row) != n_experts for row in table):
        raise BundleError(f"{path}: is not {n_blocks} blocks x {n_experts} experts")
    used = {device for row in table for devices in row for device in devices}
    for block, row in enumerate(table):
        for expert, devices in enumerate(row):
            if not devices or len(set(devices)) != len(devices):
                raise BundleError(f"{path}: expert {expert} of block {block} has the devices {devices}")
    if used != set(range(len(used))):
        raise BundleError(f"{path}: devices are {sorted(used)}, expected 0, 1, ... without a gap, each with an expert")
    return tuple(tuple(tuple(sorted(devices)) for devices in row) for row in table)


def _read_table(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            if sys.version_info < (3, 11):
                raise BundleError(f"{path}: TOML needs Python 3.11; write the same as JSON")
            import tomllib

            content: object = tomllib.loads(text)
        else:
            content = json.loads(text)
    except ValueError as error:
        raise BundleError(f"{path}: cannot be read ({error})") from error
    return content if isinstance(content, dict) else {}


def _is_table(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_list_of_lists, value))


def _is_list_of_lists(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in row) for row in value
    )
