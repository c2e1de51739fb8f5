"""From a plan to one request per device, and from their replies to one row per token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

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
)

Partial = tuple[Ints, Floats]  # rows of the microbatch, and what is to be added to them


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


def split_by_device(
    block: int, routing: Routing, plan: Plan, owner: Ints, names: Sequence[str], hidden: Floats, wire: Wire
) -> list[Shipment]:
    """Make one request for each device that is needed; a token's row goes once to each.

    Args:
        block: which block.
        routing: the model's choice.
        plan: what of it is asked for, with which weights.
        owner: [n_experts], index into `names` of each expert's device.
        names: of the devices.
        hidden: [tokens, d_model], what the experts see.
        wire: precision of the rows on the wire.
    """
    tokens = np.arange(len(hidden))[:, None]
    asked = routing.experts if plan.experts is None else plan.experts
    wanted = np.zeros((len(hidden), len(owner)), np.bool_)
    wanted[tokens, asked] = plan.keep
    weights = np.zeros(wanted.shape, np.float32)
    weights[tokens, asked] = plan.weights
    device = np.broadcast_to(owner, wanted.shape)  # of each expert, for each token
    if plan.devices is not None:
        device = device.copy()
        device[tokens, asked] = plan.devices
    shipments: list[Shipment] = []
    for k, name in enumerate(names):
        of_device = wanted & (device == k)
        counts = of_device.sum(axis=0)
        experts = np.flatnonzero(counts)
        if len(experts) == 0:
            continue
        mine = of_device[:, experts]
        rows = np.flatnonzero(mine.any(axis=1))
        by_expert = mine[rows].T
        packed, wire_used = pack_rows(hidden[rows], wire)
        request = ExpertRequest(
            request_id=0,
            block=block,
            rows=len(rows),
            wire=wire_used,
            experts=tuple(experts.tolist()),
            counts=tuple(counts[experts].tolist()),
            index=np.nonzero(by_expert)[1].astype("<u4").tobytes(),
            weights=weights[rows][:, experts].T[by_expert].astype("<f4").tobytes(),
        )
        shipments.append(Shipment(name, rows, request, packed))
    return shipments


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
        total[rows] += values
    if lost_share is not None:
        came: Bools = lost_share < 1 - 1e-6
        total[came] /= (1 - lost_share[came, None]).astype(np.float32)
        total[~came] = 0
    if shared is not None:
        total += shared
    return total
