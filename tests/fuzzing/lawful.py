"""docs/protocol.md once more: which frames are a message."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

import msgspec


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
    optional = _OPTIONAL.get(kind, set())
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
    if header.get("share") is None and header.get("up_mbps") is not None:
        return False
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
_OPTIONAL = {"error": {"request_id", "final"}, "request": {"share", "up_mbps"}}
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
        "weights": lambda v: isinstance(v, bytes), "share": lambda v: v is None or (_number(v) and 1e-6 <= v <= 1),
        "up_mbps": lambda v: v is None or (_number(v) and 1e-3 <= v <= 1e6),
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
