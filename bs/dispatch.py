"""From a plan to one request per device, and from their replies to one row per token."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from wdmoe.bs.routing import Bools, Floats, Ints, Plan, Routing
from wdmoe.runtime.messages import (
    ExpertRequest,
    Message,
    Wire,
    pack_rows,
    request_index,
    request_weights,
    unpack_rows,
)

Partial = tuple[Ints, Floats]  # rows of the microbatch, and what is to be added to them
_ROWS_OF_A_PIECE = 4  # on average, from which adding row by row is faster
_ONLY_ROW = np.zeros(1, np.int64)


@dataclass(frozen=True, slots=True)
class Shipment:
    """What one device is asked for in one block."""

    device: str
    rows: Ints  # [n] rows of the microbatch, ascending; row i of the request is row rows[i] of the microbatch
    request: ExpertRequest  # its id is set when it is sent
    packed: npt.NDArray[np.generic]  # [n, d_model] as they travel

    def message(self) -> Message:
        """Return the message to send."""
        return Message(self.request, self.packed)


class Packed(Protocol):
    """The rows of a microbatch as they travel."""

    @property
    def wire(self) -> Wire:
        """Their precision."""
        ...

    def of(self, device: int, rows: Ints) -> npt.NDArray[Any]:
        """Return rows of the microbatch, ascending, for a device: [len(rows), d_model]."""
        ...


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows that were packed once, though most go to several devices."""

    rows: npt.NDArray[Any]  # [tokens, d_model]
    wire: Wire

    def of(self, device: int, rows: Ints) -> npt.NDArray[Any]:
        """Return rows of the microbatch; all of them without a copy."""
        return self.rows if len(rows) == len(self.rows) else self.rows[rows]


def split_by_device(
    block: int, routing: Routing, plan: Plan, owner: Ints, names: Sequence[str], hidden: Floats, wire: Wire
) -> list[Shipment]:
    """Make one request for each device that is needed, from rows [tokens, d_model]; see `shipments_of`."""
    return shipments_of(block, routing, plan, owner, names, PackedRows(*pack_rows(hidden, wire)))


def shipments_of(
    block: int, routing: Routing, plan: Plan, owner: Ints, names: Sequence[str], packed: Packed
) -> list[Shipment]:
    """Make one request for each device that is needed; a token's row goes once to each.

    Args:
        block: which block.
        routing: the model's choice.
        plan: what of it is asked for, with which weights.
        owner: [n_experts], index into `names` of each expert's device.
        names: of the devices.
        packed: what the experts see.
    """
    if len(plan.keep) == 1:
        return _shipments_of_row(block, routing, plan, owner, names, packed)
    token, slot = np.nonzero(plan.keep)
    expert = (routing.experts if plan.experts is None else plan.experts)[token, slot]
    weight = plan.weights[token, slot]
    device = owner[expert] if plan.devices is None else plan.devices[token, slot]
    call = device * len(owner) + expert
    order = np.argsort(call, kind="stable")  # entries by device, then expert, then token
    token, device = token[order], device[order]
    used = np.zeros((len(names), len(plan.keep)), np.bool_)
    used[device, token] = True
    index = (np.cumsum(used, axis=1)[device, token] - 1).astype("<u4").tobytes()
    weights = weight[order].astype("<f4").tobytes()
    shipments: list[Shipment] = []
    at = 0
    for k, asked in enumerate(_calls_by_device(call, len(owner), len(names))):
        if not asked:
            continue
        start, at = at, at + 4 * sum(count for _, count in asked)
        rows = np.flatnonzero(used[k])
        request = ExpertRequest(
            request_id=0,
            block=block,
            rows=len(rows),
            wire=packed.wire,
            experts=tuple(number for number, _ in asked),
            counts=tuple(count for _, count in asked),
            index=index[start:at],
            weights=weights[start:at],
        )
        shipments.append(Shipment(names[k], rows, request, packed.of(k, rows)))
    return shipments


def _shipments_of_row(
    block: int, routing: Routing, plan: Plan, owner: Ints, names: Sequence[str], packed: Packed
) -> list[Shipment]:
    """Do the same for one token, in plain numbers, which for so few are faster."""
    experts = (routing.experts if plan.experts is None else plan.experts)[0]
    devices = owner[experts] if plan.devices is None else plan.devices[0]
    slots = zip(devices.tolist(), experts.tolist(), plan.weights[0].tolist(), plan.keep[0].tolist(), strict=True)
    calls = sorted((device, expert, weight) for device, expert, weight, keep in slots if keep)
    shipments: list[Shipment] = []
    for device, asked in groupby(calls, itemgetter(0)):
        _, numbers, weights = zip(*asked, strict=True)
        n = len(numbers)
        request = ExpertRequest(
            request_id=0,
            block=block,
            rows=1,
            wire=packed.wire,
            experts=numbers,
            counts=(1,) * n,
            index=bytes(4 * n),
            weights=struct.pack(f"<{n}f", *weights),
        )
        shipments.append(Shipment(names[device], _ONLY_ROW, request, packed.of(device, _ONLY_ROW)))
    return shipments


