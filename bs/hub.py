"""Who is connected: hellos, heartbeats and goodbyes are dealt with here; the rest is handed on.

The hub owns the link. Above it there are devices with names, not peers; below it there are frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from wdmoe.bs.fleet import BS_HOLDS, NOBODY
from wdmoe.bs.latency import LatencyTracker
from wdmoe.bs.refusals import Kind, Refusals
from wdmoe.bs.roster import Roster
from wdmoe.runtime.clock import Clock
from wdmoe.runtime.departures import Departures, Pace
from wdmoe.runtime.errors import DevicesMissing, ProtocolError
from wdmoe.runtime.links import Link, Parcel, Peer
from wdmoe.runtime.manifest import BsManifest
from wdmoe.runtime.messages import (
    PROTOCOL_VERSION,
    Enrol,
    Enrolled,
    ErrorReport,
    ExpertReply,
    Goodbye,
    Hello,
    Message,
    Ping,
    Pong,
    Welcome,
    decode,
    encode,
)

HEARTBEAT_S = 1.0
GOODBYE_WAIT_S = 0.5
FIRST_PING_WAIT_S = 2.0
KEPT_PINGS = 16  # unanswered ones, of each device
FORGOTTEN_S = 60.0  # a device that has been silent for so long, though pinged, counts as gone
MAX_DEVICES = 1024  # connected at the same time: each is pinged, and anybody may join an unencrypted link


@dataclass(slots=True)
class Device:
    """A connected device."""

    name: str
    peer: Peer
    key: str | None  # its public key where the link is encrypted
    session: str
    experts: frozenset[tuple[int, int]]  # (block, expert)
    latency: LatencyTracker
    last_heard_s: float
    pace: Pace = field(default_factory=Pace)  # of what is sent to it on a share of a real link
    pings: dict[int, float] = field(default_factory=dict)  # nonce -> when it was sent


@dataclass(frozen=True, slots=True)
class Replied:
    """A device answered a request."""

    device: str
    message: Message


@dataclass(frozen=True, slots=True)
class Complained:
    """A device reported an error, about one request or about all."""

    device: str
    text: str
    request_id: int | None


@dataclass(frozen=True, slots=True)
class Joined:
    """A device said hello: for the first time, or again after a restart."""

    device: str


@dataclass(frozen=True, slots=True)
class Left:
    """A device said goodbye."""

    device: str
    reason: str


Event = Replied | Complained | Joined | Left


class Hub:
    """The connected devices, and the one loop turn that keeps them."""

    def __init__(
        self, link: Link, manifest: BsManifest, clock: Clock, roster: Roster | None = None, spin_s: float = 0.0
    ) -> None:
        """Take over a link.

        Args:
            link: open, with devices dialling it.
            manifest: of the model; devices of another bundle are refused.
            clock: for heartbeats.
            roster: who may speak on an encrypted link; None: the link is not encrypted and anybody may.
            spin_s: how long before a message leaves not to sleep any more, where the link's sleep is not exact.
        """
        self.devices: dict[str, Device] = {}
        self.changes = 0  # of `devices`
        self.refused = Refusals()
        self.clock = clock
        self.last_turn_s = clock.now_s()
        self._link = link
        self._manifest = manifest
        self._roster = roster
        self._peers: dict[Peer, str] = {}
        self._outbox: list[Parcel] = []
        self._later: Departures[Parcel] = Departures()
        self._spin_s = spin_s
        self._left: list[Event] = []  # since the last turn, by our own decision
        self._next_ping_s = clock.now_s()
        self._nonce = 0
        self._closing = False

    def send(self, device: str, message: Message, leaves_s: float = float("-inf")) -> None:
        """Queue a message for the next turn from a moment on; dropped if the device is gone."""
        if (known := self.devices.get(device)) is not None:
            parcel = Parcel(known.peer, encode(message))
            if leaves_s > self.clock.now_s():
                self._later.hold(parcel, leaves_s)
            else:
                self._outbox.append(parcel)

    def turn(self, timeout_s: float) -> list[Event]:
        """Send what is queued, wait at most `timeout_s` for something to come, and tell what it was."""
        self.last_turn_s = now_s = self.clock.now_s()
        if now_s >= self._next_ping_s:
            self._ping_all(now_s)
        outgoing, self._outbox = [*self._outbox, *self._later.due(now_s)], []
        timeout_s = self._later.wait_s(now_s, min(timeout_s, max(0.0, self._next_ping_s - now_s)), self._spin_s)
        arrived = self._link.exchange(outgoing, timeout_s)
        left, self._left = self._left, []
        return [*left, *(event for parcel in arrived if (event := self._take(parcel)) is not None)]

    def wake(self) -> None:
        """Let a waiting turn return early; may be called from any thread."""
        self._link.wake()

    def close(self, reason: str) -> None:
        """Say goodbye to every device and wait a moment for its answer, so that it looks for the next base station.

        Without the wait, what a device sends meanwhile would be unread when the socket closes; TCP then resets the
        connection, and the goodbye is lost with it.
        """
        for name in self.devices:
            self.send(name, Message(Goodbye(reason)))
        self._closing = True
        self._next_ping_s = float("inf")
        self.turn(0.0)  # also for those who have just left and wait for an answer
        deadline_s = self.clock.now_s() + GOODBYE_WAIT_S
        while self.devices and (left_s := deadline_s - self.clock.now_s()) > 0:
            self.turn(left_s)

    def missing_experts(self) -> list[tuple[int, int]]:
        """Return the (block, expert) that no connected device serves."""
        served: set[tuple[int, int]] = set().union(*(device.experts for device in self.devices.values()))
        model = self._manifest.model
        return [
            (block, expert)
            for block in range(model.n_blocks)
            for expert in range(model.n_experts)
            if (block, expert) not in served
        ]

    def missing_devices(self) -> list[int]:
        """Return the numbers of the device folders that would serve the missing experts."""
        placement = self._manifest.placement
        return sorted({placement[block][expert][0] for block, expert in self.missing_experts()})

    def wait_for_devices(self, timeout_s: float, on_change: Callable[[], None] = lambda: None) -> None:
        """Wait until every expert is served, then a moment until every device has answered a ping.

        Raises:
            DevicesMissing: some are still missing when the time is up; says which.
        """
        now_s = self.clock.now_s()
        deadline_s, complete_s = now_s + timeout_s, float("inf")
        while (missing := self.missing_devices()) or any(not d.latency.round_trip_ms for d in self.devices.values()):
            now_s = self.clock.now_s()
            complete_s = float("inf") if missing else min(complete_s, now_s)
            # Whoever never answers must not hold up those that do.
            left_s = min(deadline_s, complete_s + FIRST_PING_WAIT_S) - now_s
            if left_s <= 0:
                break
            if self.turn(min(left_s, 0.25)):
                on_change()
        if missing:
            folders = ", ".join(f"device-{k}" for k in missing)
            reasons = "".join(f"; refused {n} x: {text}" for text, n in self.refused.described().items())
            raise DevicesMissing(
                f"{len(self.missing_experts())} experts are served by nobody after {timeout_s:g} s: no {folders}; "
                f"connected: {', '.join(sorted(self.devices)) or 'none'}{reasons}. "
                "Start `wdmoe-device --bundle FOLDER --bs ADDRESS` for each missing folder"
            )

    def owners(self) -> tuple[tuple[str, ...], list[list[int]]]:
        """Say who serves which expert now.

        Returns:
            the names of the devices in order, and [block][expert] -> index into them (of several, the first).

        Raises:
            DevicesMissing: an expert is served by nobody.
        """
        names = tuple(sorted(self.devices))
        if missing := self.missing_experts():
            block, expert = missing[0]
            raise DevicesMissing(f"expert {expert} of block {block} is served by no connected device")
        model = self._manifest.model
        owner = [
            [
                next(k for k, name in enumerate(names) if (block, expert) in self.devices[name].experts)
                for expert in range(model.n_experts)
            ]
            for block in range(model.n_blocks)
        ]
        return names, owner

    def _take(self, parcel: Parcel) -> Event | None:
        try:
            message = decode(parcel.frames, self._manifest.model.d_model)
        except ProtocolError as error:
            self._refuse(parcel.peer, "malformed", f"malformed message: {error}", final=False)
            return None
        header = message.header
        known = self.devices.get(self._peers.get(parcel.peer, ""))
        if isinstance(header, ExpertReply) and known is not None and parcel.key == known.key:
            # The most frequent, and so the shortest way; a key that is revoked is noticed at the next heartbeat.
            known.last_heard_s = self.clock.now_s()
            return Replied(known.name, message)
        if self._roster is not None:
            if isinstance(header, Enrol):
                self._on_enrol(parcel, header)
                return None
            if (enrolled := self._roster.name_of(parcel.key)) is None:
                self._refuse(parcel.peer, "key", self._roster.why_not(parcel.key), final=True)
                return None
            if isinstance(header, Hello) and header.device != enrolled:
                text = (
                    f"this key is enrolled as {enrolled}, the device calls itself {header.device}; start it with --name"
                )
                self._refuse(parcel.peer, "name", text, final=True)
                return None
        if isinstance(header, Hello):
            return self._on_hello(parcel, header)
        name = self._peers.get(parcel.peer)
        if name is None:
            self._refuse(parcel.peer, "not introduced", "not known here, say hello first", final=False)
            return None
        device = self.devices[name]
        if parcel.key != device.key:
            self._refuse(parcel.peer, "key", f"not the key of {name}", final=True)
            return None
        device.last_heard_s = self.clock.now_s()
        match header:
            case ErrorReport(text=text, request_id=request_id):
                return Complained(name, text, request_id)
            case Pong(nonce=nonce):
                if (sent_s := device.pings.pop(nonce, None)) is not None:
                    device.latency.observe_round_trip((device.last_heard_s - sent_s) * 1e3)
                return None
            case Goodbye(reason=reason):
                if not self._closing:  # otherwise it is the answer to ours
                    self.send(name, Message(Goodbye("heard")))
                self._forget(name)
                return Left(name, reason)
            case other:
                text = f"a base station does not take {type(other).__name__}"
                self._refuse(parcel.peer, "misplaced", text, final=False)
                return None

    def _on_enrol(self, parcel: Parcel, enrol: Enrol) -> None:
        assert self._roster is not None
        if enrol.protocol != PROTOCOL_VERSION:
            reason: str | None = f"speaks protocol {enrol.protocol}, the base station {PROTOCOL_VERSION}"
        else:
            reason = self._roster.enrol(enrol.device, enrol.secret, parcel.key)
        if reason is not None:
            self._refuse(parcel.peer, "enrolment", f"{enrol.device}: {reason}", final=True)
        else:
            self._outbox.append(Parcel(parcel.peer, encode(Message(Enrolled(enrol.device)))))

    def _on_hello(self, parcel: Parcel, hello: Hello) -> Event | None:
        peer = parcel.peer
        if (refusal := self._refusal(hello)) is not None:
            kind, reason = refusal
            self._refuse(peer, kind, f"{hello.device}: {reason}", final=True)
            return None
        known = self.devices.get(hello.device)
        now_s = self.clock.now_s()
        if known is None and len(self.devices) >= MAX_DEVICES:
            text = f"{hello.device}: {MAX_DEVICES} devices are connected, which is as many as there may be"
            self._refuse(peer, "full", text, final=False)
            return None
        if known is not None and known.session != hello.session and now_s - known.last_heard_s < 3 * HEARTBEAT_S:
            # Not final: the other may be its own last life, crashed a moment ago, and soon count as silent.
            text = f"{hello.device}: another device of that name is connected; start it with --name"
            self._refuse(peer, "name", text, final=False)
            return None
        tracker = known.latency if known is not None and known.session == hello.session else None
        if known is not None:
            self._forget(hello.device)
        if (other := self._peers.get(peer)) is not None:  # one connection, one device
            self._forget(other)
            self._left.append(Left(other, f"calls itself {hello.device} now"))
        self.devices[hello.device] = Device(
            hello.device,
            peer,
            parcel.key,
            hello.session,
            frozenset((block, expert) for block, held in enumerate(hello.experts) for expert in held),
            tracker or LatencyTracker(hello.profile),
            now_s,
        )
        self._peers[peer] = hello.device
        self.changes += 1
        self.send(hello.device, Message(Welcome(PROTOCOL_VERSION, HEARTBEAT_S)))
        self._ping(self.devices[hello.device], now_s)
        return Joined(hello.device)

    def _refusal(self, hello: Hello) -> tuple[Kind, str] | None:
        manifest, profile = self._manifest, hello.profile
        model = manifest.model
        if hello.protocol != PROTOCOL_VERSION:
            return "protocol", (
                f"speaks protocol {hello.protocol}, the base station {PROTOCOL_VERSION}; install the same version"
            )
        if hello.bundle_id != manifest.bundle_id:
            return "bundle", (
                f"serves bundle {hello.bundle_id[:12]}, the base station runs {manifest.bundle_id[:12]} "
                f"({model.name}); copy the device folder of this bundle"
            )
        if hello.device in (BS_HOLDS, NOBODY):
            return "name", f"{hello.device} is a name that the base station uses itself; start it with --name"
        if not any(hello.experts):
            return "experts", "holds no experts"
        if len(hello.experts) != model.n_blocks or any(e >= model.n_experts for b in hello.experts for e in b):
            return "experts", f"names experts outside {model.n_blocks} blocks x {model.n_experts} experts"
        if (profile.d_model, profile.d_ff) != (model.d_model, model.d_ff):
            return "profile", (
                f"profile is of a {profile.d_model}x{profile.d_ff} expert, expected {model.d_model}x{model.d_ff}"
            )
        return None

    def _refuse(self, peer: Peer, kind: Kind, text: str, final: bool) -> None:
        self.refused.add(kind, text)
        self._outbox.append(Parcel(peer, encode(Message(ErrorReport(text[:4096], final=final)))))

    def _forget(self, name: str) -> None:
        self.changes += 1
        self._peers.pop(self.devices.pop(name).peer, None)

    def _ping_all(self, now_s: float) -> None:
        self._next_ping_s = now_s + HEARTBEAT_S
        self._forget_revoked()
        self._forget_silent(now_s)
        for device in self.devices.values():
            self._ping(device, now_s)

    def _forget_revoked(self) -> None:
        if self._roster is None:
            return
        for device in list(self.devices.values()):
            if self._roster.name_of(device.key) != device.name:
                self._refuse(device.peer, "key", self._roster.why_not(device.key), final=True)
                self._forget(device.name)
                self._left.append(Left(device.name, "its key was revoked"))

    def _forget_silent(self, now_s: float) -> None:
        for device in list(self.devices.values()):
            # Pings are only sent while the loop turns, so old silence alone proves nothing.
            silent_s = now_s - device.last_heard_s
            if len(device.pings) == KEPT_PINGS and silent_s > FORGOTTEN_S:
                self._forget(device.name)
                self._left.append(Left(device.name, f"silent for {silent_s:.0f} s"))

    def _ping(self, device: Device, now_s: float) -> None:
        self._nonce += 1
        device.pings[self._nonce] = now_s
        while len(device.pings) > KEPT_PINGS:  # a silent device must not fill the memory
            del device.pings[next(iter(device.pings))]
        self.send(device.name, Message(Ping(self._nonce)))
