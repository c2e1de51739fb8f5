"""The main path: microbatches through stages and devices, several in flight, in one loop.

    stage (worker) -> Routing -> select -> Plan -> one ExpertRequest per device -> replies -> combine -> next stage

The loop sends, receives and watches deadlines; what computes runs on the worker. While one microbatch waits for the
air, another runs its stage. With one microbatch alone, short stages run on the loop's own thread: handing a stage over and
back costs two switches of thread in every block, and a heartbeat can wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from wdmoe.bs.airtime import Medium, latency_model
from wdmoe.bs.chunking import Turn
from wdmoe.bs.config import InFlight
from wdmoe.bs.deciding import asks_replicas, choose, context_of, knows_times, pairs_of_model
from wdmoe.bs.dispatch import Shipment, relative_error, shipments_of
from wdmoe.bs.flights import Dispatched, Flight, Held, Outcome, Shared
from wdmoe.bs.held import HeldExperts
from wdmoe.bs.hub import Hub
from wdmoe.bs.importance import norms_of_text
from wdmoe.bs.latency import DeviceLatency
from wdmoe.bs.microbatch import Microbatch, Result
from wdmoe.bs.offload import take_over
from wdmoe.bs.pacing import STAGES_BUSY, Cost, Pacing, Request, cost_of_block
from wdmoe.bs.policies import Exact, Policy, RoundRobin, check_budgets
from wdmoe.bs.policies.exact import select_exact
from wdmoe.bs.records import BlockRecord, Record
from wdmoe.bs.requests import Requests, Want, lost_share
from wdmoe.bs.rota import NO_WORKERS, Rota, Workers
from wdmoe.bs.routing import Bools, Floats, Ints, Plan, Routing
from wdmoe.bs.sensitivity import SensitivityFile
from wdmoe.bs.stages import OnStation, StationStages
from wdmoe.bs.tracing import LOOP, STAGES, WAITS, Trace
from wdmoe.bs.transmitting import LiveBand, Transmitter
from wdmoe.runtime.manifest import BsManifest
from wdmoe.runtime.memory import keep_freed_memory
from wdmoe.runtime.messages import ExpertRequest, Rows, Wire
from wdmoe.runtime.worker import Worker

_LOSSLESS = (Exact, RoundRobin)  # policies that leave nothing out
RECOVER_S = 2.0  # at the start of a run, for devices that were blocked in an earlier one
SHORT_MS = 20.0  # what took no longer in the block before may hold up the loop


class Pipeline:
    """Runs microbatches through the base station's stages and the connected devices."""

    def __init__(
        self,
        hub: Hub,
        stages: StationStages,
        manifest: BsManifest,
        make_worker: Callable[[Callable[[], None]], Worker[Outcome]],
        wire: Wire = "fp16",
        held: HeldExperts | None = None,
        skip_lost: bool = False,
        trace: Trace | None = None,
        medium: Medium | None = None,
        on_dispatch: Callable[[Sequence[Shipment], bool], Sequence[Turn]] | None = None,
        stage_workers: int = 1,
        band: LiveBand | None = None,
        splits: bool = True,
        learns: bool = False,
    ) -> None:
        """Put the parts together.

        Args:
            hub: the devices.
            stages: the base station's part of the model.
            manifest: of the base station.
            make_worker: makes the worker, given what to call when a job has ended.
            wire: precision of the rows on the wire.
            held: experts at the base station: those it keeps, and those for when a device is lost.
            skip_lost: whether a policy other than exact may leave out what is lost.
            trace: collects a timeline.
            medium: what the devices' links are; None: one shared channel if an emulated device says so, else own ones.
            on_dispatch: what stands in for `Transmitter.dispatch` where time is virtual.
            stage_workers: how many jobs the worker runs at a time.
            band: how devices that dial in share theirs.
            splits: whether requests may go in pieces where that is sooner; see `chunking.py`.
            learns: whether also by what requests tell of a link.
        """
        keep_freed_memory()
        self._trace = trace
        self._hub = hub
        self.stages = stages
        self._model = manifest.model
        self._norms = norms_of_text(manifest)
        self._held = held
        self._wire: Wire = wire
        self._skip_lost = skip_lost
        self._transmitter = Transmitter(hub, band or LiveBand(), medium, splits, learns)
        self._on_dispatch = on_dispatch or self._transmitter.dispatch
        self.sensitivity: SensitivityFile | None = None  # of the blocks, as calibrated
        self.on_router: Callable[[int, Floats], None] | None = None  # told each block's logits, on the worker
        self._worker = make_worker(hub.wake)
        self.requests = Requests(hub, held, self._run_held, trace)
        self._rota = Rota(hub, self.requests, held, manifest.model, self._transmitter.look_again)
        self._flights: list[Flight] = []
        self._landed: list[Flight] = []
        self.pacing = Pacing()
        self._paced = False  # whether this run asks it
        self._stage_workers = stage_workers
        self._uncosted: list[tuple[float, list[Shipment]]] = []  # steps, how long each took, that pacing does not know

    def run(
        self, microbatches: Iterable[Microbatch], policy: Policy, in_flight: InFlight = 1
    ) -> Iterator[tuple[int, Result, Record]]:
        """Run microbatches, at most `in_flight` at a time; yield number, result and record of each as it is done.

        `auto` begins with one and follows what blocks turn out to cost; see `pacing.py`.

        Raises:
            DeviceTimeout, DeviceFailed, DevicesMissing: a device that is needed is lost; the others are left usable.
            ValueError: the policy asks for what is not known of this model.
        """
        check_budgets(policy, self._model.n_blocks)
        self._transmitter.in_flight = 1 if in_flight == "auto" else in_flight
        self._paced = in_flight == "auto"
        self._recover(policy)
        source = enumerate(microbatches)
        exhausted = False
        try:
            while True:
                while not exhausted and len(self._flights) < self._limit(in_flight):
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
            self.requests.abandon()
            self._worker.abandon()  # it may be writing into a cache that the next run reads
            self._flights.clear()
            self._landed.clear()
            self._uncosted.clear()

    @property
    def stages_on(self) -> str:
        """Which kind of processor runs the stages: cpu or cuda."""
        return self.stages.on

    @property
    def in_flight(self) -> int:
        """Microbatches on their way."""
        return len(self._flights)

    def idle(self, timeout_s: float) -> None:
        """Keep the devices while nothing runs: heartbeats, hellos, probes of what is blocked."""
        self.requests.on_events(self._hub.turn(timeout_s))
        self.requests.check()

    def wake(self) -> None:
        """Let a waiting `idle` return early; may be called from any thread."""
        self._hub.wake()

    def close(self) -> None:
        """Stop the worker."""
        self._worker.close()

    # -- the loop ------------------------------------------------------------------------------------------------

    def _turn(self, policy: Policy) -> None:
        started_s = self._hub.clock.now_s()
        events = self._hub.turn(0.0)
        if self._trace is not None:
            self._trace.add(LOOP, "send", started_s, self._hub.clock.now_s())
        self.requests.on_events(events)
        self.requests.check()  # while what was just sent is on its way
        self._learn()
        if not events and not self._worker.due():
            wait_s = min(1.0, self.requests.next_check_s() - self._hub.clock.now_s())
            self.requests.on_events(self._hub.turn(max(0.0, wait_s)))
        for done in self._worker.finished():
            if done.error is not None:
                raise done.error
            assert done.result is not None
            flight, outcome = done.result
            if isinstance(outcome, Held):
                self._on_held(outcome, done.took_s * 1e3)
            elif flight is not None and flight in self._flights:
                self._on_computed(flight, outcome, done.took_s * 1e3, policy)

    def _limit(self, in_flight: InFlight) -> int:
        """Say how many microbatches there may be now."""
        return self.pacing.in_flight if in_flight == "auto" else in_flight

    def _to_learn(self, step_ms: float, shipments: list[Shipment]) -> None:
        """Keep what a step cost until there is time for it, if anybody will ask."""
        if self._paced:
            self._uncosted.append((step_ms, shipments))

    def _learn(self) -> None:
        """Let pacing know what the last steps cost; while what they sent is on its way."""
        for step_ms, shipments in self._uncosted:
            self.pacing.note(
                cost_of_block(step_ms, self._asked(shipments), self._transmitter.medium, self._stage_workers)
            )
        self._uncosted.clear()

    def _asked(self, shipments: Sequence[Shipment]) -> list[Request]:
        """Predict what devices are asked for, each by its part."""
        asked: list[Request] = []
        for shipment in shipments:
            if (device := self._hub.devices.get(shipment.device)) is not None:
                air_ms, compute_ms = device.latency.parts_ms(shipment.request.counts, shipment.request.rows)
                asked.append(Request(device.name, air_ms, compute_ms, device.latency.round_trip_ms))
        return asked

    def _recover(self, policy: Policy) -> None:
        """Probe what was blocked in an earlier run, and wait for the answers if it is needed."""
        self.requests.probe_blocked()
        deadline_s = self._hub.clock.now_s() + RECOVER_S
        while self._hub.clock.now_s() < deadline_s and not self._may_skip(policy) and not self._rota.all_served():
            self.requests.on_events(self._hub.turn(0.1))

    def _depart(self, number: int, microbatch: Microbatch, policy: Policy) -> None:
        now_s = self._hub.clock.now_s()
        prepared = self.stages.prepare(microbatch)
        in_flight = len(self._flights) + 1
        record = Record(microbatch.name, len(microbatch.token_ids), microbatch.questions, in_flight)
        flight = Flight(number, microbatch, prepared, now_s, record)
        self._flights.append(flight)
        self._submit_step(flight, None, policy)

    def _on_computed(
        self, flight: Flight, outcome: Dispatched | Result | Shared, took_ms: float, policy: Policy
    ) -> None:
        now_s = self._hub.clock.now_s()
        match outcome:
            case Result():
                flight.result = outcome
                flight.record.bs_ms += took_ms
                flight.record.latency_ms = (now_s - flight.started_s) * 1e3
                self._to_learn(took_ms, [])
                self._flights.remove(flight)
                self._landed.append(flight)
            case Dispatched():
                flight.step_ms = took_ms
                flight.record.bs_ms += took_ms
                flight.residual, flight.asked = outcome.residual, outcome.asked
                flight.record.blocks.append(outcome.record)
                flight.stage_done_s = now_s
                self._ask(flight, outcome, policy)
                self._to_learn(took_ms, outcome.shipments)
                if self._model.shared_expert:
                    # Runs while the rows are on the air.
                    block, hidden = flight.block, outcome.hidden
                    short = self._is_short(flight.shared_ms)
                    self._worker.submit(lambda: (flight, self._run_shared(flight, block, hidden)), short)
            case Shared(rows=rows):
                flight.shared_ms = took_ms
                flight.record.shared_ms += took_ms
                if self._paced:  # while rows are on the air
                    self.pacing.note(Cost(0.0, {STAGES_BUSY: took_ms / self._stage_workers}))
                flight.shared, flight.shared_pending = rows, False
                flight.stage_done_s = now_s
                self._continue_if_complete(flight, policy)

    def _on_held(self, held: Held, took_ms: float) -> None:
        held.record.bs_experts_ms += took_ms
        for flight in self._flights:
            if flight.record.blocks and flight.record.blocks[-1] is held.record:
                flight.stage_done_s = self._hub.clock.now_s()
        if held.predicted_ms is not None and self._held is not None and self._held.latency is not None:
            self._held.latency.observe_request(held.request.counts, took_ms)
        held.take(held.sums)

    def _ask(self, flight: Flight, dispatched: Dispatched, policy: Policy) -> None:
        def on_done(_: Want) -> None:
            flight.waiting -= 1
            self._continue_if_complete(flight, policy)

        microbatch, devices = flight.microbatch.name, flight.record.devices
        flight.wants = [
            Want(shipment, microbatch, dispatched.record, devices, self._may_skip(policy), on_done)
            for shipment in dispatched.shipments
        ]
        flight.waiting = len(flight.wants)
        flight.shared_pending = self._model.shared_expert
        wants = list(flight.wants)  # those that fail at once take themselves off
        for turn in self._on_dispatch(dispatched.shipments, len(self._flights) == 1):
            self.requests.ask(wants[turn.which], turn.pieces)

    def _continue_if_complete(self, flight: Flight, policy: Policy) -> None:
        if flight.waiting or flight.shared_pending:
            return
        now_s = self._hub.clock.now_s()
        flight.record.blocks[-1].waiting_ms = (now_s - flight.stage_done_s) * 1e3
        if self._trace is not None:
            self._trace.add(WAITS, f"block {flight.block} of {flight.microbatch.name}", flight.stage_done_s, now_s)
        rows, shared, wants = len(flight.microbatch.token_ids), flight.shared, flight.wants
        assert flight.asked is not None
        lost = lost_share(rows, wants, flight.asked)
        partials = [partial for want in wants for partial in want.partials]
        flight.block += 1
        flight.wants, flight.shared = [], None
        self._submit_step(flight, lambda: self.stages.combine(rows, partials, lost, shared), policy)

    # -- what runs on the worker -----------------------------------------------------------------------------------

    def _submit_step(self, flight: Flight, combined: Callable[[], OnStation] | None, policy: Policy) -> None:
        block, residual = flight.block, flight.residual
        last = block == self._model.n_blocks  # with the head: another thing than the steps before it
        workers = NO_WORKERS if last else self._rota.of_block(block, self._may_skip(policy), asks_replicas(policy))
        timeless = last or (not knows_times(policy) and workers.kept is None)
        latencies = () if timeless else self._rota.latencies(workers, flight.shared_ms, len(self._flights))
        short = not last and self._is_short(flight.step_ms)
        self._worker.submit(
            lambda: (flight, self._step(flight, block, residual, combined, workers, latencies, policy)), short
        )

    def _is_short(self, last_ms: float) -> bool:
        """Whether a job may run on the loop's own thread: nothing else could use that time, and it is not long."""
        return len(self._flights) == 1 and last_ms <= SHORT_MS

    def _run_shared(self, flight: Flight, block: int, hidden: OnStation) -> Shared:
        started_s = self._hub.clock.now_s()
        rows = self.stages.shared(block, hidden)
        self._note(flight, f"shared expert {block}", started_s)
        return Shared(rows)

    def _note(self, flight: Flight, what: str, started_s: float) -> None:
        """Tell the trace what the worker did since."""
        if self._trace is not None:
            self._trace.add(_track(), f"{what} of {flight.microbatch.name}", started_s, self._hub.clock.now_s())

    def _run_held(self, request: ExpertRequest, rows: Rows, record: BlockRecord, take: Callable[[Rows], None]) -> None:
        held = self._held
        assert held is not None
        predicted_ms = held.predicted_ms(request)

        def job() -> Outcome:
            started_s = self._hub.clock.now_s()
            sums = held.answer(request, rows)
            if self._trace is not None:
                self._trace.add(_track(), f"own experts of block {request.block}", started_s, self._hub.clock.now_s())
            return None, Held(sums, take, request, record, predicted_ms)

        self._worker.submit(job, predicted_ms is not None and self._is_short(predicted_ms))

    def _may_skip(self, policy: Policy) -> bool:
        return self._skip_lost and not isinstance(policy, Exact)

    def _step(
        self,
        flight: Flight,
        block: int,
        residual: OnStation,
        combined: Callable[[], OnStation] | None,
        workers: Workers,
        latencies: tuple[DeviceLatency, ...],
        policy: Policy,
    ) -> Dispatched | Result:
        """Combine, run the stage, route, select, pack: all that is computed between two waits for devices."""
        started_s = self._hub.clock.now_s()
        moe_out = combined() if combined is not None else None
        microbatch = flight.microbatch
        if block == self._model.n_blocks:
            assert residual is not None and moe_out is not None
            result = self.stages.finish(microbatch, residual, moe_out)
            self._note(flight, "head", started_s)
            return result
        attended = self.stages.attend(block, microbatch, flight.prepared, residual, moe_out)
        routed = self.stages.route(attended, workers.owner, len(workers.names), self._wire)
        if self.on_router is not None:
            self.on_router(block, routed.router_logits)
        routing = routed.routing
        owner = self._owner(workers, routing, latencies)
        plan = self._select(block, routing, routed.router_logits, owner, workers.holders, latencies, policy)
        shipments = shipments_of(block, routing, plan, owner, workers.names, routed.packed)
        sent = pairs = sum(len(shipment.rows) for shipment in shipments)
        gate_mass_dropped = 0.0
        if not isinstance(policy, _LOSSLESS):
            pairs = pairs_of_model(plan, routing, owner, len(workers.names))
            gate_mass_dropped = plan.dropped_mass(routing)
        record = BlockRecord(
            pairs=pairs,
            droppable=pairs - len(routing.experts),
            sent=sent,
            gate_mass=float(np.add.reduce(routing.weights, axis=None)),
            gate_mass_dropped=gate_mass_dropped,
            theta=plan.theta,
            stopped=plan.stopped,
        )
        if self._wire == "int8" and block == flight.number % self._model.n_blocks:
            # Of one block; the next microbatch of another.
            flight.record.wire_error = relative_error(self.stages.on_host(routed.hidden), self._wire)
        self._note(flight, f"stage {block}", started_s)
        return Dispatched(routed.residual, routed.hidden, shipments, plan.weights, record)

    def _owner(self, workers: Workers, routing: Routing, latencies: tuple[DeviceLatency, ...]) -> Ints:
        """Say who runs each expert for these rows: the base station takes over what makes the block shorter."""
        if workers.kept is None:
            return workers.owner
        counts = np.bincount(routing.experts.ravel(), minlength=self._model.n_experts)
        model = latency_model(latencies, len(routing.experts), medium=self._transmitter.medium)
        return take_over(workers.owner, counts, len(routing.experts), workers.kept, workers.station, model)

    def _select(
        self,
        block: int,
        routing: Routing,
        router_logits: Floats,
        owner: Ints,
        holders: Bools | None,
        latencies: tuple[DeviceLatency, ...],
        policy: Policy,
    ) -> Plan:
        if isinstance(policy, Exact):  # for one token, a context for nothing takes as long as the plan
            return select_exact(routing)
        context = context_of(
            policy,
            block,
            routing,
            router_logits,
            latencies,
            self._transmitter.medium,
            norms=None if self._norms is None else self._norms[block],
            holders=holders,
            sensitivity=None if self.sensitivity is None else self.sensitivity.of_block(block),
        )
        return choose(routing, owner, policy, context)


def _track() -> str:
    """Say on which track of a timeline this thread works: each worker of the stages has one of its own."""
    name = threading.current_thread().name
    return name if name.startswith(STAGES) else STAGES