def relative_error(hidden: Floats, wire: Wire) -> float:
    """Return what the wire loses of rows: root mean square of the error over that of the rows."""
    packed, _ = pack_rows(hidden, wire)
    lost = unpack_rows(packed) - hidden
    return float(np.sqrt(np.square(lost).mean() / max(float(np.square(hidden).mean()), 1e-30)))


def _calls_by_device(call: Ints, n_experts: int, n_devices: int) -> list[list[tuple[int, int]]]:
    """Return what each device is asked for: experts, ascending, with the number of rows.

    Args:
        call: of each entry, device x n_experts + expert.
        n_experts: of a block.
        n_devices: number of devices.
    """
    counts = np.bincount(call)
    asked: list[list[tuple[int, int]]] = [[] for _ in range(n_devices)]
    made = np.flatnonzero(counts)
    for device, expert, count in zip(
        *(part.tolist() for part in (*divmod(made, n_experts), counts[made])), strict=True
    ):
        asked[device].append((expert, count))
    return asked


def regroup(shipment: Shipment, takes_over: Mapping[int, str]) -> list[Shipment]:
    """Split a request among other devices.

    Args:
        shipment: what was asked for.
        takes_over: expert -> the device that is asked instead; experts that are not in it are left out.
    """
    expert, index, weight = entries(shipment.request)
    parts: list[Shipment] = []
    for device in sorted(set(takes_over.values())):
        mine = np.isin(expert, [e for e, name in takes_over.items() if name == device])
        if not mine.any():
            continue
        local, position = np.unique(index[mine], return_inverse=True)
        request = _request(
            shipment.request.block, len(local), shipment.request.wire, expert[mine], position, weight[mine]
        )
        parts.append(Shipment(device, shipment.rows[local], request, shipment.packed[local]))
    return parts


def in_pieces(shipment: Shipment, pieces: int) -> list[Shipment]:
    """Cut a request into some of about as many rows each; in one piece it is itself."""
    if pieces == 1:
        return [shipment]
    expert, index, weight = entries(shipment.request)
    bounds = [len(shipment.rows) * n // pieces for n in range(pieces + 1)]
    parts: list[Shipment] = []
    for start, end in pairwise(bounds):
        mine = (index >= start) & (index < end)
        request = _request(
            shipment.request.block, end - start, shipment.request.wire, expert[mine], index[mine] - start, weight[mine]
        )
        parts.append(Shipment(shipment.device, shipment.rows[start:end], request, shipment.packed[start:end]))
    return parts


def entries(request: ExpertRequest) -> tuple[Ints, Ints, Floats]:
    """Return expert, row of the request and weight of each entry of a request, each [sum(counts)]."""
    expert = np.repeat(np.array(request.experts, np.int64), request.counts)
    return expert, request_index(request).astype(np.int64), request_weights(request)


def _request(block: int, n_rows: int, wire: Wire, expert: Ints, index: Ints, weight: Floats) -> ExpertRequest:
    """Build a request from entries whose index ascends; sorts them by expert."""
    order = np.argsort(expert, kind="stable")  # stable: within an expert, rows stay ascending
    experts, counts = np.unique(expert, return_counts=True)
    return ExpertRequest(
        request_id=0,
        block=block,
        rows=n_rows,
        wire=wire,
        experts=tuple(experts.tolist()),
        counts=tuple(counts.tolist()),
        index=index[order].astype("<u4").tobytes(),
        weights=weight[order].astype("<f4").tobytes(),
    )


def _add_rows(total: Floats, rows: Ints, values: Floats) -> None:
    """Add values to rows, ascending: piece by piece where few are missing, as gathering them would copy all of them."""
    ends = np.flatnonzero(np.diff(rows) > 1) + 1
    if len(ends) * _ROWS_OF_A_PIECE > len(rows):
        total[rows] += values
        return
    at = 0
    for end in (*ends.tolist(), len(rows)):
        first = int(rows[at])
        total[first : first + end - at] += values[at:end]
        at = end


def combine(
    n_rows: int, d_model: int, partials: Iterable[Partial], lost_share: Floats | None, shared: Floats | None
) -> Floats:
    """Sum the devices' weighted rows in float32, in the order given: the same order gives the same bits.

    Args:
        n_rows: tokens of the microbatch.
        d_model: width of a row.
        partials: for each device, which rows it speaks of and its weighted sums.
        lost_share: [n_rows], share of each token's gate weight that was skipped; what came is scaled up by it. A token
            that lost everything gets nothing from its experts. None: nothing was skipped.
        shared: output of the shared expert, [n_rows, d_model].
    """
    total = np.zeros((n_rows, d_model), np.float32)
    for rows, values in partials:
        if len(rows) == n_rows:  # they ascend: all of them, in their order
            total += values
        else:
            _add_rows(total, rows, values)
    if lost_share is not None:
        came: Bools = lost_share < 1 - 1e-6
        total[came] /= (1 - lost_share[came, None]).astype(np.float32)
        total[~came] = 0
    if shared is not None:
        total += shared
    return total
