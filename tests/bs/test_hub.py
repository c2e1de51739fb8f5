from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
import pytest
from inprocess import System, open_system

from wdmoe.bs.hub import FIRST_PING_WAIT_S, FORGOTTEN_S, Hub, Joined, Left
from wdmoe.runtime.errors import DevicesMissing
from wdmoe.runtime.links import MemoryLink, Parcel
from wdmoe.runtime.messages import (
    PROTOCOL_VERSION,
    Enrol,
    Enrolled,
    ErrorReport,
    Goodbye,
    Header,
    Hello,
    Message,
    Ping,
    Welcome,
    decode,
    encode,
)

Guarded = tuple[Hub, list[Message], Callable[[str | None, Header], None]]


@pytest.fixture
def system(bundle: Path) -> Iterator[System]:
    with open_system(bundle) as opened:
        yield opened


def hello(system: System, **fields: object) -> Hello:
    first: Hello = system.services["device-0"]._hello()
    return msgspec.structs.replace(first, **fields)


def say(system: System, peer: bytes, header: Hello | Goodbye | Ping) -> list[Message]:
    """Let a new peer send one message; return what it gets back."""
    got: list[Message] = []

    def handle(frames):  # type: ignore[no-untyped-def]
        got.append(decode(frames, system.manifest.model.d_model))
        return []

    system.link.peers[peer] = handle
    system.link.deliver(peer, encode(Message(header)))
    system.hub.turn(0.0)
    system.hub.turn(0.0)
    return got


def test_devices_are_welcome_with_what_they_hold(system: System) -> None:
    assert sorted(system.hub.devices) == [f"device-{k}" for k in range(4)]
    assert system.hub.missing_experts() == [] and system.hub.missing_devices() == []
    names, owner = system.hub.owners()
    assert [names[k] for k in owner[1]] == [f"device-{k}" for k in (0, 0, 1, 1, 2, 2, 3, 3)]


def test_who_never_answers_a_ping_holds_nobody_up_for_long(system: System) -> None:
    say(system, b"mute", hello(system, device="mute", session="mute"))
    before_s = system.clock.now_s()
    system.hub.wait_for_devices(60.0)
    assert "mute" in system.hub.devices and system.clock.now_s() - before_s <= FIRST_PING_WAIT_S + 0.5


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"protocol": PROTOCOL_VERSION + 1},
            f"speaks protocol {PROTOCOL_VERSION + 1}, the base station {PROTOCOL_VERSION}",
        ),
        ({"bundle_id": "f" * 64}, "serves bundle ffffffffffff, the base station runs .* copy the device folder"),
        ({"experts": ((0,),)}, "names experts outside 2 blocks x 8 experts"),
        ({"experts": ((0,), (8,))}, "names experts outside"),
        ({"experts": ((), ())}, "holds no experts"),
        ({"device": "bs"}, "bs is a name that the base station uses itself; start it with --name"),
        ({"device": "nobody"}, "nobody is a name that the base station uses itself"),
        ({"session": "another"}, "another device of that name is connected; start it with --name"),
    ],
)
def test_a_strangers_hello_is_refused_by_name_and_the_others_go_on(
    system: System, fields: dict[str, object], words: str
) -> None:
    (answer,) = say(system, b"stranger", hello(system, **fields))
    # A name that is taken may be the device's own last life: it may ask again.
    assert isinstance(answer.header, ErrorReport) and answer.header.final == ("session" not in fields)
    assert re.search(words, answer.header.text)
    assert sum(system.hub.refused.counts.values()) == 1
    assert len(system.hub.devices) == 4 and system.hub.missing_experts() == []


def test_frames_that_are_no_message_are_counted_and_answered(system: System) -> None:
    system.link.deliver(b"device-0", [b"garbage"])
    assert system.hub.turn(0.0) == []
    assert system.hub.refused.counts == {"malformed": 1}


def test_who_was_not_introduced_is_told_to_say_hello(system: System) -> None:
    (answer,) = say(system, b"stranger", Ping(1))
    assert answer.header == ErrorReport("not known here, say hello first")


