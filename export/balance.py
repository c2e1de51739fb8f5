"""Places experts so that no device is waited for longer than need be: expected load over speed, level in each block.

A block is done when its slowest device is, so each block is balanced by itself: the most used experts first, each to
the device that would then be done first, and afterwards moves and swaps as long as they help.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from wdmoe.runtime.errors import BundleError

Counts = tuple[tuple[float, ...], ...]  # [block][expert] -> how often it was chosen
Placement = tuple[tuple[tuple[int, ...], ...], ...]  # [block][expert] -> devices


def read_counts(path: Path | None, n_blocks: int, n_experts: int) -> Counts:
    """Read how often each expert was chosen.

    Args:
        path: a JSON list [block][expert] or an object with it as `counts`, or a trace of `wdmoe-bs trace` (.npz); None:
            all equally often.
        n_blocks: of the model.
        n_experts: of each block.

    Raises:
        BundleError: it is damaged or does not fit the model.
    """
    if path is None:
        return ((1.0,) * n_experts,) * n_blocks
    table = _counts_of_trace(path) if path.suffix == ".npz" else _counts_of_json(path)
    if not isinstance(table, list) or len(table) != n_blocks:
        raise BundleError(f"{path}: expected {n_blocks} blocks of {n_experts} counts")
    for block, row in enumerate(table):
        fits = isinstance(row, list) and len(row) == n_experts
        if not fits or not all(isinstance(n, int | float) and not isinstance(n, bool) and n >= 0 for n in row):
            raise BundleError(f"{path}: block {block} is not {n_experts} counts of 0 or more")
        if not sum(row) > 0:
            raise BundleError(f"{path}: block {block} has no choice at all; count over more text")
    return tuple(tuple(map(float, row)) for row in table)


def _counts_of_json(path: Path) -> object:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path}: not JSON ({error})") from error
    return content.get("counts") if isinstance(content, dict) else content


def _counts_of_trace(path: Path) -> object:
    """Read the counts of a recorded trace and nothing else of it: the probabilities may be large."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return np.asarray(file["counts"]).tolist()
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path}: not a trace of wdmoe-bs trace ({error})") from error


