"""Damage, as strangers, bad links and bad disks do it. Used by tests/test_fuzz.py and scripts/bench/fuzz.py.

`lawful` is docs/protocol.md once more, written without the code that it checks: plain values, no structs. A frame is
*accepted* if it was acted upon though it must not be: a message that is not lawful was understood; a stranger's
message, lawful or not, changed who is connected or what a run answers; a device's duplicate, replayed or foreign reply
changed what a run answers; a device ran what it does not hold. NOTE: a lawful message with other numbers in it than its
sender wrote is what encryption protects from (a damaged byte ends the connection), not what decoding can see.
"""

from __future__ import annotations

import contextlib
import math
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq
from guarded import Guarded, served
from inprocess import System, make_service, open_system, run_sequence
from processes import command, stop

from wdmoe.bs.held import HeldExperts
from wdmoe.device.service import DeviceService
from wdmoe.runtime.clock import RealClock, VirtualClock
from wdmoe.runtime.errors import BundleError, ProtocolError
from wdmoe.runtime.keys import make_key
from wdmoe.runtime.links import Parcel
from wdmoe.runtime.manifest import BsManifest, DeviceManifest, read_manifest, verify_files
from wdmoe.runtime.messages import (
    PROTOCOL_VERSION,
    Enrol,
    Enrolled,
    ErrorReport,
    ExpertReply,
    ExpertRequest,
    Goodbye,
    Hello,
    Message,
    Ping,
    Pong,
    Welcome,
    decode,
    encode,
)

Frames = list[bytes]
PROMPT = list(b"How does one keep bread fresh?")
_KEPT = 20  # descriptions of each kind of trouble


@dataclass
class Tally:
    """What happened to the frames, or to the files."""

    counts: Counter[str] = field(default_factory=Counter)
    crashes: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)

    def crash(self, what: str, error: BaseException) -> None:
        self.counts["crashes"] += 1
        self.crashes += [f"{what}: {type(error).__name__}: {str(error)[:300]}"][: _KEPT - len(self.crashes)]

    def accept(self, what: str) -> None:
        self.counts["accepted"] += 1
        self.accepted += [what[:400]][: _KEPT - len(self.accepted)]

    def hang(self, what: str) -> None:
        self.counts["hangs"] += 1
        self.hangs.append(what)


# -- frames --------------------------------------------------------------------------------------------------------------


def recorded_frames(bundle: Path) -> tuple[list[Frames], int]:
    """Return every message of a small run in both directions, those that it lacks as well; and the width of a row."""
    seen: list[Frames] = []
    with open_system(bundle) as system:
        for peer, handler in list(system.link.peers.items()):

            def recording(frames: Sequence[Any], handler: Any = handler) -> Iterable[Sequence[Any]]:
                seen.append([bytes(frame) for frame in frames])
                for answer in handler(frames):
                    seen.append([bytes(frame) for frame in answer])
                    yield answer

            system.link.peers[peer] = recording
        system.clock.advance(1.5)
        run_sequence(system, PROMPT)
        seen += [[bytes(frame) for frame in encode(Message(s._hello()))] for s in system.services.values()]
        d_model = system.manifest.model.d_model
    others = (
        Enrol(PROTOCOL_VERSION, "attic", b"0123456789abcdef"), Enrolled("attic"), Welcome(PROTOCOL_VERSION, 1.0),
        Ping(3), Pong(3), ErrorReport("no such expert", 4), Goodbye("power off"),
    )  # fmt: skip
    seen += [[bytes(frame) for frame in encode(Message(header))] for header in others]
    return seen, d_model


_DEEP = b"\x91" * 5000 + b"\xc0"  # five thousand lists in one another
_ODD: list[Any] = [
    None, True, -1, 0, 1, 2**31 - 1, 2**31, 2**63, 2**64 - 1, -(2**63), 1.5, math.nan, math.inf, "", "x" * 5000, b"",
    b"\0" * 64, [], {}, [[[[]]]], [2**31] * 9, {"type": "reply"}, "../../etc/passwd", "reply", "request", "fp16",
    "\ud7ff\x00", "device-0",
]  # fmt: skip
_TYPES = [
    "enrol",
    "enrolled",
    "hello",
    "welcome",
    "request",
    "reply",
    "ping",
    "pong",
    "error",
    "goodbye",
    "batch",
    7,
    None,
]


