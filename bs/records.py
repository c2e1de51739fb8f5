"""What is written down while microbatches run, and its summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class BlockRecord:
    """One microbatch in one block."""

    pairs: int  # (token, device) pairs of the model's own top-k
    droppable: int  # of these, all but one a token
    sent: int  # pairs that were sent
    gate_mass: float
    gate_mass_dropped: float
    theta: float | None
    stopped: str | None
    waiting_ms: float = 0.0  # attention waiting: the base station has nothing left to do for this microbatch
    # Of the request that took longest, whose parts add up to what the block waited for.
    device_ms: float = 0.0  # computing, as its device reported
    air_ms: float = 0.0  # the rest between sending and answer, in which it was neither computed nor in a queue
    queue_ms: float = 0.0  # behind others, as its device reported
    bytes_down: int = 0
    bytes_up: int = 0
    skipped: int = 0  # pairs that were sent to a device that was lost, and left out
    bs_rows: int = 0  # pairs that the base station ran itself, without a link
    bs_experts_ms: float = 0.0  # what it took for them

    def on_answer(self, compute_ms: float, queue_ms: float, air_ms: float) -> None:
        """Take the parts of a request that was answered, if none of the block took longer."""
        if compute_ms + queue_ms + air_ms > self.device_ms + self.queue_ms + self.air_ms:
            self.device_ms, self.queue_ms, self.air_ms = compute_ms, queue_ms, air_ms


@dataclass(slots=True)
class DeviceUse:
    """What one device did for one microbatch, in all blocks."""

    requests: int = 0  # pieces of one count each
    rows: int = 0
    compute_ms: float = 0.0  # as it reported
    queue_ms: float = 0.0  # behind other requests, as it reported
    air_ms: float = 0.0  # the rest between sending and answer

    def add(self, rows: int, compute_ms: float, queue_ms: float, air_ms: float, messages: int = 1) -> None:
        """Take a request that was answered, in so many messages."""
        self.requests += messages
        self.rows += rows
        self.compute_ms += compute_ms
        self.queue_ms += queue_ms
        self.air_ms += air_ms


@dataclass(slots=True)
class Record:
    """One microbatch from start to result."""

    name: str
    tokens: int
    questions: int = 1  # in the microbatch; each of them took as long as it
    in_flight: int = 1  # microbatches on their way when it set out, itself included
    latency_ms: float = 0.0
    bs_ms: float = 0.0  # stages, routing, selecting, packing, combining; without the shared experts
    shared_ms: float = 0.0  # the shared experts
    wire_error: float | None = None  # what int8 lost of the rows of one block, relative
    blocks: list[BlockRecord] = field(default_factory=list)
    devices: dict[str, DeviceUse] = field(default_factory=dict)  # of those that answered


@dataclass(frozen=True, slots=True)
class DeviceSummary:
    """What one device did in a run of one policy."""

    name: str
    requests: int
    rows: int
    compute_ms: float  # mean per request, as are the next two
    queue_ms: float
    air_ms: float
    queue_first_ms: float  # mean per request of the first quarter of the microbatches
    queue_last_ms: float  # and of the last quarter


@dataclass(frozen=True, slots=True)
class Summary:
    """A run of one policy."""

    questions: int
    tokens: int
    latency_mean_ms: float
    latency_p50_ms: float
    latency_p95_ms: float
    latency_percentiles_ms: tuple[float, ...]  # 0 to 100, 101 values
    latency_share_ms: float  # mean per question: its share of its microbatch's latency, as are the parts that follow
    waiting_ms: float  # mean per question
    bs_ms: float  # mean per question
    shared_ms: float  # mean per question
    device_ms: float  # mean per question, the slowest request of each block, as are the next two
    air_ms: float
    queue_ms: float
    bytes_down: int
    bytes_up: int
    pairs: int
    droppable: int
    dropped: int
    skipped: int
    gate_mass_dropped: float  # share of all
    wire_error: float | None  # what int8 rows lost on their way down, root mean square, relative
    theta_mean: float | None  # of the final thetas, over blocks and microbatches
    theta_stops: dict[str, int]  # why it stopped, how often
    devices: tuple[DeviceSummary, ...]  # by name
    bs_rows: int = 0  # of the pairs that were not dropped, those that the base station ran itself
    bs_experts_ms: float = 0.0  # mean per question, what it took for them
    in_flight_p50: float = 1.0  # microbatches on their way when one set out, itself included

    @property
    def dropped_share(self) -> float:
        """Dropped pairs over droppable pairs."""
        return self.dropped / self.droppable if self.droppable else 0.0

    @property
    def overhead_ms(self) -> float:
        """What is left of a question's share when the base station and waiting for devices are taken off."""
        return self.latency_share_ms - self.bs_ms - self.shared_ms - self.bs_experts_ms - self.waiting_ms

    @property
    def bs_share(self) -> float:
        """Of the pairs that were not dropped, the share that the base station ran itself."""
        asked = self.pairs - self.dropped
        return self.bs_rows / asked if asked else 0.0