def balanced(counts: Counts, speeds: Sequence[float], most_held: int | Sequence[int] | None) -> Placement:
    """Give every expert one device.

    Args:
        counts: of choices.
        speeds: of the devices, in any unit.
        most_held: experts of all blocks together that fit on one device, the same on all or device by device; None: any
            number.

    Raises:
        ValueError: the experts do not fit, or there are more devices than experts.
    """
    n_devices, n_experts = len(speeds), len(counts[0])
    if n_devices > n_experts * len(counts):
        raise ValueError(f"{n_devices} devices for {n_experts * len(counts)} experts: some would hold none")
    if isinstance(most_held, Sequence):
        left = list(most_held)
    else:
        left = [most_held if most_held is not None else len(counts) * n_experts] * n_devices
    if sum(left) < len(counts) * n_experts:
        raise ValueError(f"{n_devices} devices hold {sum(left)} experts, the model has {len(counts) * n_experts}")
    rows: list[tuple[tuple[int, ...], ...]] = []
    for number, row in enumerate(counts):
        # What later blocks need is kept free: no device takes more of this block than its even share of what is left.
        blocks_left = len(counts) - number
        room = [-(-here // blocks_left) for here in left]
        where = _place_block(row, speeds, room, left)
        for device in where:
            left[device] -= 1
        rows.append(tuple((device,) for device in where))
    idle = set(range(n_devices)) - {devices[0] for row in rows for devices in row}
    if idle:
        raise ValueError(f"device {min(idle)} is so slow that it would hold no expert; leave it out")
    return tuple(rows)


def add_replicas(
    placement: Placement,
    counts: Counts,
    speeds: Sequence[float],
    n_most_used: int,
    most_held: int | Sequence[int] | None,
    keep_level: bool = False,
) -> Placement:
    """Give the most used experts of each block a second device, where memory allows.

    The base station asks the first by name of the healthy devices that hold an expert. A replica on a device after the
    first carries no load until the other fails: among those with room it goes to the one with the fewest experts, then
    the fastest. Where there is none, it takes the expert's load over, and goes where the slowest device of the block is
    fastest afterwards; with `keep_level` nowhere, if that is slower than before.
    """
    held = [0] * len(speeds)
    for row in placement:
        for devices in row:
            for device in devices:
                held[device] += 1
    limits = most_held if isinstance(most_held, Sequence) else [most_held] * len(speeds)
    rows = [list(row) for row in placement]
    for places, used in zip(rows, counts, strict=True):
        loads = [0.0] * len(speeds)
        for devices, count in zip(places, used, strict=True):
            loads[first_asked(devices)] += count

        for expert in sorted(range(len(places)), key=lambda e: (-used[e], e))[:n_most_used]:
            asked, count = first_asked(places[expert]), used[expert]
            room = [
                device
                for device, limit in enumerate(limits)
                if device not in places[expert] and (limit is None or held[device] < limit)
            ]
            behind = [device for device in room if name_order(device) > name_order(asked)]
            if behind:
                chosen = min(behind, key=lambda device: (held[device], -speeds[device], device))
            elif room:
                slowest = {device: _slowest(_moved(loads, count, asked, device), speeds) for device in room}
                chosen = min(room, key=lambda device: (slowest[device], held[device], device))
                if keep_level and slowest[chosen] > _slowest(loads, speeds) * (1 + 1e-9):
                    continue
                loads = _moved(loads, count, asked, chosen)
            else:
                continue
            held[chosen] += 1
            places[expert] = tuple(sorted((*places[expert], chosen)))
    return tuple(map(tuple, rows))


def replicas_left_out(placement: Placement, n_most_used: int) -> int:
    """Return how many of the experts that were to have a second device have none: it has no room, or would be slower."""
    return sum(max(0, min(n_most_used, len(row)) - sum(len(devices) > 1 for devices in row)) for row in placement)


def name_order(device: int) -> str:
    """Return the name that a device takes from its folder, by which the base station orders them."""
    return f"device-{device}"


def first_asked(devices: Sequence[int]) -> int:
    """Return the one of an expert's devices that the base station asks while all are healthy."""
    return min(devices, key=name_order)


def expected_times(placement: Placement, counts: Counts, speeds: Sequence[float]) -> list[list[float]]:
    """Return [block][device] -> share of the block's choices over the device's share of all speed; level means 1."""
    total_speed = sum(speeds)
    times: list[list[float]] = []
    for row, used in zip(placement, counts, strict=True):
        loads = [0.0] * len(speeds)
        for devices, count in zip(row, used, strict=True):
            loads[first_asked(devices)] += count / sum(used)
        times.append([load * total_speed / speed for load, speed in zip(loads, speeds, strict=True)])
    return times


def _slowest(loads: Sequence[float], speeds: Sequence[float]) -> float:
    return max(load / speed for load, speed in zip(loads, speeds, strict=True))


def _moved(loads: Sequence[float], count: float, source: int, target: int) -> list[float]:
    after = list(loads)
    after[source] -= count
    after[target] += count
    return after


def _place_block(counts: Sequence[float], speeds: Sequence[float], room: list[int], left: list[int]) -> list[int]:
    """Return the device of each expert of one block; of equals, the one with more left takes it.

    Args:
        counts: of the experts.
        speeds: of the devices.
        room: experts of this block that a device may take.
        left: experts of this and later blocks that it may take.
    """
    devices = range(len(speeds))
    loads, room = [0.0] * len(speeds), list(room)
    where = [-1] * len(counts)
    for expert in sorted(range(len(counts)), key=lambda e: (-counts[e], e)):
        free = [d for d in devices if room[d] > 0]
        best = min(free, key=lambda d: ((loads[d] + counts[expert]) / speeds[d], -left[d], d))
        where[expert] = best
        loads[best] += counts[expert]
        room[best] -= 1
    while _improve(where, counts, speeds, loads, room):
        pass
    return where


def _improve(
    where: list[int], counts: Sequence[float], speeds: Sequence[float], loads: list[float], room: list[int]
) -> bool:
    """Take load off the slowest device by one move or one swap; False if none makes the pair of devices faster."""
    slowest = max(range(len(speeds)), key=lambda d: (loads[d] / speeds[d], -d))
    worst = loads[slowest] / speeds[slowest]
    best: tuple[float, int, int | None, int] | None = None
    for mine in (e for e, device in enumerate(where) if device == slowest):
        for other in (d for d in range(len(speeds)) if d != slowest):
            theirs: list[int | None] = [e for e, device in enumerate(where) if device == other]
            if room[other] > 0:
                theirs.append(None)
            for back in theirs:
                moved = counts[mine] - (counts[back] if back is not None else 0.0)
                after = max((loads[slowest] - moved) / speeds[slowest], (loads[other] + moved) / speeds[other])
                if after < worst * (1 - 1e-9) and (best is None or after < best[0]):
                    best = after, mine, back, other
    if best is None:
        return False
    _, mine, back, other = best
    moved = counts[mine] - (counts[back] if back is not None else 0.0)
    where[mine] = other
    if back is not None:
        where[back] = slowest
    else:
        room[other] -= 1
        room[slowest] += 1
    loads[slowest] -= moved
    loads[other] += moved
    return True
