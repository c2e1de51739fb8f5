"""Requests that are out: who was asked, who has answered, and who is asked instead when a device fails.

What happens when a device is late or fails, in this order: a replica, a hedge (the same, before it is lost), the base
station's own copy, and skipping what is lost with the rest scaled up, where the policy is not exact and the user allows
it. Otherwise the run ends with the device's name: an answer is never made up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec
import numpy as np

from wdmoe.bs.dispatch import Partial, Shipment, entries, in_pieces, regroup
from wdmoe.bs.fleet import BS_HOLDS, Fleet
from wdmoe.bs.held import HeldExperts
from wdmoe.bs.hub import HEARTBEAT_S, Complained, Event, Hub, Joined, Left, Replied
from wdmoe.bs.records import BlockRecord, DeviceUse
from wdmoe.bs.routing import Floats, Ints
from wdmoe.bs.tracing import Reply, Trace
from wdmoe.bs.transmitting import Sending, sending
from wdmoe.runtime.errors import DeviceError, DeviceFailed, DeviceTimeout
from wdmoe.runtime.manifest import ModelSpec
from wdmoe.runtime.messages import ExpertReply, ExpertRequest, Message, Rows, all_finite, unpack_rows

# A device is lost when it is both late and silent; one that answers pings may be late for longer.
LATE_AT_LEAST_S = 2.0
LATE_AT_MOST_S = 60.0  # whatever a profile claims
LATE_TIMES_P95 = 20.0
SILENT_S = 2.0
LATE_THOUGH_ALIVE = 10.0  # times what was allowed
CHECK_AGAIN_S = 0.25
HEDGE_AT_LEAST_S = 0.1
HEDGE_AT_MOST_S = 1.0
WORST_TAIL = 5.0  # a quick profile may hold one call that was preempted: its p95 over p50 counts up to here
SILENT_PINGS = 3  # unanswered, from which a device gets no more work


@dataclass(slots=True, eq=False)
class Attempt:
    """One way of getting an answer: the device itself, or those that take over."""

    left: int  # requests of it that are out
    partials: list[tuple[str, Partial]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Want:
    """What is wanted from one device for one microbatch in one block; done when any attempt is complete."""

    shipment: Shipment
    name: str  # of the microbatch
    record: BlockRecord
    devices: dict[str, DeviceUse]  # of the microbatch, by name
    may_skip: bool
    on_done: Callable[[Want], None]
    attempts: list[Attempt] = field(default_factory=list)
    partials: list[Partial] = field(default_factory=list)
    lost: tuple[Ints, Floats] | None = None  # rows and gate weights that were skipped, an entry for each pair


@dataclass(slots=True, eq=False)
class Pieces:
    """A request that was sent in pieces, and what the answers told so far."""

    shipment: Shipment  # the whole
    count: int
    left: int
    first_sent_s: float = float("inf")
    compute_ms: float = 0.0


@dataclass(slots=True, eq=False)
class Pending:
    """A request that is out, or a piece of one."""

    want: Want
    attempt: Attempt
    shipment: Shipment
    message: Message
    sent_s: float  # when it left, or will
    check_s: float  # when to look next
    pieces: Pieces | None = None  # of which it is one
    longer_ms: float = 0.0  # what a share of the band adds on the air
    reported_ms: float = 0.0  # of that, what the reply reports as waiting
    predicted_ms: float = 0.0
    allowed_s: float = LATE_AT_LEAST_S  # from sending to the answer, before the device is suspected
    hedge_s: float = float("inf")  # when to ask another as well


@dataclass(frozen=True, slots=True)
class Answer:
    """What an answer says of its device."""

    device: str
    counts: tuple[int, ...]  # rows of each expert called
    rows: int
    took_ms: float | None  # without what it waited behind other requests; None: of a piece, which waits for the others
    compute_ms: float  # as the device reports


RunHeld = Callable[[ExpertRequest, Rows, BlockRecord, Callable[[Rows], None]], None]


class Requests:
    """Sends requests and sees to it that each is answered, replaced, or ends the run with a name."""

    def __init__(self, hub: Hub, held: HeldExperts | None, run_held: RunHeld, trace: Trace | None = None) -> None:
        """Start with nothing out.

        Args:
            hub: the devices.
            held: experts at the base station, if it has any.
            run_held: lets it do a request where that may take long, then calls back with the result.
            trace: collects a timeline.
        """
        self._trace = trace
        self.fleet = Fleet()
        self.late_replies = 0
        self.counts: Counter[str] = Counter()  # replaced, hedged, skipped
        self._hub = hub
        self._held = held
        self._run_held = run_held
        self._pending: dict[int, Pending] = {}
        self._unassessed: list[Pending] = []  # sent, without deadlines so far
        self._answers: list[Answer] = []  # taken, their devices not judged by them so far
        self._probes: dict[int, str] = {}  # request id -> device
        self._next_id = 0

    def ask(self, want: Want, pieces: int = 1) -> None:
        """Send what is wanted, in so many pieces; if its device failed meanwhile, to those that take over."""
        self._attempt(want, in_pieces(want.shipment, pieces))

    def abandon(self) -> None:
        """Forget what is out: what still comes is late, and counted."""
        self._pending.clear()
        self._unassessed.clear()

    def next_check_s(self) -> float:
        """Return when `check` has something to do; infinity if nothing is out."""
        return min((min(p.check_s, p.hedge_s) for p in self._pending.values()), default=float("inf"))

    def holders(self, block: int, expert: int) -> list[str]:
        """Return the connected devices that hold an expert."""
        return [name for name, device in self._hub.devices.items() if (block, expert) in device.experts]

    def preferred(self, block: int, expert: int) -> str | None:
        """Return who is to run an expert now: a usable device, else the base station, else nobody."""
        device = self.fleet.preferred(self.holders(block, expert))
        return device or (BS_HOLDS if self._covers(block, expert) else None)

    def sharing(self, block: int, expert: int) -> list[str]:
        """Return all who may run an expert now, where its rows are dealt out; see `preferred`."""
        devices = self.fleet.sharing(self.holders(block, expert))
        return devices or ([BS_HOLDS] if self._held is not None else [])

    def unserved(self, model: ModelSpec) -> bool:
        """Whether some expert has nobody who may run it now."""
        experts = ((block, expert) for block in range(model.n_blocks) for expert in range(model.n_experts))
        return any(self.preferred(block, expert) is None for block, expert in experts)

    def probe_blocked(self) -> None:
        """Probe every blocked device that is connected, whenever its next probe was due."""
        for name in self.fleet.probes_due(self._hub.devices, float("inf")):
            self._probe(name)

    # -- what comes ------------------------------------------------------------------------------------------------

    def on_events(self, events: Iterable[Event]) -> None:
        """Take what the hub tells, all of it: who comes or leaves after a failure is told only once.

        Raises:
            DeviceError: a device failed and nothing can take its place; of several, the first.
        """
        failure: DeviceError | None = None
        for event in events:
            try:
                self._on_event(event)
            except DeviceError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _on_event(self, event: Event) -> None:
        match event:
            case Replied(device=name, message=message):
                self._on_reply(name, message)
            case Complained(device=name, text=text, request_id=request_id):
                pending = self._pending.get(request_id or 0)
                if pending is not None and pending.shipment.device == name:
                    self._fail(DeviceFailed(name, f"reports: {text}"))
            case Joined(device=name):
                self.fleet.on_joined(name)
                # Back after a restart: what it was asked for is asked again.
                for pending in self._of(name):
                    self._hub.send(name, pending.message)
            case Left(device=name, reason=reason):
                self.fleet.on_left(name)
                if self._of(name):
                    self._fail(DeviceFailed(name, f"left ({reason}) before it answered"))

    def _on_reply(self, name: str, message: Message) -> None:
        header = message.header
        assert isinstance(header, ExpertReply) and message.rows is not None
        if self._probes.pop(header.request_id, None) == name:
            if np.isfinite(message.rows).all():
                self.fleet.on_probe_answered(name)
            return
        pending = self._pending.get(header.request_id)
        if pending is None or pending.shipment.device != name:
            self.late_replies += 1
            return
        want = pending.want
        if header.rows != len(pending.shipment.rows):
            self._fail(DeviceFailed(name, f"answered {header.rows} rows to a request of {len(pending.shipment.rows)}"))
            return
        rows = unpack_rows(message.rows)
        if not all_finite(rows):
            block = pending.shipment.request.block
            self._fail(DeviceFailed(name, f"sent rows that are not finite for block {block}"))
            return
        del self._pending[header.request_id]
        now_s, request = self._hub.clock.now_s(), pending.shipment.request
        took_ms = (now_s - pending.sent_s) * 1e3 - header.queue_us / 1e3
        if self._trace is not None:
            times_s = (pending.sent_s, now_s, header.queue_us / 1e6, header.compute_us / 1e6)
            self._trace.replies.append(Reply(name, request.block, want.name, *times_s))
        want.record.bytes_up += message_bytes(message)
        compute_ms, queue_ms = header.compute_us / 1e3, max(0.0, header.queue_us / 1e3 - pending.reported_ms)
        if (pieces := pending.pieces) is None:
            self._answers.append(Answer(name, request.counts, request.rows, took_ms, compute_ms))
            self._note(want, name, header.rows, compute_ms, queue_ms, took_ms - compute_ms + pending.longer_ms)
        else:
            self._answers.append(Answer(name, request.counts, request.rows, None, compute_ms))
            pieces.left, pieces.compute_ms = pieces.left - 1, pieces.compute_ms + compute_ms
            if not pieces.left:
                # What was not computing counts as the way, though the two overlap.
                way_ms = (now_s - pieces.first_sent_s) * 1e3 - pieces.compute_ms
                rows_in_all = len(pieces.shipment.rows)
                self._note(want, name, rows_in_all, pieces.compute_ms, 0.0, max(0.0, way_ms), pieces.count)
        self._on_part(want, pending.attempt, name, (pending.shipment.rows, rows))

    def _note(
        self, want: Want, device: str, rows: int, compute_ms: float, queue_ms: float, air_ms: float, messages: int = 1
    ) -> None:
        want.record.on_answer(compute_ms, queue_ms, air_ms)
        want.devices.setdefault(device, DeviceUse()).add(rows, compute_ms, queue_ms, air_ms, messages)

    def _on_part(self, want: Want, attempt: Attempt, device: str, partial: Partial) -> None:
        attempt.partials.append((device, partial))
        attempt.left -= 1
        if attempt.left or attempt not in want.attempts:
            return
        if len(want.attempts) > 1 and attempt is not want.attempts[0]:
            self.fleet.penalise(want.shipment.device, "another device answered sooner")
        # By name, not by arrival: the same plan gives the same bits.
        want.partials = [part for _, part in sorted(attempt.partials, key=lambda item: item[0])]
        self._settle(want)

    def _settle(self, want: Want) -> None:
        if len(want.attempts) > 1:  # what is out of the others is wanted no more
            self._pending = {number: p for number, p in self._pending.items() if p.want is not want}
        want.attempts.clear()
        if want.lost is not None:
            rows, weights = want.lost
            self.counts["skipped"] += 1
            want.record.skipped += len(np.unique(rows))
            want.record.gate_mass_dropped += float(weights.sum())
        want.on_done(want)

    # -- what does not come ----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Hedge what is slow, replace what is lost, probe what is blocked.

        To be called right after sending: what need not be done before rows are on their way is done here.

        Raises:
            DeviceTimeout: a device is lost and nothing can take its place.
        """
        self._judge()
        self._assess()
        now_s = self._hub.clock.now_s()
        for pending in list(self._pending.values()):
            if pending.want.attempts and now_s >= pending.hedge_s:
                pending.hedge_s = float("inf")
                self._hedge(pending)
        for pending in list(self._pending.values()):
            if pending.want.attempts and now_s >= pending.check_s:
                self._suspect(pending, now_s)
        for device in list(self._hub.devices.values()):
            self.fleet.on_heard(device.name, device.last_heard_s, now_s)
            # Pings are only sent while the loop turns, so old silence alone proves nothing.
            if len(device.pings) >= SILENT_PINGS and now_s - device.last_heard_s > SILENT_PINGS * HEARTBEAT_S:
                self._on_silent(device.name, device.last_heard_s, now_s)
        for name in self.fleet.probes_due(self._hub.devices, now_s):
            self._probe(name)

    def _judge(self) -> None:
        """Let the answers that came correct what is thought of their devices."""
        for answer in self._answers:
            if (device := self._hub.devices.get(answer.device)) is not None:
                device.latency.observe_request(answer.counts, answer.took_ms, answer.rows, answer.compute_ms)
                self.fleet.on_good_answer(answer.device, device.latency.model().correction)
        self._answers.clear()

    def _assess(self) -> None:
        """Say how long the requests may take that were sent since."""
        # Of a device that left a moment ago the hub is about to say so.
        sent = [(p, device) for p in self._unassessed if (device := self._hub.devices.get(p.shipment.device))]
        self._unassessed.clear()
        for pending, device in sent:
            request = pending.shipment.request
            pending.predicted_ms = device.latency.request_ms(request.counts, request.rows) + pending.longer_ms
        for pending, device in sent:  # all pieces of a request are known by now
            tail = min(WORST_TAIL, device.latency.profile.tail_ratio)
            p95_s = tail * sum(p.predicted_ms for p in self._of(device.name)) / 1e3
            pending.allowed_s = min(LATE_AT_MOST_S, max(LATE_AT_LEAST_S, LATE_TIMES_P95 * p95_s))
            pending.check_s = pending.sent_s + pending.allowed_s
            pending.hedge_s = pending.sent_s + min(HEDGE_AT_MOST_S, max(HEDGE_AT_LEAST_S, p95_s))

    def _on_silent(self, name: str, heard_s: float, now_s: float) -> None:
        """Give a silent device no more work; what it owes has deadlines of its own."""
        if self.fleet.usable(name) and not self._of(name):
            self.fleet.block(name, f"silent for {now_s - heard_s:.1f} s", now_s, heard_s)

    def _suspect(self, pending: Pending, now_s: float) -> None:
        name = pending.shipment.device
        device = self._hub.devices.get(name)
        silent_s = now_s - device.last_heard_s if device is not None else float("inf")
        waited_s = now_s - pending.sent_s
        if silent_s < SILENT_S and waited_s < LATE_THOUGH_ALIVE * pending.allowed_s:
            pending.check_s = now_s + CHECK_AGAIN_S
            return
        heard = f"silent for {silent_s:.1f} s" if silent_s >= SILENT_S else "though it answers pings"
        what = f"block {pending.shipment.request.block} of {pending.want.name}"
        self._fail(
            DeviceTimeout(
                name, f"no answer for {what} in {waited_s:.1f} s (allowed {pending.allowed_s:.1f} s), {heard}"
            )
        )

    def _hedge(self, pending: Pending) -> None:
        want = pending.want
        if len(want.attempts) > 1 or pending.shipment.device != want.shipment.device:
            return
        others = self._takers(want.shipment, avoid=want.shipment.device)
        if all(others.values()):
            self.counts["hedged"] += 1
            self._send_attempt(want, regroup(want.shipment, {e: name for e, name in others.items() if name}))

    def _fail(self, error: DeviceError) -> None:
        """Block a device and find another way for everything it owes."""
        name = error.device
        now_s, device = self._hub.clock.now_s(), self._hub.devices.get(name)
        silent = device is not None and now_s - device.last_heard_s >= SILENT_S
        self.fleet.block(name, str(error).partition(": ")[2], now_s, device.last_heard_s if device and silent else None)
        for pending in self._of(name):
            want, attempt = pending.want, pending.attempt
            if attempt not in want.attempts:
                continue  # an earlier one of this loop has dealt with it
            want.attempts.remove(attempt)
            self._pending = {n: p for n, p in self._pending.items() if p.attempt is not attempt}
            if not want.attempts:
                self.counts["replaced"] += 1
                self._replace(want, error)

    def _replace(self, want: Want, error: DeviceError) -> None:
        takers = self._takers(want.shipment, avoid=error.device)
        orphans = [expert for expert, name in takers.items() if name is None]
        if orphans and not want.may_skip:
            raise error
        # All that is wanted is looked for afresh, so this replaces what an earlier replacement had to skip.
        want.lost = _part_of(want.shipment, orphans) if orphans else None
        parts = regroup(want.shipment, {expert: name for expert, name in takers.items() if name is not None})
        if parts:
            self._send_attempt(want, parts)
        else:
            self._settle(want)

    def _takers(self, shipment: Shipment, avoid: str) -> dict[int, str | None]:
        block = shipment.request.block
        found: dict[int, str | None] = {}
        for expert in shipment.request.experts:
            device = self.fleet.preferred(name for name in self.holders(block, expert) if name != avoid)
            found[expert] = device or (BS_HOLDS if avoid != BS_HOLDS and self._covers(block, expert) else None)
        return found

    def _probe(self, device: str) -> None:
        """Ask a blocked device for one row; a sound answer lets it work again."""
        block, expert = min(self._hub.devices[device].experts)
        d_model = self._hub.devices[device].latency.profile.d_model
        request = ExpertRequest(
            request_id=self._new_id(), block=block, rows=1, wire="fp32", experts=(expert,), counts=(1,),
            index=np.zeros(1, "<u4").tobytes(), weights=np.ones(1, "<f4").tobytes(),
        )  # fmt: skip
        self._probes = {
            number: name for number, name in self._probes.items() if name != device
        }  # only the latest counts
        self._probes[request.request_id] = device
        self._hub.send(device, Message(request, np.ones((1, d_model), "<f4")))

    # -- what goes ---------------------------------------------------------------------------------------------------

    def _attempt(self, want: Want, parts: list[Shipment]) -> None:
        device = want.shipment.device
        if device != BS_HOLDS and (device not in self._hub.devices or not self.fleet.usable(device)):
            why = self.fleet.of(device).reason or "it left"
            self._replace(want, DeviceFailed(device, f"cannot be asked for block {want.shipment.request.block}: {why}"))
            return
        self._send_attempt(want, parts)

    def _send_attempt(self, want: Want, parts: list[Shipment]) -> None:
        attempt = Attempt(len(parts))
        want.attempts.append(attempt)
        pieces = (
            Pieces(want.shipment, len(parts), len(parts)) if len(parts) > len({part.device for part in parts}) else None
        )
        for part in parts:
            if part.device == BS_HOLDS:
                self._ask_held(want, attempt, part)
            else:
                self._send(want, attempt, part, pieces)

    def _ask_held(self, want: Want, attempt: Attempt, part: Shipment) -> None:
        want.record.bs_rows += len(part.rows)
        self._run_held(
            part.request,
            unpack_rows(part.packed),
            want.record,
            lambda sums: self._on_part(want, attempt, BS_HOLDS, (part.rows, sums)),
        )

    def _covers(self, block: int, expert: int) -> bool:
        return self._held is not None and self._held.covers(block, expert)

    def _send(self, want: Want, attempt: Attempt, part: Shipment, pieces: Pieces | None) -> None:
        number, now_s = self._new_id(), self._hub.clock.now_s()
        leaving = Sending(msgspec.structs.replace(part.request, request_id=number), now_s)
        if (device := self._hub.devices.get(part.device)) is not None and device.latency.share != 1:
            leaving = sending(leaving.request, part.packed.nbytes / len(part.packed), device, now_s)
        message, sent_s = Message(leaving.request, part.packed), leaving.leaves_s
        if pieces is not None:
            pieces.first_sent_s = min(pieces.first_sent_s, sent_s)
        check_s = sent_s + LATE_AT_LEAST_S
        self._pending[number] = Pending(
            want, attempt, part, message, sent_s, check_s, pieces, leaving.longer_ms, leaving.reported_ms
        )
        self._unassessed.append(self._pending[number])
        want.record.bytes_down += message_bytes(message)
        self._hub.send(part.device, message, sent_s)

    def _of(self, device: str) -> list[Pending]:
        return [p for p in self._pending.values() if p.shipment.device == device]

    def _new_id(self) -> int:
        self._next_id = self._next_id % (2**31 - 1) + 1
        return self._next_id


def _part_of(shipment: Shipment, experts: list[int]) -> tuple[Ints, Floats]:
    """Return rows and gate weights of the pairs of a shipment that want these experts."""
    expert, index, weight = entries(shipment.request)
    chosen = np.isin(expert, experts)
    return shipment.rows[index[chosen]], weight[chosen]


def lost_share(n_rows: int, wants: list[Want], asked: Floats) -> Floats | None:
    """Return the share of each token's gate weight that was skipped, or None if nothing was.

    Args:
        n_rows: tokens of the microbatch.
        wants: all of one block.
        asked: [n_rows, k], the weights that were asked for.
    """
    lost = [want.lost for want in wants if want.lost is not None]
    if not lost:
        return None
    share = np.zeros(n_rows, np.float32)
    for rows, weights in lost:
        np.add.at(share, rows, weights)
    total: Floats = asked.sum(axis=1)
    return share / total


def message_bytes(message: Message) -> int:
    """Size of a message's rows on the wire; headers are some 10 bytes a row and expert and are left out."""
    return 0 if message.rows is None else message.rows.nbytes
