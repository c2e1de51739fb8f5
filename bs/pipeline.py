"""The main path: microbatches through stages and devices, several in flight, in one loop.

    stage (worker) -> Routing -> select -> Plan -> one ExpertRequest per device -> replies -> combine -> next stage

The loop sends, receives and watches deadlines; everything that computes runs on the worker. While one microbatch
waits for the air, another runs its stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import msgspec
import numpy as np

from wdmoe.bs.dispatch import Shipment, combine, split_by_device
from wdmoe.bs.hub import Complained, Event, Hub, Joined, Left, Replied
from wdmoe.bs.latency import DeviceLatency, row_ms
from wdmoe.bs.microbatch import Microbatch, Result
from wdmoe.bs.policies import Policy, select
from wdmoe.bs.records import BlockRecord, Record
from wdmoe.bs.routing import Floats, Ints, pairs_used, route
from wdmoe.bs.stages import Stages, rope_angles
from wdmoe.runtime.errors import DeviceFailed, DeviceTimeout
from wdmoe.runtime.manifest import BsManifest
from wdmoe.runtime.messages import ExpertReply, Message, Wire, unpack_rows
from wdmoe.runtime.worker import Worker

# A device is lost when it is both late and silent; one that answers pings may be late for longer.
LATE_AT_LEAST_S = 2.0
LATE_TIMES_P95 = 20.0
SILENT_S = 2.0
LATE_THOUGH_ALIVE = 10.0  # times what was allowed
CHECK_AGAIN_S = 0.25


@dataclass(frozen=True, slots=True)
class Dispatched:
    """What a step of the worker leaves: requests to send, and what the next stage needs."""

    residual: Floats
    hidden: Floats
    shipments: list[Shipment]
    record: BlockRecord


@dataclass(slots=True, eq=False)
class Flight:
    """One microbatch on its way."""

    number: int  # of the microbatch, in the order they came
    microbatch: Microbatch
    angles: tuple[Floats, Floats]
    started_s: float
    record: Record
    block: int = 0
    residual: Floats | None = None
    waiting: int = 0  # requests that are out
    partials: dict[int, tuple[Ints, Floats]] = field(default_factory=dict)  # by device index
    shared: Floats | None = None
    shared_pending: bool = False
    result: Result | None = None
    stage_done_s: float = 0.0


@dataclass(slots=True, eq=False)
class Pending:
    """A request that is out."""

    flight: Flight
    shipment: Shipment
    message: Message
    sent_s: float
    predicted_ms: float
    allowed_s: float  # from sending to the answer, before the device is suspected
    check_s: float  # when to look next


Outcome = tuple[Flight, "Dispatched | Result | Floats"]


class Pipeline:
    """Runs microbatches through the base station's stages and the connected devices."""

    def __init__(
        self,
        hub: Hub,
        stages: Stages,
        manifest: BsManifest,
        make_worker: Callable[[Callable[[], None]], Worker[Outcome]],
        wire: Wire = "fp16",
    ) -> None:
        self._hub = hub
        self._stages = stages
        self._model = manifest.model
        self._wire: Wire = wire
        self._worker = make_worker(hub.wake)
        self._names, owner = hub.owners()
        self._owner = np.array(owner, np.int64)  # [block, expert] -> device index
        self._pending: dict[int, Pending] = {}
        self._flights: list[Flight] = []
        self._landed: list[Flight] = []
        self._next_id = 0
        self.late_replies = 0

    def run(
        self, microbatches: Iterable[Microbatch], policy: Policy, in_flight: int = 1
    ) -> Iterator[tuple[int, Result, Record]]:
        """Run microbatches, at most `in_flight` at a time; yield number, result and record of each as it is done.

        Raises:
            DeviceTimeout, DeviceFailed, DevicesMissing: a device that is needed is lost; the others are left usable.
        """
        source = enumerate(microbatches)
        exhausted = False
        try:
            while True:
                while not exhausted and len(self._flights) < in_flight:
                    if (numbered := next(source, None)) is None:
                        exhausted = True
                    else:
                        self._depart(*numbered, policy)
                if not self._flights:
                    return
                self._turn(policy)
                landed, self._landed = self._landed, []
                for flight in landed:
                    assert flight.result is not None
                    yield flight.number, flight.result, flight.record
        finally:
            self._pending.clear()  # what still comes for an abandoned run is late, and counted
            self._flights.clear()
            self._landed.clear()

    def close(self) -> None:
        """Stop the worker."""
        self._worker.close()

    # -- the loop ------------------------------------------------------------------------------------------------

    def _turn(self, policy: Policy) -> None:
        now_s = self._hub.clock.now_s()
        next_check_s = min((p.check_s for p in self._pending.values()), default=now_s + 1.0)
        for event in self._hub.turn(max(0.0, min(1.0, next_check_s - now_s))):
            self._on_event(event, policy)
        for done in self._worker.finished():
            if done.error is not None:
                raise done.error
            assert done.result is not None
            flight, outcome = done.result
            if flight in self._flights:
                self._on_computed(flight, outcome, policy)
        self._check_deadlines()

    def _depart(self, number: int, microbatch: Microbatch, policy: Policy) -> None:
        now_s = self._hub.clock.now_s()
        angles = rope_angles(self._model.rope, microbatch.positions)
        flight = Flight(number, microbatch, angles, now_s, Record(microbatch.name, len(microbatch.token_ids)))
        self._flights.append(flight)
        self._submit_step(flight, None, policy)

    def _on_computed(self, flight: Flight, outcome: Dispatched | Result | Floats, policy: Policy) -> None:
        now_s = self._hub.clock.now_s()
        if isinstance(outcome, Result):
            flight.result = outcome
            flight.record.latency_ms = (now_s - flight.started_s) * 1e3
            self._flights.remove(flight)
            self._landed.append(flight)
        elif isinstance(outcome, Dispatched):
            flight.residual = outcome.residual
            flight.record.blocks.append(outcome.record)
            flight.stage_done_s = now_s
            for shipment in outcome.shipments:
                self._send(flight, shipment, now_s)
            if self._model.shared_expert:
                # Runs while the rows are on the air.
                flight.shared_pending = True
                block, hidden = flight.block, outcome.hidden
                self._worker.submit(lambda: (flight, self._stages.shared(block, hidden)))
        else:
            flight.shared, flight.shared_pending = outcome, False
            flight.stage_done_s = now_s
            self._continue_if_complete(flight, policy)

    def _continue_if_complete(self, flight: Flight, policy: Policy) -> None:
        if flight.waiting or flight.shared_pending:
            return
        block = flight.record.blocks[-1]
        block.waiting_ms = (self._hub.clock.now_s() - flight.stage_done_s) * 1e3
        # Summed by device, not by arrival: the same plan gives the same bits.
        partials = [flight.partials[device] for device in sorted(flight.partials)]
        shared, rows = flight.shared, len(flight.microbatch.token_ids)
        flight.block += 1
        flight.partials, flight.shared = {}, None
        self._submit_step(flight, lambda: combine(rows, self._model.d_model, partials, shared), policy)

    # -- what runs on the worker -----------------------------------------------------------------------------------

    def _submit_step(self, flight: Flight, combined: Callable[[], Floats] | None, policy: Policy) -> None:
        block, residual = flight.block, flight.residual
        for name in self._names:
            if name not in self._hub.devices:
                raise DeviceFailed(name, f"is gone, and block {block} of {flight.microbatch.name} may need its experts")
        latencies = [self._hub.devices[name].latency.model() for name in self._names]
        self._worker.submit(lambda: (flight, self._step(flight, block, residual, combined, latencies, policy)))

    def _step(
        self,
        flight: Flight,
        block: int,
        residual: Floats | None,
        combined: Callable[[], Floats] | None,
        latencies: list[DeviceLatency],
        policy: Policy,
    ) -> Dispatched | Result:
        """Combine, run the stage, route, select, pack: all that is computed between two waits for devices."""
        started_s = self._hub.clock.now_s()
        moe_out = combined() if combined is not None else None
        microbatch = flight.microbatch
        if block == self._model.n_blocks:
            assert residual is not None and moe_out is not None
            result = self._stages.finish(microbatch, residual, moe_out)
            flight.record.bs_ms += (self._hub.clock.now_s() - started_s) * 1e3
            return result
        attended = self._stages.attend(block, microbatch, flight.angles, residual, moe_out)
        routing = route(attended.router_logits, self._model.top_k, self._model.norm_top_k)
        owner = self._owner[block]
        counts = np.bincount(routing.experts.ravel(), minlength=self._model.n_experts)
        plan = select(routing, owner, row_ms(latencies, counts, owner), policy)
        shipments = split_by_device(block, routing, plan, owner, attended.hidden, self._wire)
        wanted = pairs_used(routing.experts, np.ones_like(plan.keep), owner, len(self._names))
        record = BlockRecord(
            pairs=int(wanted.sum()),
            droppable=int(wanted.sum()) - len(wanted),
            sent=sum(len(shipment.rows) for shipment in shipments),
            gate_mass=float(routing.weights.sum()),
            gate_mass_dropped=float(routing.weights[~plan.keep].sum()),
            theta=plan.theta,
            stopped=plan.stopped,
        )
        flight.record.bs_ms += (self._hub.clock.now_s() - started_s) * 1e3
        return Dispatched(attended.residual, attended.hidden, shipments, record)

    # -- devices ---------------------------------------------------------------------------------------------------

    def _send(self, flight: Flight, shipment: Shipment, now_s: float) -> None:
        self._next_id = (self._next_id + 1) % 2**31
        message = Message(
            msgspec.structs.replace(shipment.message.header, request_id=self._next_id), shipment.message.rows
        )
        name = self._names[shipment.device]
        device = self._hub.devices.get(name)
        if device is None:
            raise DeviceFailed(name, f"left while block {flight.block} of {flight.microbatch.name} needs it")
        predicted_ms = device.latency.model().request_ms(shipment.counts)
        queued_ms = sum(p.predicted_ms for p in self._pending.values() if p.shipment.device == shipment.device)
        late_s = LATE_TIMES_P95 * device.latency.profile.tail_ratio * (predicted_ms + queued_ms) / 1e3
        allowed_s = max(LATE_AT_LEAST_S, late_s)
        self._pending[self._next_id] = Pending(
            flight, shipment, message, now_s, predicted_ms, allowed_s, now_s + allowed_s
        )
        flight.waiting += 1
        flight.record.blocks[-1].bytes_down += message_bytes(message)
        self._hub.send(name, message)

    def _on_event(self, event: Event, policy: Policy) -> None:
        match event:
            case Replied(device=name, message=message):
                self._on_reply(name, message, policy)
            case Complained(device=name, text=text, request_id=request_id):
                if request_id in self._pending:
                    raise DeviceFailed(name, f"reports: {text}")
            case Joined(device=name):
                # Back after a restart: what it was asked for is asked again.
                for pending in self._pending.values():
                    if self._names[pending.shipment.device] == name:
                        self._hub.send(name, pending.message)
            case Left(device=name, reason=reason):
                if any(self._names[p.shipment.device] == name for p in self._pending.values()):
                    raise DeviceFailed(name, f"left ({reason}) before it answered")

    def _on_reply(self, name: str, message: Message, policy: Policy) -> None:
        header = message.header
        assert isinstance(header, ExpertReply) and message.rows is not None
        pending = self._pending.get(header.request_id)
        if pending is None or self._names[pending.shipment.device] != name:
            self.late_replies += 1
            return
        flight, shipment = pending.flight, pending.shipment
        if header.rows != len(shipment.rows):
            raise DeviceFailed(name, f"answered {header.rows} rows to a request of {len(shipment.rows)}")
        rows = unpack_rows(message.rows)
        if not np.isfinite(rows).all():
            raise DeviceFailed(name, f"sent rows that are not finite for block {flight.block}")
        del self._pending[header.request_id]
        took_ms = (self._hub.clock.now_s() - pending.sent_s) * 1e3
        # What it waited behind other requests says nothing about the device.
        self._hub.devices[name].latency.observe_request(shipment.counts, took_ms - header.queue_us / 1e3)
        record = flight.record.blocks[-1]
        record.bytes_up += message_bytes(message)
        record.device_ms = max(record.device_ms, header.compute_us / 1e3)
        flight.partials[shipment.device] = (shipment.rows, rows)
        flight.waiting -= 1
        self._continue_if_complete(flight, policy)

    def _check_deadlines(self) -> None:
        now_s = self._hub.clock.now_s()
        for pending in self._pending.values():
            if now_s < pending.check_s:
                continue
            name = self._names[pending.shipment.device]
            device = self._hub.devices.get(name)
            silent_s = now_s - device.last_heard_s if device is not None else float("inf")
            if silent_s < SILENT_S and now_s - pending.sent_s < LATE_THOUGH_ALIVE * pending.allowed_s:
                pending.check_s = now_s + CHECK_AGAIN_S
                continue
            heard = f"silent for {silent_s:.1f} s" if silent_s >= SILENT_S else "though it answers pings"
            raise DeviceTimeout(
                name,
                f"no answer for block {pending.flight.block} of {pending.flight.microbatch.name} in "
                f"{now_s - pending.sent_s:.1f} s (allowed {pending.allowed_s:.1f} s), {heard}",
            )


def message_bytes(message: Message) -> int:
    """Size of a message's rows on the wire; headers are some 20 bytes a row-expert pair and are left out."""
    return 0 if message.rows is None else message.rows.nbytes
