"""Rows as int8: how far they are off, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from wdmoe.runtime.errors import ProtocolError
from wdmoe.runtime.int8_rows import SCALE_BYTES, pack_int8, scales_of, unpack_int8
from wdmoe.runtime.messages import ExpertReply, Message, decode, encode, pack_rows, unpack_rows

WIDTH = 256


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1.0, 1e30])
def test_a_row_is_off_by_half_its_scale_at_most(size: float) -> None:
    rows = (np.random.default_rng(0).standard_normal((20, WIDTH)) * size).astype(np.float32)
    packed = pack_int8(rows)
    step = np.abs(rows).max(axis=1, keepdims=True) / 127
    smallest = np.float32(1e-45)  # below it there is no float32
    # A scale of a few times the smallest number is itself off.
    assert (np.abs(unpack_int8(packed) - rows) <= np.maximum(0.502 * step, 127 * smallest)).all()
    assert packed.dtype == np.int8 and packed.shape == (20, WIDTH + SCALE_BYTES)
    assert packed[:, SCALE_BYTES:].min() >= -127


def test_zeros_stay_zeros_and_each_row_has_its_own_scale() -> None:
    rows = np.zeros((3, WIDTH), np.float32)
    rows[1, 0], rows[2, 0] = 127.0, -1.27
    np.testing.assert_array_equal(unpack_int8(pack_int8(rows)), rows)
    np.testing.assert_allclose(scales_of(pack_int8(rows)), [0, 1, 0.01], rtol=1e-6)


def test_int8_rows_travel_in_little_more_than_half_the_bytes_of_float16() -> None:
    rows = np.random.default_rng(1).standard_normal((7, WIDTH)).astype(np.float32)
    packed, wire = pack_rows(rows, "int8")
    assert wire == "int8" and packed.nbytes <= 0.52 * pack_rows(rows, "fp16")[0].nbytes
    got = decode([bytes(frame) for frame in encode(Message(ExpertReply(1, 7, wire, 1, 1), packed))], WIDTH)
    assert got.rows is not None
    np.testing.assert_array_equal(unpack_rows(got.rows), unpack_int8(packed))
    error = np.sqrt(np.mean((unpack_rows(got.rows) - rows) ** 2) / np.mean(rows**2))
    assert 0.003 < error < 0.01


def test_rows_that_are_not_finite_travel_as_float32() -> None:
    rows = np.ones((2, WIDTH), np.float32)
    rows[1, 3] = np.nan
    packed, wire = pack_rows(rows, "int8")
    assert wire == "fp32"
    np.testing.assert_array_equal(packed, rows)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 3e38])
def test_scales_that_nobody_can_have_meant_are_refused(scale: float) -> None:
    packed = pack_int8(np.ones((2, WIDTH), np.float32))
    packed[1, :SCALE_BYTES] = np.array([scale], "<f4").view(np.int8)
    with pytest.raises(ProtocolError, match="scale"):
        decode(encode(Message(ExpertReply(1, 2, "int8", 1, 1), packed)), WIDTH)


def test_a_frame_of_another_length_is_refused() -> None:
    packed = pack_int8(np.ones((2, WIDTH), np.float32))
    with pytest.raises(ProtocolError, match=r"2 rows x 256 x int8 are 520"):
        decode([encode(Message(ExpertReply(1, 2, "int8", 1, 1), packed))[0], bytes(2 * WIDTH)], WIDTH)
