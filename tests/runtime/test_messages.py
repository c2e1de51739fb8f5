from __future__ import annotations

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from wdmoe.profiles.device_profile import VERSION, DeviceProfile, Point
from wdmoe.runtime.errors import ProtocolError
from wdmoe.runtime.messages import (
    MAX_HEADER_BYTES,
    ErrorReport,
    ExpertReply,
    ExpertRequest,
    Goodbye,
    Header,
    Hello,
    Message,
    Ping,
    Pong,
    Welcome,
    decode,
    encode,
    pack_rows,
    unpack_rows,
)

WIDTH = 8


def request(
    rows: int = 3, index: list[int] | None = None, counts: tuple[int, ...] = (2, 2), **fields: object
) -> Message:
    entries = np.array([0, 2, 1, 2] if index is None else index, "<u4")
    header = ExpertRequest(
        request_id=7, block=1, rows=rows, wire="fp32", experts=(4, 5), counts=counts,
        index=entries.tobytes(), weights=np.full(len(entries), 0.5, "<f4").tobytes(),
    )  # fmt: skip
    return Message(msgspec.structs.replace(header, **fields), np.arange(rows * WIDTH, dtype="<f4").reshape(rows, WIDTH))


def hello() -> Hello:
    profile = DeviceProfile(VERSION, "d", "s", "numpy", "fp32", WIDTH, 16, (Point(1, 0.5, 0.6),))
    return Hello(1, "device-0", "abc", "0" * 64, ((0, 1), (2,)), profile)


@pytest.mark.parametrize(
    "header",
    [hello(), Welcome(1, 1.0), Ping(3), Pong(3), ErrorReport("no", 4, True), Goodbye("done")],
    ids=lambda header: type(header).__name__,
)
def test_headers_survive_encoding(header: Header) -> None:
    assert decode(encode(Message(header)), WIDTH).header == header


def test_a_request_survives_encoding_with_its_rows() -> None:
    sent = request()
    got = decode(encode(sent), WIDTH)
    assert got.header == sent.header
    np.testing.assert_array_equal(got.rows, sent.rows)


def test_a_request_tells_its_share_and_one_without_says_nothing_of_it() -> None:
    assert decode(encode(request(share=0.25, up_mbps=80.5)), WIDTH).header == request(share=0.25, up_mbps=80.5).header
    assert b"share" not in bytes(encode(request())[0])


@pytest.mark.parametrize(
    "number", [0.0, -0.5, 1e-9, 1e300, float("nan"), float("inf"), -float("inf"), 2**62, True, "1"]
)
@pytest.mark.parametrize("field", ["share", "up_mbps"])
def test_a_share_or_a_rate_that_cannot_be_is_refused(field: str, number: object) -> None:
    with pytest.raises(ProtocolError, match="not a message"):
        decode(encode(request(**{"share": 0.5, field: number})), WIDTH)  # type: ignore[arg-type]


def test_a_request_for_one_expert_survives_encoding() -> None:
    sent = request(index=[0, 2], counts=(2,), experts=(4,))
    assert decode(encode(sent), WIDTH).header == sent.header


def test_a_reply_survives_encoding_in_half_precision() -> None:
    rows = np.linspace(-2, 2, 2 * WIDTH, dtype="<f2").reshape(2, WIDTH)
    got = decode(encode(Message(ExpertReply(1, 2, "fp16", 10, 20), rows)), WIDTH)
    assert got.rows is not None and got.rows.dtype == np.float16
    np.testing.assert_array_equal(got.rows, rows)


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (request(counts=(2, 3)), "counts sum to 5"),
        (request(experts=(4, 4)), "named twice"),
        (request(experts=(4,)), "1 experts with 2 counts"),
        (request(index=[0, 3, 1, 2]), "index 3 is outside the 3 rows"),
        (request(index=[2, 0, 1, 2]), "does not ascend"),
        (request(index=[0, 0, 1, 2]), "does not ascend"),
        (request(weights=np.array([1, np.nan, 1, 1], "<f4").tobytes()), "not finite"),
        (request(wire="fp16"), "tensor frame of 96 bytes"),
        (request(rows=3, wire="int3"), "not a message"),
        (request(block=-1), "not a message"),
        (request(share=1.01), "not a message"),
        (request(up_mbps=5.0), "up_mbps without a share"),
    ],
)
def test_a_request_that_contradicts_itself_is_refused(message: Message, complaint: str) -> None:
    with pytest.raises(ProtocolError, match=complaint):
        decode(encode(message), WIDTH)


def test_rows_ascend_within_each_expert_but_may_start_anywhere() -> None:
    assert decode(encode(request(index=[1, 2, 0, 1])), WIDTH)


@pytest.mark.parametrize(
    ("frames", "complaint"),
    [
        ([], "one or two frames"),
        ([b"", b"", b""], "one or two frames"),
        ([b""], "not a message"),
        ([b"\xff" * 40], "not a message"),
        ([b"\x00" * (MAX_HEADER_BYTES + 1)], "at most"),
        ([encode(Message(Ping(1)))[0], b"rows"], "came with a tensor frame"),
        ([encode(request())[0]], "without its tensor frame"),
        ([encode(request())[0], b"short"], "tensor frame of 5 bytes"),
    ],
)
def test_frames_that_are_no_message_are_refused(frames: list[bytes], complaint: str) -> None:
    with pytest.raises(ProtocolError, match=complaint):
        decode(frames, WIDTH)


def test_random_damage_is_refused_or_leaves_a_message_that_holds_together() -> None:
    rng = np.random.default_rng(0)
    whole = [bytes(frame) for frame in encode(request())]
    refused = 0
    for _ in range(2000):
        damaged = [bytearray(frame) for frame in whole]
        frame = damaged[int(rng.integers(2))]
        for _ in range(int(rng.integers(1, 4))):
            frame[int(rng.integers(len(frame)))] = int(rng.integers(256))
        if rng.random() < 0.3:
            del frame[int(rng.integers(len(frame))) :]
        try:
            message = decode([bytes(frame) for frame in damaged], WIDTH)
        except ProtocolError:
            refused += 1
            continue
        if isinstance(message.header, ExpertRequest):
            assert message.rows is not None and message.rows.shape == (message.header.rows, WIDTH)
    assert refused > 500


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_half_precision_rows_round_trip_within_their_rounding(scale: float) -> None:
    rows = (np.random.default_rng(0).standard_normal((5, WIDTH)) * scale).astype(np.float32)
    packed, wire = pack_rows(rows, "fp16")
    assert wire == "fp16"
    np.testing.assert_allclose(unpack_rows(packed), rows, rtol=1e-3)


def test_rows_that_half_precision_cannot_hold_travel_as_float32() -> None:
    rows: NDArray[np.float32] = np.full((1, WIDTH), 1e5, np.float32)
    packed, wire = pack_rows(rows, "fp16")
    assert wire == "fp32"
    np.testing.assert_array_equal(packed, rows)
