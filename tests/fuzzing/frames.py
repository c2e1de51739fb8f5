"""Frames as they are recorded, and damaged."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from inprocess import open_system, run_sequence

from wdmoe.runtime.messages import (
    PROTOCOL_VERSION,
    Enrol,
    Enrolled,
    ErrorReport,
    Goodbye,
    Message,
    Ping,
    Pong,
    Welcome,
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
        paced = system.hub.devices["device-0"].latency
        paced.state_air(0.1, 0.1)
        paced.set_share(0.5, lasting=True)
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
            frames[at] = flipped(rng, frames[at], int(rng.integers(1, 5)))
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


def flipped(rng: np.random.Generator, raw: bytes, bits: int) -> bytes:
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
