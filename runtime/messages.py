"""The messages between base station and devices, and their frames. Format: docs/protocol.md.

A message is one msgpack header frame and, for rows, one raw tensor frame. Everything a header claims is
checked against the model and the frame that came with it before memory is taken or a row is touched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from wdmoe.profiles.device_profile import DeviceProfile
from wdmoe.runtime.errors import ProtocolError
from wdmoe.runtime.half import rounded_to_float16, widened_to_float32
from wdmoe.runtime.int8_rows import SCALE_BYTES, pack_int8, scales_hold, unpack_int8

PROTOCOL_VERSION = 3
MAX_HEADER_BYTES = 4 << 20
MAX_ROWS = 8_192  # of one request; bounds what a peer can make the other side allocate

_FLOAT16_END = 65_520.0  # from here on, float16 rounds to infinity
_QUOTED = 300  # characters of a reason

Wire = Literal["fp32", "fp16", "int8"]
_WIRE_DTYPES: dict[str, np.dtype[Any]] = {
    wire: np.dtype(stored) for wire, stored in (("fp32", "<f4"), ("fp16", "<f2"), ("int8", "i1"))
}

Rows = npt.NDArray[np.float32]  # [n, d_model]
Frame = bytes | bytearray | memoryview
MOST_US = 2**31 - 1  # of a time that a reply reports
Index = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
LEAST_SHARE, LEAST_MBPS, MOST_MBPS = 1e-6, 1e-3, 1e6
NAME_PATTERN = "^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$"
Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]  # shows in tables and names files


class Enrol(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="enrol"):
    """Device to BS, on an encrypted link: take my key under this name; the secret of a token pays for it."""

    protocol: int
    device: Name
    secret: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class Enrolled(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="enrolled"):
    """BS to device: the key was taken."""

    device: Name


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="hello"):
    """Device to BS, until welcomed: who it is and what it serves."""

    protocol: int
    device: Name
    session: Name  # new for each start of the device process
    bundle_id: str
    experts: tuple[tuple[Index, ...], ...]  # [block] -> experts it holds
    profile: DeviceProfile


class Welcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="welcome"):
    """BS to device: the hello was taken; how often the BS will be heard."""

    protocol: int
    heartbeat_s: Annotated[float, msgspec.Meta(gt=0, le=3600)]


class ExpertRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag="request"):
    """BS to device: run experts on rows and return one weighted sum per row.

    The rows are grouped by expert: the first counts[0] entries of `index` and `weights` belong to experts[0],
    and so on, ascending within each expert. A row used by two experts travels once and is indexed twice.
    """

    request_id: Index
    block: Index
    rows: Annotated[int, msgspec.Meta(ge=1, le=MAX_ROWS)]
    wire: Wire
    experts: tuple[Index, ...]
    counts: tuple[Annotated[int, msgspec.Meta(ge=1, le=MAX_ROWS)], ...]
    index: bytes  # uint32 [sum(counts)], which row
    weights: bytes  # float32 [sum(counts)], what the expert's output is multiplied with
    share: Annotated[float, msgspec.Meta(ge=LEAST_SHARE, le=1)] | None = None  # of its link that this exchange gets
    # What a real link carries of the reply, all of it, 10^6 bit/s; None: an emulated link knows by itself.
    up_mbps: Annotated[float, msgspec.Meta(ge=LEAST_MBPS, le=MOST_MBPS)] | None = None


class ExpertReply(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="reply"):
    """Device to BS: the weighted sums, one row for each row of the request."""

    request_id: Index
    rows: Annotated[int, msgspec.Meta(ge=1, le=MAX_ROWS)]
    wire: Wire
    queue_us: Index  # between arrival and start
    compute_us: Index


class Ping(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="ping"):
    """BS to device: heartbeat and round-trip probe."""

    nonce: Index


class Pong(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="pong"):
    """Device to BS: at once, also while an expert is running."""

    nonce: Index


class ErrorReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="error"):
    """Either way: why something was refused. `final` means that trying again cannot help."""

    text: Annotated[str, msgspec.Meta(max_length=4096)]
    request_id: Index | None = None
    final: bool = False


class Goodbye(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="goodbye"):
    """Either way: leaving on purpose."""

    reason: Annotated[str, msgspec.Meta(max_length=4096)]


Header = Enrol | Enrolled | Hello | Welcome | ExpertRequest | ExpertReply | Ping | Pong | ErrorReport | Goodbye
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Header)
_WITH_ROWS = (ExpertRequest, ExpertReply)


@dataclass(frozen=True, slots=True)
class Message:
    """One message: a header and, with requests and replies, rows as they travel."""

    header: Header
    rows: npt.NDArray[Any] | None = None  # [n, d_model], C order, dtype as header.wire says; int8: with their scales


def encode(message: Message) -> list[Frame]:
    """Turn a message into frames; the rows are not copied."""
    header = _encoder.encode(message.header)
    return [header] if message.rows is None else [header, message.rows.data.cast("B")]


def decode(frames: Sequence[Frame], d_model: int) -> Message:
    """Turn frames into a message; the rows stay a view of their frame.

    Args:
        frames: as they came.
        d_model: width of a row.

    Raises:
        ProtocolError: anything is not as documented; names the field.
    """
    if not 1 <= len(frames) <= 2:
        raise ProtocolError(f"a message has one or two frames, got {len(frames)}")
    if len(frames[0]) > MAX_HEADER_BYTES:
        raise ProtocolError(f"header of {len(frames[0])} bytes, at most {MAX_HEADER_BYTES} are taken")
    try:
        header = _decoder.decode(frames[0])
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, RecursionError) as error:
        # Cut, because it may quote the sender's own words at any length.
        reason = str(error)[:_QUOTED]
        raise ProtocolError(f"header is not a message of protocol {PROTOCOL_VERSION}: {reason}") from error
    if not isinstance(header, _WITH_ROWS):
        if len(frames) != 1:
            raise ProtocolError(f"{type(header).__name__} came with a tensor frame")
        return Message(header)
    if len(frames) != 2:
        raise ProtocolError(f"{type(header).__name__} came without its tensor frame")
    dtype = _WIRE_DTYPES[header.wire]
    width = d_model + SCALE_BYTES if header.wire == "int8" else d_model
    expected = header.rows * row_bytes(d_model, header.wire)
    if len(frames[1]) != expected:
        raise ProtocolError(
            f"{type(header).__name__}: tensor frame of {len(frames[1])} bytes, "
            f"{header.rows} rows x {d_model} x {header.wire} are {expected}"
        )
    if isinstance(header, ExpertRequest):
        _check_groups(header)
    rows = np.frombuffer(frames[1], dtype).reshape(header.rows, width)
    if header.wire == "int8" and not scales_hold(rows):
        raise ProtocolError(f"{type(header).__name__}: a row's scale is negative, too large or not a number")
    return Message(header, rows)


def row_bytes(d_model: int, wire: Wire) -> int:
    """Say how many bytes a row is on the wire."""
    return d_model * np.dtype(_WIRE_DTYPES[wire]).itemsize + (SCALE_BYTES if wire == "int8" else 0)


def request_index(header: ExpertRequest) -> npt.NDArray[np.uint32]:
    """Which row each entry of a request speaks of."""
    return np.frombuffer(header.index, "<u4")


def request_weights(header: ExpertRequest) -> npt.NDArray[np.float32]:
    """The weight of each entry of a request."""
    return np.frombuffer(header.weights, "<f4")


def pack_rows(rows: Rows, wire: Wire) -> tuple[npt.NDArray[Any], Wire]:
    """Convert rows for the wire; rows that it cannot hold travel as float32 instead."""
    if wire == "int8" and all_finite(rows):
        return pack_int8(rows), "int8"
    if wire == "fp16":
        fits = _fits_float16(rows)
        if fits or not all_finite(rows):  # what is not finite stays so; whoever gets it refuses it
            return rounded_to_float16(rows, fits), "fp16"
    return np.ascontiguousarray(rows, "<f4"), "fp32"


def unpack_rows(rows: npt.NDArray[Any]) -> Rows:
    """Bring rows off the wire to float32; float32 rows are not copied."""
    if rows.dtype == np.int8:
        return unpack_int8(rows)
    return widened_to_float32(rows) if rows.dtype == np.float16 else rows


def all_finite(rows: Rows) -> bool:
    """Whether every number is finite."""
    return math.isfinite(_bound(rows)) or bool(np.isfinite(rows).all())


def _fits_float16(rows: Rows) -> bool:
    """Whether no number rounds to infinity, or is it already."""
    return _bound(rows) < _FLOAT16_END or bool(rows.min() > -_FLOAT16_END and rows.max() < _FLOAT16_END)


def _bound(rows: Rows) -> float:
    """Return what no number's size is above: of several rows the largest norm, which BLAS finds in a quarter of the time."""
    if len(rows) == 1:
        return float(np.maximum.reduce(np.abs(rows), axis=None))
    with np.errstate(over="ignore", invalid="ignore"):  # then it is not finite, and whoever asks looks again
        return math.sqrt(np.matmul(rows[:, None, :], rows[:, :, None]).max())