def damaged(rng: np.random.Generator, corpus: Sequence[Frames]) -> Frames:
    """Return frames that somebody might send: noise, a message with something wrong in it, or an old one again."""
    frames = list(corpus[int(rng.integers(len(corpus)))])
    kind = int(rng.integers(14))
    at = int(rng.integers(len(frames)))
    match kind:
        case 0:
            return [rng.bytes(int(rng.integers(0, 400))) for _ in range(int(rng.integers(0, 5)))]
        case 1 | 2:
            frames[at] = _flipped(rng, frames[at], int(rng.integers(1, 5)))
        case 3:
            frames[at] = frames[at][: int(rng.integers(len(frames[at]) + 1))]
        case 4:
            frames[at] += rng.bytes(int(rng.integers(1, 64)))
        case 5:
            other = corpus[int(rng.integers(len(corpus)))][0]
            cut = int(rng.integers(len(frames[0]) + 1))
            frames[0] = frames[0][:cut] + other[cut:]
        case 6:
            frames = [frames[i] for i in rng.integers(0, len(frames), int(rng.integers(0, 5)))]
        case 7:
            frames = [*frames, *corpus[int(rng.integers(len(corpus)))]]
        case 8:
            frames = [frames[0], *corpus[int(rng.integers(len(corpus)))][1:]]
        case 9 if len(frames) == 2:
            rows = np.frombuffer(frames[1], "<f4").copy()
            rows[int(rng.integers(len(rows)))] = rng.choice([np.nan, np.inf, -np.inf, 1e30])
            frames[1] = rows.tobytes()
        case 10 if rng.random() < 0.05:
            frames[0] = _DEEP if rng.random() < 0.5 else b"\xdd\xff\xff\xff\xff" + rng.bytes(20)
        case 11 if rng.random() < 0.02:
            frames[0] = _with_field(rng, frames[0], "x" * (2 << 20))
        case _:
            for _ in range(int(rng.integers(1, 3))):
                frames[0] = _with_field(rng, frames[0], _ODD[int(rng.integers(len(_ODD)))])
    return frames


def _flipped(rng: np.random.Generator, raw: bytes, bits: int) -> bytes:
    changed = bytearray(raw)
    for _ in range(bits if raw else 0):
        changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _with_field(rng: np.random.Generator, header: bytes, value: Any) -> bytes:
    """Change, drop or add one field, at any depth."""
    try:
        fields = msgspec.msgpack.decode(header)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, RecursionError):
        return header
    if not isinstance(fields, dict) or not fields:
        return header
    target: Any = fields
    keys = list(fields)
    key: Any = keys[int(rng.integers(len(keys)))]
    while isinstance(target[key], dict | list) and target[key] and rng.random() < 0.8:
        target = target[key]
        keys = list(target) if isinstance(target, dict) else list(range(len(target)))
        key = keys[int(rng.integers(len(keys)))]
    match int(rng.integers(8)):
        case 0:
            del target[key]
        case 1:
            fields["surprise" if rng.random() < 0.5 else "rows"] = value
        case 2:
            fields["type"] = _TYPES[int(rng.integers(len(_TYPES)))]
        case 3 if type(target[key]) is int:
            target[key] = max(-(2**63), min(2**64 - 1, target[key] + int(rng.choice([-1, 1, 1000]))))
        case _:
            target[key] = value
    return msgspec.msgpack.encode(fields)


def lawful(frames: Sequence[bytes], d_model: int) -> str | None:
    """Return the type of the message that frames are by docs/protocol.md; None: they are none."""
    if not 1 <= len(frames) <= 2 or len(frames[0]) > 4 << 20:
        return None
    try:
        header = msgspec.msgpack.decode(frames[0])
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, RecursionError):
        return None
    if not isinstance(header, dict) or not isinstance(kind := header.pop("type", None), str):
        return None
    optional = {"request_id", "final"} if kind == "error" else set()
    rules = _RULES.get(kind)
    if rules is None or not set(header) <= set(rules) or not set(rules) - optional <= set(header):
        return None
    if not all(rules[name](value) for name, value in header.items()):
        return None
    if kind not in ("request", "reply"):
        return kind if len(frames) == 1 else None
    row_bytes = {"fp32": 4 * d_model, "fp16": 2 * d_model, "int8": 4 + d_model}[header["wire"]]
    if len(frames) != 2 or len(frames[1]) != header["rows"] * row_bytes:
        return None
    if header["wire"] == "int8":
        scales = [struct.unpack("<f", frames[1][at : at + 4])[0] for at in range(0, len(frames[1]), row_bytes)]
        if not all(0 <= scale <= 3.4028234e38 / 128 for scale in scales):
            return None
    return kind if kind == "reply" or _groups_hold(header) else None


