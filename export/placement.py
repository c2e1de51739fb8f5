"""Which device holds which experts: contiguous ranges, the same for every block.

The last device takes what is left over: with so many experts per device it may hold fewer, with so many devices
it may hold more.
"""

from __future__ import annotations

Placement = tuple[tuple[tuple[int, ...], ...], ...]  # [block][expert] -> devices


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


def placement_of(groups: tuple[range, ...], n_blocks: int) -> Placement:
    """Tabulate the devices of each expert, the same in every block."""
    block = tuple((device,) for device, experts in enumerate(groups) for _ in experts)
    return (block,) * n_blocks