class OneFriend:
    """A roster of one device; keeps what was asked of it."""

    def __init__(self, key: str, name: str) -> None:
        self.names = {key: name}

    def name_of(self, key: str | None) -> str | None:
        return self.names.get(key or "")

    def why_not(self, key: str | None) -> str:
        return "unknown key"

    def enrol(self, device: str, secret: bytes, key: str | None) -> str | None:
        if secret != b"s" * 16 or key is None:
            return "this token is unknown or was spent"
        self.names[key] = device
        return None


@pytest.fixture
def guarded(system: System) -> Guarded:
    """A hub that knows one key, what a peer got from it, and how to send it something under a key."""
    got: list[Message] = []
    inbox: list[Parcel] = []

    class Wire(MemoryLink):
        def exchange(self, outgoing: Iterable[Parcel], timeout_s: float) -> list[Parcel]:
            got.extend(decode(parcel.frames, system.manifest.model.d_model) for parcel in outgoing)
            arrived, inbox[:] = list(inbox), []
            return arrived

    hub = Hub(Wire({}, system.clock), system.manifest, system.clock, OneFriend("friend", "device-0"))

    def send(key: str | None, header: Header) -> None:
        inbox.append(Parcel(b"peer", encode(Message(header)), key))
        hub.turn(0.0)
        hub.turn(0.0)

    return hub, got, send


def test_a_strangers_key_may_only_enrol(system: System, guarded: Guarded) -> None:
    hub, got, send = guarded
    for header in (hello(system), Ping(1)):
        send("stranger", header)
        assert got.pop().header == ErrorReport("unknown key", final=True)
    send("stranger", Enrol(PROTOCOL_VERSION, "device-1", b"x" * 16))
    assert got.pop().header == ErrorReport("device-1: this token is unknown or was spent", final=True)
    send("stranger", Enrol(9, "device-1", b"s" * 16))
    assert "speaks protocol 9" in got.pop().header.text  # type: ignore[union-attr]
    assert hub.devices == {} and hub.refused.described()["unknown key"] == 2
    send("stranger", Enrol(PROTOCOL_VERSION, "device-1", b"s" * 16))
    assert got.pop().header == Enrolled("device-1")
    send("stranger", hello(system, device="device-1"))
    assert "device-1" in hub.devices


def test_a_key_cannot_take_another_devices_name(system: System, guarded: Guarded) -> None:
    hub, got, send = guarded
    send("friend", hello(system, device="device-3"))
    assert "enrolled as device-0, the device calls itself device-3" in got.pop().header.text  # type: ignore[union-attr]
    send("friend", hello(system))
    assert hub.devices["device-0"].key == "friend"


def test_a_device_that_is_revoked_is_dropped_while_running(system: System, guarded: Guarded) -> None:
    hub, got, send = guarded
    send("friend", hello(system))
    hub._roster.names.clear()  # type: ignore[union-attr]
    got.clear()
    system.clock.advance(2.0)
    hub.turn(0.0)
    hub.turn(0.0)
    assert hub.devices == {}
    assert ErrorReport("unknown key", final=True) in [message.header for message in got]


def test_a_goodbye_leaves_its_experts_without_a_device(system: System) -> None:
    system.link.deliver(b"device-2", encode(Message(Goodbye("empty battery"))))
    assert system.hub.turn(0.0) == [Left("device-2", "empty battery")]
    assert system.hub.missing_devices() == [2]
    with pytest.raises(DevicesMissing, match=r"4 experts are served by nobody after 3 s: no device-2; connected: dev"):
        system.hub.wait_for_devices(3.0)
    with pytest.raises(DevicesMissing, match="expert 4 of block 0"):
        system.hub.owners()


def test_a_goodbye_is_answered_once(system: System) -> None:
    got = say(system, b"device-2", Goodbye("empty battery"))
    assert [message.header for message in got] == [Goodbye("heard")]
    got = say(system, b"device-2", Goodbye("empty battery"))
    assert [message.header for message in got] == [ErrorReport("not known here, say hello first")]


