"""An expert's weights on their way from its file to TensorRT, a few MiB at a time, in the layout that TensorRT takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from wdmoe.runtime.cuda_driver import Bytes
from wdmoe.runtime.engines.tensorrt_network import Array, ExpertNetwork, Precision
from wdmoe.runtime.errors import EngineError
from wdmoe.runtime.manifest import ExpertEntry
from wdmoe.runtime.quantised import GROUP, MATRICES, SCALE_SUFFIX, ZERO_INT4, StoredMatrix, expert_matrices
from wdmoe.runtime.tensor_file import map_tensors, read_spans

PIECE_BYTES = 4 << 20
_TO_SIGNED_INT8 = np.uint8(0x80)  # what flips a stored byte to two's complement


def stored_network(folder: Path, experts: Sequence[ExpertEntry]) -> ExpertNetwork:
    """Say what network serves the experts of a slice in the precision of its files.

    Raises:
        EngineError: in this precision TensorRT cannot serve them.
    """
    if not experts:
        raise EngineError("engine tensorrt: this slice holds no experts")
    spans = read_spans(folder / experts[0].weights)
    gate, down = spans["gate_proj"], spans["down_proj"]
    if gate.dtype == "F32":
        raise EngineError(
            "engine tensorrt: computes in float16, this slice is fp32; export with --precision fp16, int8 or int4"
        )
    precision: Precision = "fp16" if gate.dtype == "F16" else "int8" if len(gate.shape) == 2 else "int4"
    return ExpertNetwork(down.shape[0], gate.shape[0], precision)


def weight_pieces(path: Path, network: ExpertNetwork) -> Iterator[tuple[str, int, Bytes]]:
    """Read the weights that are inputs of a network: tensor, offset in it in bytes, and the bytes that go there.

    Args:
        path: of an expert's file, fp16 or int8.
        network: fp16 or int8; fp16 takes either, int8 only its own.
    """
    tensors = map_tensors(path)
    for name, matrix in zip(MATRICES, expert_matrices(tensors, path), strict=True):
        if network.precision == "int8":
            yield from ((name, offset, piece) for offset, piece in _int8_turned(matrix))
            yield name + SCALE_SUFFIX, 0, np.ascontiguousarray(tensors[name + SCALE_SUFFIX]).view(np.uint8)
        else:
            yield from ((name, offset, piece) for offset, piece in _float16(matrix))


def int4_constants(path: Path, network: ExpertNetwork) -> dict[str, Array]:
    """Read the weights that are constants of a network: integers [in, out / 2] and scales [in / 128, out].

    The file has [out, in] and pairs of columns in a byte. Padding is zeros with the scale 1, as is a group whose scale is 0:
    TensorRT takes only positive scales.
    """
    constants: dict[str, Array] = {}
    for name, matrix in zip(MATRICES, expert_matrices(map_tensors(path), path), strict=True):
        n_out, n_in = network.projections()[name]
        assert matrix.scale is not None
        groups = matrix.stored.shape[1]
        scales = np.ones((n_in // GROUP, n_out), np.float16)
        scales[:groups, : matrix.rows] = matrix.scale.T
        empty = scales == 0
        scales[empty] = 1
        packed = np.empty((n_in, n_out // 2), np.uint8)
        for group in range(n_in // GROUP):
            integers = np.full((GROUP, n_out), ZERO_INT4, np.uint8)
            if group < groups:
                stored = matrix.stored[:, group].T  # [64, rows]
                integers[0::2, : matrix.rows], integers[1::2, : matrix.rows] = stored & 15, stored >> 4
            integers[:, empty[group]] = ZERO_INT4
            integers ^= ZERO_INT4  # to two's complement
            packed[group * GROUP : (group + 1) * GROUP] = integers[:, 0::2] | (integers[:, 1::2] << 4)
        constants[name], constants[name + SCALE_SUFFIX] = packed, scales
    return constants


def _int8_turned(matrix: StoredMatrix) -> Iterator[tuple[int, Bytes]]:
    """Turn stored bytes [out, in] to signed integers [in, out], without the padding."""
    at_once = max(1, PIECE_BYTES // matrix.rows)
    for start in range(0, matrix.columns, at_once):
        columns = matrix.stored[:, start : min(start + at_once, matrix.columns)]
        turned = np.ascontiguousarray(columns.T)
        turned ^= _TO_SIGNED_INT8
        yield start * matrix.rows, turned.reshape(-1)


def _float16(matrix: StoredMatrix) -> Iterator[tuple[int, Bytes]]:
    """Take float16 as it is stored, and round what is quantised to it."""
    at_once = max(1, PIECE_BYTES // (2 * matrix.columns))
    for start in range(0, matrix.rows, at_once):
        if matrix.scale is None:
            rows: Array = matrix.stored[start : start + at_once]
        else:
            rows = matrix.float32(start, start + at_once).astype(np.float16)
        yield 2 * start * matrix.columns, np.ascontiguousarray(rows).view(np.uint8).reshape(-1)
