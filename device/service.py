"""What a device does with a message: events in, messages out. No socket, no clock of its own.

Long work (running experts) is handed out as jobs, so that a ping is answered while an expert runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from wdmoe.profiles.device_profile import DeviceProfile, interpolate
from wdmoe.runtime.clock import Clock
from wdmoe.runtime.engines import ExpertEngine
from wdmoe.runtime.errors import ProtocolError
from wdmoe.runtime.expert_sums import weighted_sums
from wdmoe.runtime.manifest import DeviceManifest
from wdmoe.runtime.messages import (
    PROTOCOL_VERSION,
    ErrorReport,
    ExpertReply,
    ExpertRequest,
    Goodbye,
    Hello,
    Message,
    Ping,
    Pong,
    Welcome,
    pack_rows,
    unpack_rows,
)

HELLO_EVERY_S = 0.5
_TEXT_LIMIT = 1000  # characters of an error that is reported
SILENT_HEARTBEATS = 10  # after which the base station counts as gone


@dataclass(frozen=True, slots=True)
class Job:
    """Work whose result is the answer to a message."""

    run: Callable[[], Message]  # reports its own failures
    expected_ms: float  # by the profile


def run_request(message: Message, engine: ExpertEngine, clock: Clock, arrived_s: float) -> Message:
    """Run the experts a request names and sum their weighted outputs, one row for each row sent.

    Args:
        message: a checked ExpertRequest with its rows.
        engine: holds the experts.
        clock: measures what the reply reports.
        arrived_s: when the request came.
    """
    request = message.header
    assert isinstance(request, ExpertRequest) and message.rows is not None
    started_s = clock.now_s()
    total = weighted_sums(engine, request, unpack_rows(message.rows))
    packed, wire = pack_rows(total, request.wire)
    ended_s = clock.now_s()
    return Message(
        ExpertReply(
            request.request_id,
            len(packed),
            wire,
            queue_us=round(max(0.0, started_s - arrived_s) * 1e6),
            compute_us=round((ended_s - started_s) * 1e6),
        ),
        packed,
    )


@dataclass(slots=True)
class DeviceService:
    """The state of a serving device: whether it is welcome, and what it holds."""

    name: str
    session: str
    manifest: DeviceManifest
    engine: ExpertEngine
    profile: DeviceProfile
    clock: Clock
    welcomed: bool = False
    refused: str | None = None  # why the base station will never take this device
    notice: str | None = None  # what the base station last complained about
    requests: int = 0
    _heartbeat_s: float = 1.0
    _last_heard_s: float = 0.0
    _last_hello_s: float = field(default=float("-inf"))
    _held: frozenset[tuple[int, int]] = frozenset()
    _curve: tuple[tuple[int, float], ...] = ()  # of the profile
    _call_ms: dict[int, float] = field(default_factory=dict)  # of the profile, by rows: each is worked out once

    def __post_init__(self) -> None:
        """Index what is held, and work out the profile's curve once."""
        self._curve = self.profile.curve()
        self._held = frozenset((entry.block, entry.expert) for entry in self.manifest.experts)

    def on_tick(self) -> list[Message]:
        """Introduce itself while not welcome; notice a base station that has gone silent."""
        now_s = self.clock.now_s()
        if self.welcomed and now_s - self._last_heard_s > SILENT_HEARTBEATS * self._heartbeat_s:
            self.welcomed = False
        if self.welcomed or self.refused or now_s - self._last_hello_s < HELLO_EVERY_S:
            return []
        self._last_hello_s = now_s
        return [Message(self._hello())]

    def on_message(self, message: Message) -> tuple[list[Message], Job | None]:
        """Answer a message of the base station, or return the job whose result is the answer."""
        now_s = self.clock.now_s()
        self._last_heard_s = now_s
        match message.header:
            case Welcome(protocol=protocol, heartbeat_s=heartbeat_s):
                if protocol != PROTOCOL_VERSION:
                    self.refused = f"the base station speaks protocol {protocol}, this device {PROTOCOL_VERSION}"
                else:
                    self.welcomed, self._heartbeat_s, self.notice = True, heartbeat_s, None
                return [], None
            case Ping(nonce=nonce):
                return [Message(Pong(nonce))], None
            case ExpertRequest() as request:
                if (text := self._refusal(request)) is not None:
                    return [Message(ErrorReport(text, request.request_id))], None
                self.requests += 1
                return [], Job(lambda: self._compute(message, now_s), self._expected_ms(request))
            case ErrorReport(text=text, final=final):
                self.welcomed = False
                self.notice, self.refused = text, text if final else None
                return [], None
            case Goodbye():
                self.welcomed = False
                self._last_hello_s = now_s  # the next hello is for the next base station, not for this one
                return [Message(Goodbye("heard"))], None
            case other:
                return [Message(ErrorReport(f"a device does not take {type(other).__name__}"))], None

    def on_malformed(self, error: ProtocolError) -> list[Message]:
        """Answer frames that were no message."""
        return [Message(ErrorReport(str(error)[:_TEXT_LIMIT]))]

    def _compute(self, message: Message, arrived_s: float) -> Message:
        assert isinstance(message.header, ExpertRequest)
        try:
            return run_request(message, self.engine, self.clock, arrived_s)
        except Exception as error:  # noqa: BLE001 - whatever an engine throws, the base station must hear of it
            text = f"{type(error).__name__}: {error}"[:_TEXT_LIMIT]
            return Message(ErrorReport(text, message.header.request_id))

    def _expected_ms(self, request: ExpertRequest) -> float:
        known = self._call_ms
        for count in request.counts:
            if count not in known:
                known[count] = interpolate(self._curve, count)
        return sum([known[count] for count in request.counts])

    def _refusal(self, request: ExpertRequest) -> str | None:
        for expert in request.experts:
            if (request.block, expert) not in self._held:
                return f"expert {expert} of block {request.block} is not in this slice"
        return None

    def _hello(self) -> Hello:
        blocks: list[list[int]] = [[] for _ in range(self.manifest.model.n_blocks)]
        for entry in self.manifest.experts:
            blocks[entry.block].append(entry.expert)
        return Hello(
            PROTOCOL_VERSION,
            self.name,
            self.session,
            self.manifest.bundle_id,
            tuple(tuple(block) for block in blocks),
            self.profile,
        )