def test_whoever_leaves_as_the_base_station_closes_is_still_answered(system: System) -> None:
    got: list[Header] = []

    def handle(frames):  # type: ignore[no-untyped-def]
        got.append(decode(frames, system.manifest.model.d_model).header)
        return []

    for k in range(4):
        system.link.peers[f"device-{k}".encode()] = handle
        system.link.deliver(f"device-{k}".encode(), encode(Message(Goodbye("power off"))))
    system.hub.turn(0.0)
    system.hub.close("done")
    assert got == 4 * [Goodbye("heard")]


def test_one_connection_is_one_device(system: System) -> None:
    for number in range(5):
        say(system, b"chameleon", hello(system, device=f"name-{number}", session=f"session-{number}"))
    assert sorted(system.hub.devices) == [*(f"device-{k}" for k in range(4)), "name-4"]
    system.link.deliver(b"chameleon", encode(Message(hello(system, device="last", session="last"))))
    assert system.hub.turn(0.0) == [Joined("last")]
    assert system.hub.turn(0.0) == [Left("name-4", "calls itself last now")]
    say(system, b"chameleon", Goodbye("done"))
    assert sorted(system.hub.devices) == [f"device-{k}" for k in range(4)]


def test_no_more_devices_than_can_be_looked_after_are_taken(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wdmoe.bs.hub.MAX_DEVICES", 5)
    say(system, b"fifth", hello(system, device="fifth", session="fifth"))
    (answer,) = say(system, b"sixth", hello(system, device="sixth", session="sixth"))
    assert answer.header == ErrorReport("sixth: 5 devices are connected, which is as many as there may be")
    assert len(system.hub.devices) == 5 and system.hub.refused.counts == {"full": 1}
    (welcome, _) = say(system, b"new connection", hello(system))  # who is there already may come back
    assert isinstance(welcome.header, Welcome)


def test_a_device_that_was_silent_for_a_minute_is_gone(system: System) -> None:
    system.link.peers[b"device-2"] = lambda frames: []
    events = []
    for _ in range(round(FORGOTTEN_S) + 2):
        system.clock.advance(1.0)
        events += system.hub.turn(0.0)
        system.hub.turn(0.0)
    assert events == [Left("device-2", "silent for 61 s")]
    assert sorted(system.hub.devices) == ["device-0", "device-1", "device-3"]
    (answer,) = say(system, b"device-2", Ping(1))
    assert answer.header == ErrorReport("not known here, say hello first")
    assert isinstance(say(system, b"device-2", hello(system, device="device-2"))[0].header, Welcome)


def test_silence_while_the_loop_stood_still_says_nothing(system: System) -> None:
    system.clock.advance(3600.0)
    assert system.hub.turn(0.0) == [] and len(system.hub.devices) == 4


def test_the_same_session_may_come_back_at_once_and_keeps_its_corrections(system: System) -> None:
    tracker = system.hub.devices["device-0"].latency
    (welcome, _) = say(system, b"new connection", hello(system))
    assert isinstance(welcome.header, Welcome)
    assert system.hub.devices["device-0"].peer == b"new connection"
    assert system.hub.devices["device-0"].latency is tracker


def test_a_restarted_device_takes_its_name_back_once_the_old_one_is_silent(system: System) -> None:
    system.link.peers[b"device-0"] = lambda frames: []
    system.clock.advance(10.0)
    system.link.deliver(b"fresh start", encode(Message(hello(system, session="second"))))
    assert Joined("device-0") in system.hub.turn(0.0)
    assert system.hub.devices["device-0"].session == "second"


def test_round_trips_are_measured_with_pings(system: System) -> None:
    handler = system.link.peers[b"device-1"]

    def slow(frames):  # type: ignore[no-untyped-def]
        system.clock.advance(0.025)
        return handler(frames)

    system.link.peers[b"device-1"] = slow
    tracker = system.hub.devices["device-1"].latency
    tracker.round_trip_ms = 0.0
    system.clock.advance(1.0)
    system.hub.turn(0.0)
    assert tracker.model().round_trip_ms == pytest.approx(25.0)


def test_closing_sends_everyone_a_goodbye(system: System) -> None:
    for service in system.services.values():
        service.welcomed = True
    system.hub.close("done")
    assert not any(service.welcomed for service in system.services.values())