def _check_groups(header: ExpertRequest) -> None:
    total = sum(header.counts)
    if header.share is None and header.up_mbps is not None:
        raise ProtocolError("up_mbps without a share of it")
    if not header.experts or len(header.experts) != len(header.counts):
        raise ProtocolError(f"{len(header.experts)} experts with {len(header.counts)} counts")
    if len(set(header.experts)) != len(header.experts):
        raise ProtocolError("an expert is named twice in one request")
    if len(header.index) != 4 * total or len(header.weights) != 4 * total:
        raise ProtocolError(
            f"counts sum to {total}, so index and weights have {4 * total} bytes each; "
            f"got {len(header.index)} and {len(header.weights)}"
        )
    if not math.isfinite(sum(request_weights(header).tolist())):  # of finite float32, no sum is beyond float64
        raise ProtocolError("a weight is not finite")
    if header.rows == 1 and total == len(header.counts) and not any(header.index):
        return  # one row, which each expert gets
    index = request_index(header)
    if int(index.max()) >= header.rows:
        raise ProtocolError(f"index {int(index.max())} is outside the {header.rows} rows")
    falls = np.flatnonzero(index[1:] <= index[:-1]) + 1
    if not set(falls.tolist()).issubset(accumulate(header.counts)):  # a new expert may start anywhere
        raise ProtocolError("index does not ascend within an expert")
