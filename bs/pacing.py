"""How many microbatches at a time keep the busiest of stages, links and devices at work. Plain values.

One microbatch alone takes the sum over blocks of its stage and of the last reply; meanwhile the busiest resource works only
for its own part of that. So many microbatches as the one goes into the other let it never be idle, and each more waits
in a queue, which adds to latency and nothing to throughput.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from wdmoe.bs.airtime import Medium, few_finish_ms

MOST = 16  # whatever a model says
STAGES_BUSY = "stages"
_WORTH = 1.1  # of throughput that a second one can gain, from which it is worth that both take longer
_SLACK = (
    1 / 3
)  # beyond what is needed, one at most: blocks differ, replies jitter, and the busiest would wait for the next
_KEPT = 1 - 1 / 128  # of what is known, at each block: follows a change within some microbatches


@dataclass(frozen=True, slots=True)
class Request:
    """What one device is asked for in one block, in ms."""

    device: str
    air_ms: float  # both ways
    compute_ms: float
    round_trip_ms: float  # of a message that weighs nothing


@dataclass(frozen=True, slots=True)
class Cost:
    """What one block, or the head, costs one microbatch."""

    alone_ms: float  # from the first step to the last reply, with nobody else in the system
    busy_ms: Mapping[str, float]  # how long each resource works for it


def cost_of_block(stage_ms: float, requests: Sequence[Request], medium: Medium = "own", stage_workers: int = 1) -> Cost:
    """Say what a block costs.

    Args:
        stage_ms: what the base station computes for it.
        requests: of the devices that are asked; none for the head.
        medium: what the links are; a band or channel that all share is one resource.
        stage_workers: stages that are computed at a time.
    """
    halves = [(r.air_ms / 2, r.round_trip_ms / 2, r.compute_ms, r.air_ms / 2) for r in requests]
    finish_ms, _ = few_finish_ms(halves, medium)  # whole: pieces are sent only while one microbatch is in flight
    busy_ms = {STAGES_BUSY: stage_ms / stage_workers} | {r.device: r.compute_ms for r in requests}
    if medium == "own":
        busy_ms |= {f"air to {r.device}": r.air_ms for r in requests}
    else:
        busy_ms["air"] = sum(r.air_ms for r in requests)
    return Cost(stage_ms + max(finish_ms, default=0.0), busy_ms)


def enough_in_flight(alone_ms: float, busiest_ms: float) -> int:
    """Return how many microbatches let the busiest resource never be idle, with one to spare where they just suffice.

    One alone leaves the busiest idle for 1 - busiest / alone of the time: where that is little, one it stays.

    Args:
        alone_ms: one microbatch with nobody else in the system.
        busiest_ms: what it takes of the resource that works for it longest.
    """
    if busiest_ms <= 0 or alone_ms < _WORTH * busiest_ms:
        return 1
    needed = alone_ms / busiest_ms
    return min(MOST, math.ceil(needed + min(1.0, _SLACK * needed) - 1e-9))


@dataclass(slots=True)
class Pacing:
    """Follows what blocks cost while a run goes on."""

    _alone_ms: float = 0.0
    _busy_ms: dict[str, float] = field(default_factory=dict)

    def note(self, cost: Cost) -> None:
        """Take the cost of one more block."""
        self._alone_ms = self._alone_ms * _KEPT + cost.alone_ms
        self._busy_ms = {name: ms * _KEPT for name, ms in self._busy_ms.items()}
        for name, ms in cost.busy_ms.items():
            self._busy_ms[name] = self._busy_ms.get(name, 0.0) + ms

    @property
    def in_flight(self) -> int:
        """How many microbatches there should be; one while nothing is known."""
        return enough_in_flight(self._alone_ms, max(self._busy_ms.values(), default=0.0))
