"""From a plan to one request per device, and from their replies to one row per token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.bs.routing import Floats, Ints, Plan, Routing
from wdmoe.runtime.messages import ExpertRequest, Message, Wire, pack_rows


@dataclass(frozen=True, slots=True)
class Shipment:
    """What one device is asked for in one block."""

    device: int  # index of the device
    rows: Ints  # [n] rows of the microbatch, ascending; row i of the request is row rows[i] of the microbatch
    counts: tuple[int, ...]  # rows of each expert called
    message: Message  # the request; its id is set by the one who sends it


def split_by_device(
    block: int, routing: Routing, plan: Plan, owner: Ints, hidden: Floats, wire: Wire
) -> list[Shipment]:
    """Make one request for each device that is needed; a token's row goes once to each.

    Args:
        block: which block.
        routing: the model's choice.
        plan: what of it is asked for, with which weights.
        owner: [n_experts], device of each expert.
        hidden: [tokens, d_model], what the experts see.
        wire: precision of the rows on the wire.
    """
    token, slot = np.nonzero(plan.keep)
    expert = routing.experts[token, slot]
    weight = plan.weights[token, slot]
    device = owner[expert]
    shipments: list[Shipment] = []
    for k in np.unique(device):
        mine = np.flatnonzero(device == k)
        mine = mine[np.argsort(expert[mine], kind="stable")]  # by expert, tokens ascending within
        rows, index = np.unique(token[mine], return_inverse=True)
        experts, counts = np.unique(expert[mine], return_counts=True)
        packed, wire_used = pack_rows(hidden[rows], wire)
        request = ExpertRequest(
            request_id=0,
            block=block,
            rows=len(rows),
            wire=wire_used,
            experts=tuple(experts.tolist()),
            counts=tuple(counts.tolist()),
            index=index.astype("<u4").tobytes(),
            weights=weight[mine].astype("<f4").tobytes(),
        )
        shipments.append(Shipment(int(k), rows, request.counts, Message(request, packed)))
    return shipments


def combine(
    n_rows: int, d_model: int, partials: Iterable[tuple[Ints, npt.NDArray[np.float32]]], shared: Floats | None
) -> Floats:
    """Sum the devices' weighted rows in float32, in the order given: the same order gives the same bits.

    Args:
        n_rows: tokens of the microbatch.
        d_model: width of a row.
        partials: for each device, which rows it speaks of and its weighted sums.
        shared: output of the shared expert, [n_rows, d_model].
    """
    total = np.zeros((n_rows, d_model), np.float32)
    for rows, values in partials:
        total[rows] += values
    if shared is not None:
        total += shared
    return total
