"""One microbatch on its way, and what the worker hands back to the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from wdmoe.bs.dispatch import Shipment
from wdmoe.bs.microbatch import Microbatch, Result
from wdmoe.bs.records import BlockRecord, Record
from wdmoe.bs.requests import Want
from wdmoe.bs.routing import Floats
from wdmoe.bs.stages import OnStation
from wdmoe.runtime.messages import ExpertRequest, Rows


@dataclass(frozen=True, slots=True)
class Dispatched:
    """What a step of the worker leaves: requests to send, and what the next stage needs."""

    residual: OnStation
    hidden: OnStation
    shipments: list[Shipment]
    asked: Floats  # [n, k], the gate weights asked for
    record: BlockRecord


@dataclass(slots=True, eq=False)
class Flight:
    """One microbatch on its way."""

    number: int  # of the microbatch, in the order they came
    microbatch: Microbatch
    prepared: OnStation  # what every stage takes
    started_s: float
    record: Record
    block: int = 0
    residual: OnStation = None
    wants: list[Want] = field(default_factory=list)  # of this block, by device
    waiting: int = 0  # wants that are not done
    asked: Floats | None = None
    shared: OnStation = None
    shared_pending: bool = False
    result: Result | None = None
    stage_done_s: float = 0.0
    step_ms: float = float("inf")  # what the last step took; of the first, nothing is known
    shared_ms: float = float("inf")  # and the last shared expert


@dataclass(frozen=True, slots=True)
class Held:
    """An answer of the base station's own experts, and who waits for it."""

    sums: Rows
    take: Callable[[Rows], None]
    request: ExpertRequest
    record: BlockRecord  # of the block that it is for
    predicted_ms: float | None  # None: something had to be loaded


@dataclass(frozen=True, slots=True)
class Shared:
    """The output of a block's shared expert."""

    rows: OnStation


Outcome = tuple[Flight | None, "Dispatched | Result | Shared | Held"]