def summarise(records: Sequence[Record]) -> Summary:
    """Sum up the records of one policy's run."""
    if not records:
        raise ValueError("nothing was recorded")
    blocks = [block for record in records for block in record.blocks]
    questions = sum(record.questions for record in records)
    latencies = np.repeat([record.latency_ms for record in records], [record.questions for record in records])
    percentiles = tuple(map(float, np.percentile(latencies, range(101))))
    thetas = [block.theta for block in blocks if block.theta is not None]
    errors = [record.wire_error for record in records if record.wire_error is not None]
    stops: dict[str, int] = {}
    for block in blocks:
        if block.stopped is not None:
            stops[block.stopped] = stops.get(block.stopped, 0) + 1
    mass = sum(block.gate_mass for block in blocks)
    return Summary(
        questions=questions,
        tokens=sum(record.tokens for record in records),
        latency_mean_ms=float(latencies.mean()),
        latency_p50_ms=percentiles[50],
        latency_p95_ms=percentiles[95],
        latency_percentiles_ms=percentiles,
        latency_share_ms=sum(record.latency_ms for record in records) / questions,
        waiting_ms=sum(block.waiting_ms for block in blocks) / questions,
        bs_ms=sum(record.bs_ms for record in records) / questions,
        shared_ms=sum(record.shared_ms for record in records) / questions,
        device_ms=sum(block.device_ms for block in blocks) / questions,
        air_ms=sum(block.air_ms for block in blocks) / questions,
        queue_ms=sum(block.queue_ms for block in blocks) / questions,
        bytes_down=sum(block.bytes_down for block in blocks),
        bytes_up=sum(block.bytes_up for block in blocks),
        pairs=sum(block.pairs for block in blocks),
        droppable=sum(block.droppable for block in blocks),
        dropped=sum(block.pairs - block.sent for block in blocks),
        skipped=sum(block.skipped for block in blocks),
        gate_mass_dropped=sum(block.gate_mass_dropped for block in blocks) / mass if mass else 0.0,
        wire_error=float(np.sqrt(np.mean(np.square(errors)))) if errors else None,
        theta_mean=float(np.mean(thetas)) if thetas else None,
        theta_stops=stops,
        devices=tuple(_summarise_device(name, records) for name in sorted({n for r in records for n in r.devices})),
        bs_rows=sum(block.bs_rows for block in blocks),
        bs_experts_ms=sum(block.bs_experts_ms for block in blocks) / questions,
        in_flight_p50=float(np.median([record.in_flight for record in records])),
    )


def _summarise_device(name: str, records: Sequence[Record]) -> DeviceSummary:
    quarter = max(1, len(records) // 4)
    everything, first, last = (
        [record.devices[name] for record in part if name in record.devices]
        for part in (records, records[:quarter], records[-quarter:])
    )
    requests = sum(use.requests for use in everything)
    return DeviceSummary(
        name,
        requests,
        sum(use.rows for use in everything),
        sum(use.compute_ms for use in everything) / requests,
        sum(use.queue_ms for use in everything) / requests,
        sum(use.air_ms for use in everything) / requests,
        *(sum(use.queue_ms for use in part) / max(1, sum(use.requests for use in part)) for part in (first, last)),
    )