def _groups_hold(header: dict[str, Any]) -> bool:
    experts, counts, total = header["experts"], [int(n) for n in header["counts"]], int(sum(header["counts"]))
    if not experts or len(experts) != len(counts) or len(set(experts)) != len(experts):
        return False
    if len(header["index"]) != 4 * total or len(header["weights"]) != 4 * total:
        return False
    index = struct.unpack(f"<{total}I", header["index"])
    at = 0
    for count in counts:
        part = index[at : at + count]
        if list(part) != sorted(set(part)) or part[-1] >= header["rows"]:
            return False
        at += count
    return all(math.isfinite(weight) for weight in struct.unpack(f"<{total}f", header["weights"]))


def _whole(low: float, high: float) -> Callable[[Any], bool]:
    # 3.0 is the number 3.
    return lambda v: not isinstance(v, bool) and isinstance(v, int | float) and low <= v <= high and v == int(v)


def _number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float)


def _text(limit: float) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, str) and len(v) <= limit


def _list_of(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, list) and all(rule(entry) for entry in v)


def _name(value: Any) -> bool:
    return isinstance(value, str) and re.search(r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$", value) is not None


def _profile(value: Any) -> bool:
    return isinstance(value, dict) and _list_of(lambda p: isinstance(p, dict | list))(value.get("points"))


_index, _rows = _whole(0, 2**31 - 1), _whole(1, 8192)
_any_int = _whole(-(2**63), 2**64)
_RULES: dict[str, dict[str, Callable[[Any], bool]]] = {
    "enrol": {"protocol": _any_int, "device": _name, "secret": lambda v: isinstance(v, bytes) and len(v) == 16},
    "enrolled": {"device": _name},
    "hello": {
        "protocol": _any_int, "device": _name, "session": _name, "bundle_id": _text(math.inf),
        "experts": _list_of(_list_of(_index)), "profile": _profile,
    },
    "welcome": {"protocol": _any_int, "heartbeat_s": lambda v: _number(v) and 0 < v <= 3600},
    "request": {
        "request_id": _index, "block": _index, "rows": _rows, "wire": lambda v: v in ("fp32", "fp16", "int8"),
        "experts": _list_of(_index), "counts": _list_of(_rows), "index": lambda v: isinstance(v, bytes),
        "weights": lambda v: isinstance(v, bytes),
    },
    "reply": {
        "request_id": _index, "rows": _rows, "wire": lambda v: v in ("fp32", "fp16", "int8"), "queue_us": _index,
        "compute_us": _index,
    },
    "ping": {"nonce": _index},
    "pong": {"nonce": _index},
    "error": {
        "text": _text(4096), "request_id": lambda v: v is None or _index(v), "final": lambda v: isinstance(v, bool),
    },
    "goodbye": {"reason": _text(4096)},
}  # fmt: skip


def fuzz_decoding(rng: np.random.Generator, corpus: Sequence[Frames], d_model: int, count: int, tally: Tally) -> None:
    """Decode damaged frames: each is refused by a ProtocolError, or is a lawful message."""
    for _ in range(count):
        frames = damaged(rng, corpus)
        kind = lawful(frames, d_model)
        tally.counts["frames"] += 1
        try:
            message = decode(frames, d_model)
        except ProtocolError as error:
            tally.counts["refused"] += 1
            tally.counts["lawful_refused"] += kind is not None and kind != "hello"  # a profile has rules of its own
            if len(str(error)) > 4000:
                tally.crash("decode", ValueError(f"a refusal of {len(str(error))} characters"))
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            tally.crash("decode", error)
        else:
            tally.counts["understood"] += 1
            if kind is None:
                tally.accept(f"decode took {type(message.header).__name__}: {frames[0][:200]!r}")


def fuzz_service(rng: np.random.Generator, corpus: Sequence[Frames], folder: Path, count: int, tally: Tally) -> None:
    """Throw damaged frames at a device: it answers lawfully or not at all, and runs only what it holds."""
    service = make_service(folder, VirtualClock())
    d_model = service.manifest.model.d_model
    held = {(entry.block, entry.expert) for entry in service.manifest.experts}
    for _ in range(count):
        frames = damaged(rng, corpus)
        tally.counts["frames"] += 1
        service.refused, service.welcomed = None, True
        try:
            try:
                message = decode(frames, d_model)
            except ProtocolError as error:
                tally.counts["refused"] += 1
                answers = service.on_malformed(error)
            else:
                tally.counts["understood"] += 1
                answers, job = service.on_message(message)
                if job is not None:
                    header = message.header
                    if not isinstance(header, ExpertRequest) or any(
                        (header.block, e) not in held for e in header.experts
                    ):
                        tally.accept(f"a device runs {frames[0][:200]!r}")
                    answers = [*answers, job.run()]
            for answer in answers:
                if lawful([bytes(frame) for frame in encode(answer)], d_model) is None:
                    tally.crash("device", ValueError(f"an answer that is no message: {str(answer.header)[:200]}"))
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            tally.crash("device", error)


class _Friends:
    """A roster in memory: the key of a device is its name."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)

    def name_of(self, key: str | None) -> str | None:
        return key if key in self.names else None

    def why_not(self, key: str | None) -> str:
        return "unknown key"

    def enrol(self, device: str, secret: bytes, key: str | None) -> str | None:
        return "this token is unknown or was spent"


class _NoisyLink:
    """The link of a system with strangers on it, and with devices that stutter."""

    def __init__(self, system: System, rng: np.random.Generator, corpus: Sequence[Frames], tally: Tally) -> None:
        self._inner, self._rng, self._corpus, self._tally = system.link, rng, corpus, tally
        self._d_model = system.manifest.model.d_model
        self._old: list[tuple[bytes, Frames]] = []  # replies, with who sent them
        self.left = 0  # frames to throw in

    def exchange(self, outgoing: Iterable[Parcel], timeout_s: float) -> list[Parcel]:
        arrived: list[Parcel] = []
        for parcel in self._inner.exchange(outgoing, timeout_s):
            arrived.append(Parcel(parcel.peer, parcel.frames, parcel.peer.decode()))
            frames = [bytes(frame) for frame in parcel.frames]
            if parcel.peer.startswith(b"device-") and len(frames) == 2:
                self._old = [*self._old[-50:], (parcel.peer, frames)]
        for _ in range(min(self.left, 40)):
            self.left -= 1
            self._tally.counts["frames"] += 1
            arrived.insert(int(self._rng.integers(len(arrived) + 1)), self._noise())
        return arrived

    def _noise(self) -> Parcel:
        rng = self._rng
        kind = int(rng.integers(6))
        if kind < 3:  # a stranger: with something damaged, or with what it heard others say
            frames = damaged(rng, self._corpus) if kind else list(self._corpus[int(rng.integers(len(self._corpus)))])
            peer = f"stranger-{rng.integers(1000)}".encode()
            return Parcel(peer, frames, None if rng.random() < 0.3 else "stranger's key")
        if kind == 3 and self._old:  # a device repeats itself; the same frames may also come before their turn
            peer, frames = self._old[int(rng.integers(len(self._old)))]
            return Parcel(peer, frames, peer.decode())
        if kind == 4 and self._old:  # a device answers what another was asked, or nobody
            _, frames = self._old[int(rng.integers(len(self._old)))]
            header = msgspec.msgpack.decode(frames[0])
            owner = int(rng.integers(4))
            header["request_id"] = 2**31 - 1 - int(rng.integers(1000))
            return Parcel(f"device-{owner}".encode(), [msgspec.msgpack.encode(header), frames[1]], f"device-{owner}")
        while lawful(frames := damaged(rng, self._corpus), self._d_model) is not None:
            pass
        name = f"device-{rng.integers(4)}"
        return Parcel(name.encode(), frames, name)

    def wake(self) -> None:
        self._inner.wake()

    def redial(self) -> None:
        self._inner.redial()

    def close(self) -> None:
        self._inner.close()


def fuzz_base_station(
    rng: np.random.Generator, corpus: Sequence[Frames], bundle: Path, count: int, tally: Tally
) -> None:
    """Throw damaged frames at a base station while it works: its answers keep their bits, its devices their places."""
    with open_system(bundle) as system:
        expected = run_sequence(system, PROMPT)
        hub = system.hub
        for device in hub.devices.values():
            device.key = device.name
        hub._roster = _Friends(hub.devices)
        noisy = _NoisyLink(system, rng, corpus, tally)
        hub._link = noisy
        places = {name: (device.peer, device.session) for name, device in hub.devices.items()}
        noisy.left = count
        while noisy.left:
            try:
                logits = run_sequence(system, PROMPT)
            except Exception as error:  # noqa: BLE001 - that is what is looked for
                tally.crash("base station", error)
                noisy.left -= min(noisy.left, 40)
                continue
            tally.counts["runs"] += 1
            if not np.array_equal(logits, expected):
                tally.accept(f"a run answers otherwise, by {np.abs(logits - expected).max():.1e}")
            if places != {name: (device.peer, device.session) for name, device in hub.devices.items()}:
                tally.accept(f"devices are now {sorted(hub.devices)}")
        tally.counts["refused"] += sum(hub.refused.counts.values())
        tally.counts["late_replies"] += system.pipeline.requests.late_replies


# -- real sockets --------------------------------------------------------------------------------------------------------


def fuzz_station_socket(
    rng: np.random.Generator, corpus: Sequence[Frames], guarded: Guarded, count: int, tally: Tally, limit_s: float = 300
) -> None:
    """Let strangers at an encrypted base station that is at work: with a key of their own, without one, without ZMTP."""
    hub, address = guarded.station.hub, guarded.station.config.listen
    before = sum(hub.refused.counts.values())
    ended, heard = threading.Event(), threading.Event()
    own = make_key(guarded.keys / f"stranger-{rng.integers(1 << 30)}.key")
    noise = [damaged(rng, corpus) for _ in range(count)]
    noise = [frames or [b""] for frames in noise]  # a message of no frames cannot be sent
    garbage = [_raw(rng) for _ in range(max(10, count // 100))]
    sent = [0]

    def attack() -> None:
        context: zmq.Context[Any] = zmq.Context()
        keyed, clear = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
        keyed.curve_secretkey, keyed.curve_publickey = own.secret.encode(), own.public.encode()
        keyed.curve_serverkey = guarded.bs_public.encode()
        for sock in (keyed, clear):
            sock.setsockopt(zmq.LINGER, 0)
            sock.setsockopt(zmq.SNDTIMEO, 5000)
            sock.connect(address)
        for number, frames in enumerate(noise):
            keyed.send_multipart(frames)
            sent[0] += 1
            if number % 20 == 0:  # the answers must not pile up
                while keyed.poll(0):
                    keyed.recv_multipart()
            if number % 50 == 0:
                with contextlib.suppress(zmq.Again):
                    clear.send_multipart(frames, flags=zmq.NOBLOCK)
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        for raw in garbage:
            with socket.create_connection((host, int(port)), timeout=5) as connection:
                connection.sendall(raw)
        ended.set()
        while not heard.wait(0.01):  # what is still queued must arrive
            while keyed.poll(0):
                keyed.recv_multipart()
        context.destroy(linger=0)

    thread = threading.Thread(target=attack)
    thread.start()
    deadline_s = time.monotonic() + limit_s
    while not ended.is_set() or sum(hub.refused.counts.values()) - before < sent[0]:
        if time.monotonic() > deadline_s or (not thread.is_alive() and not ended.is_set()):
            refused = sum(hub.refused.counts.values()) - before
            tally.hang(f"base station: {sent[0]} frames sent, {refused} refused after {limit_s:g} s")
            break
        try:
            guarded.run()
        except AssertionError as error:
            tally.accept(f"a run answers otherwise: {error}")
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            tally.crash("base station on sockets", error)
        tally.counts["runs"] += 1
    heard.set()
    thread.join(10)
    if sorted(hub.devices) != [f"device-{k}" for k in range(4)]:
        tally.accept(f"devices are now {sorted(hub.devices)}")
    tally.counts["frames"] += sent[0]
    tally.counts["raw_connections"] += len(garbage)
    tally.counts["refused"] += sum(hub.refused.counts.values()) - before


def _raw(rng: np.random.Generator) -> bytes:
    """Bytes for the port itself: nothing, noise, or a greeting of ZMTP and then noise."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
    noise = rng.bytes(int(rng.integers(0, 2000)))
    return (b"", noise, greeting + noise, greeting + b"\x04" + noise, b"GET / HTTP/1.1\r\n\r\n")[int(rng.integers(5))]


def fuzz_device_socket(
    rng: np.random.Generator, corpus: Sequence[Frames], folder: Path, count: int, tally: Tally, limit_s: float = 300
) -> None:
    """Let a stranger play base station for a device: it serves on, and answers a sound request as before."""
    service = make_service(folder, RealClock())  # type: ignore[arg-type]
    d_model = service.manifest.model.d_model
    context: zmq.Context[Any] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    sound = _sound_request(service)
    words: list[str] = []
    try:
        with served(service, f"tcp://127.0.0.1:{port}", words) as thread:
            peer = _receive(router, limit_s)[0]
            for number in range(count):
                # What is lawful here may end the device or send it away, as a base station may.
                while lawful(frames := damaged(rng, corpus), d_model) not in (None, "ping", "pong", "reply"):
                    pass
                router.send_multipart([peer, *(frames or [b""])])
                tally.counts["frames"] += 1
                if number % 20 == 0:
                    while router.poll(0):
                        peer = router.recv_multipart()[0]
            router.send_multipart([peer, *sound])
            deadline_s = time.monotonic() + limit_s
            asked_s = time.monotonic()
            while True:
                if time.monotonic() > deadline_s or not thread.is_alive():
                    tally.hang(f"device: no answer to a sound request ({'; '.join(words) or 'it runs'})")
                    break
                if not router.poll(200):
                    continue
                peer, *frames = router.recv_multipart()
                header = decode(frames, d_model).header
                if isinstance(header, ErrorReport):
                    tally.counts["refused"] += 1
                if isinstance(header, ExpertReply) and header.request_id == 77:
                    if not np.isfinite(np.frombuffer(frames[1], "<f4")).all():
                        tally.accept("a sound request is answered with other numbers")
                    break
                if time.monotonic() - asked_s > 0.5:
                    router.send_multipart([peer, *sound])
                    asked_s = time.monotonic()
    finally:
        context.destroy(linger=0)


def throw_oversized(folder: Path, sizes_bytes: Sequence[int], tally: Tally, limit_s: float = 60) -> float:
    """Throw frames over the limit at a device process: it takes no memory for them, dials again and answers as before.

    ZeroMQ ends such a connection and never dials again by itself. Memory is the process's peak: it tells what was
    taken even if it was given back.

    Returns:
        the most MiB that the peak grew by with a frame.
    """
    service = make_service(folder, RealClock())  # type: ignore[arg-type]
    sound, d_model = _sound_request(service), service.manifest.model.d_model
    context: zmq.Context[Any] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    address = f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}"
    line = command("wdmoe-device", "--bundle", folder, "--bs", address, "--engine", "numpy")
    process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most_mib = 0.0
    try:
        peer, expected = _welcome_and_ask(router, sound, d_model, b"", limit_s)
        for size_bytes in sizes_bytes:
            before_mib = _peak_mib(process.pid)
            router.send_multipart([peer, bytes(size_bytes)])
            tally.counts["frames"] += 1
            tally.counts["oversized"] += 1
            peer, rows = _welcome_and_ask(router, sound, d_model, peer, limit_s)
            if rows != expected:
                tally.accept("a sound request is answered with other numbers after an oversized frame")
            taken_mib = _peak_mib(process.pid) - before_mib
            most_mib = max(most_mib, taken_mib)
            if taken_mib > size_bytes / 2**21:
                tally.accept(f"a frame of {size_bytes / 2**20:.0f} MiB took {taken_mib:.1f} MiB of a device's memory")
    except TimeoutError as error:
        code = process.poll()
        if code is None:
            tally.hang(f"device, after an oversized frame: {error}")
        else:
            tally.crash("device, after an oversized frame", RuntimeError(f"exit code {code}"))
    finally:
        stop([process])
        context.destroy(linger=0)
    return most_mib


def _welcome_and_ask(
    router: Any, sound: Frames, d_model: int, old_peer: bytes, limit_s: float
) -> tuple[bytes, list[bytes]]:
    """Wait for a hello on a connection other than the old one, welcome it, and return it with the answer to a request.

    Raises:
        TimeoutError: no hello or no answer came in time.
    """
    deadline_s = time.monotonic() + limit_s
    welcomed = b""
    while (left_s := deadline_s - time.monotonic()) > 0:
        if not router.poll(int(1000 * left_s)):
            break
        peer, *frames = router.recv_multipart()
        header = decode(frames, d_model).header
        if isinstance(header, Hello) and peer != old_peer:
            welcomed = peer
            # The pause between heartbeats is short, so that a lost base station is missed soon.
            router.send_multipart([peer, *encode(Message(Welcome(PROTOCOL_VERSION, 0.1)))])
            router.send_multipart([peer, *sound])
        if isinstance(header, ExpertReply) and peer == welcomed:
            return peer, frames[1:]
    raise TimeoutError(f"no {'answer' if welcomed else 'hello'} in {limit_s:g} s")


def _peak_mib(pid: int) -> float:
    """Largest resident memory that a process ever had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) / 1024


def _receive(router: Any, limit_s: float) -> list[bytes]:
    if not router.poll(int(1000 * limit_s)):
        raise TimeoutError("a device did not dial")
    received: list[bytes] = router.recv_multipart()
    return received


def _sound_request(service: DeviceService) -> Frames:
    entry = service.manifest.experts[0]
    request = ExpertRequest(
        request_id=77, block=entry.block, rows=1, wire="fp32", experts=(entry.expert,), counts=(1,),
        index=np.zeros(1, "<u4").tobytes(), weights=np.ones(1, "<f4").tobytes(),
    )  # fmt: skip
    rows = np.ones((1, service.manifest.model.d_model), "<f4")
    return [bytes(frame) for frame in encode(Message(request, rows))]


# -- files ---------------------------------------------------------------------------------------------------------------

DAMAGES = ("flipped", "cut", "appended", "swapped", "zeroed", "gone")


def fuzz_files(rng: np.random.Generator, bundle: Path, scratch: Path, rounds: int, tally: Tally) -> None:
    """Damage each file of `bs`, of one device folder and of the held experts: it is refused by its name."""
    for role in ("bs", "device-1", "experts"):
        for path in sorted((bundle / role).iterdir()):
            if path.name == "done.jsonl":
                continue  # the exporter's own record; nobody reads it later
            for _ in range(rounds):
                for damage in DAMAGES:
                    _damage_one(rng, bundle, role, path.name, damage, scratch, tally)


def _damage_one(
    rng: np.random.Generator, bundle: Path, role: str, name: str, damage: str, scratch: Path, tally: Tally
) -> None:
    others = [path.name for path in (bundle / role).iterdir() if path.name != name]
    raw = (bundle / role / name).read_bytes()
    at = int(rng.integers(len(raw)))
    other = (bundle / role / others[int(rng.integers(len(others)))]).read_bytes()
    changed = {
        "flipped": _flipped(rng, raw, 1), "cut": raw[:at], "appended": raw + rng.bytes(int(rng.integers(1, 9))),
        "swapped": other, "zeroed": raw[:at] + bytes(min(16, len(raw) - at)) + raw[at + 16 :], "gone": None,
    }[damage]  # fmt: skip
    if changed == raw:
        return
    tally.counts["files_damaged"] += 1
    root = scratch / "copy"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for folder in {"bs", role}:
        shutil.copytree(bundle / folder, root / folder, copy_function=_link)
    target = root / role / name
    target.unlink()
    if changed is not None:
        target.write_bytes(changed)
    what = f"{role}/{name} {damage} at {at} of {len(raw)}"
    try:
        read = _read_all(root, role)
    except BundleError as error:
        tally.counts["refused"] += 1
        if name not in str(error):
            tally.accept(f"{what}: refused, but not by its name: {error}")
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        tally.crash(what, error)
    else:
        if read == _read_all(bundle, role) and name == "manifest.json":
            tally.counts["harmless"] += 1  # other bytes, the same content: white space, a number's last digits
        else:
            tally.accept(what)


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def _read_all(root: Path, role: str) -> object:
    """Do what the commands do before they use a folder; return what its manifest says."""
    manifest: BsManifest | DeviceManifest
    if role == "experts":
        manifest = read_manifest(root / "bs", BsManifest)
        held = HeldExperts(root / "bs", manifest, 1)
        rows = np.ones((1, manifest.model.d_model), np.float32)
        for block in range(manifest.model.n_blocks):
            for expert in range(manifest.model.n_experts):
                held.run(block, expert, rows)
        return manifest
    manifest = read_manifest(root / role, BsManifest) if role == "bs" else read_manifest(root / role, DeviceManifest)
    verify_files(root / role, manifest)
    return manifest
