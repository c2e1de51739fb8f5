"""Expert weights as a bundle stores them, back to float32. int8 and int4 are described in docs/bundle-format.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.half import float32_from_float16
from wdmoe.runtime.manifest import Precision
from wdmoe.runtime.tensor_file import TensorSpan

GROUP = 128  # weights of a row that share a scale in int4
ALIGNMENT = 16  # int8 rows are padded to a multiple of this many weights
ZERO_INT8 = 128  # a stored byte less this is the weight in units of its scale
ZERO_INT4 = 8  # the same of a nibble
SCALE_SUFFIX = ".scale"
MATRICES = ("gate_proj", "up_proj", "down_proj")  # of an expert, in the order of its file

FloatArray = npt.NDArray[np.float32]
Layout = dict[str, tuple[str, tuple[int, ...]]]  # name -> (safetensors dtype, shape)


def stored_layout(name: str, rows: int, columns: int, precision: Precision) -> Layout:
    """Say what tensors hold a matrix of weights [rows, columns], in the order of the file."""
    if precision == "int8":
        return {name: ("U8", (rows, padded(columns, ALIGNMENT))), name + SCALE_SUFFIX: ("F16", (rows,))}
    if precision == "int4":
        groups = padded(columns, GROUP) // GROUP
        return {name: ("U8", (rows, groups, GROUP // 2)), name + SCALE_SUFFIX: ("F16", (rows, groups))}
    return {name: ("F32" if precision == "fp32" else "F16", (rows, columns))}


def expert_layout(d_model: int, d_ff: int, precision: Precision) -> Layout:
    """Say what tensors the file of an expert holds."""
    sizes = ((d_ff, d_model), (d_ff, d_model), (d_model, d_ff))
    layout: Layout = {}
    for name, (rows, columns) in zip(MATRICES, sizes, strict=True):
        layout |= stored_layout(name, rows, columns, precision)
    return layout


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A matrix of weights as it lies in its file."""

    stored: npt.NDArray[Any]  # float32 or float16 [rows, columns], or bytes as `stored_layout` says
    scale: npt.NDArray[np.float16] | None  # of bytes
    columns: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.stored)

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    def float32(self, start: int = 0, stop: int | None = None) -> FloatArray:
        """Convert rows start .. stop - 1, exactly: [stop - start, columns]."""
        part = slice(start, stop)
        return to_float32(self.stored[part], None if self.scale is None else self.scale[part], self.columns)


def expert_matrices(tensors: Mapping[str, npt.NDArray[Any]], where: object) -> tuple[StoredMatrix, ...]:
    """Arrange the tensors of an expert's file as gate, up and down projection.

    Raises:
        BundleError: they are not those of an expert; names `where`.
    """
    try:
        d_ff, d_model = len(tensors["gate_proj"]), len(tensors["down_proj"])
        columns = {"gate_proj": d_model, "up_proj": d_model, "down_proj": d_ff}
        matrices = tuple(
            StoredMatrix(
                tensors[name].view(np.ndarray),
                tensors[name + SCALE_SUFFIX].view(np.ndarray) if tensors[name].dtype == np.uint8 else None,
                columns[name],
            )
            for name in MATRICES
        )
    except KeyError as error:
        raise BundleError(f"{where}: has no tensor {error}; copy the folder again") from error
    return matrices


def to_float32(stored: npt.NDArray[Any], scale: npt.NDArray[np.float16] | None, columns: int) -> FloatArray:
    """Convert rows of weights to float32, exactly.

    Args:
        stored: as in `StoredMatrix`.
        scale: of the same rows.
        columns: weights of a row without padding.
    """
    if scale is None:
        return float32_from_float16(stored) if stored.dtype == np.float16 else np.array(stored, np.float32)
    wide = float32_from_float16(np.ascontiguousarray(scale))
    if stored.ndim == 2:
        values: FloatArray = np.subtract(stored[:, :columns], np.float32(ZERO_INT8), dtype=np.float32)
        values *= wide[:, None]
        return values
    pairs = np.take(_nibbles(), stored).view(np.float32)  # [rows, groups, GROUP]
    pairs *= wide[:, :, None]
    return pairs.reshape(len(stored), -1)[:, :columns]


def resident_bytes(span: TensorSpan) -> int:
    """Return what ONNX Runtime keeps in memory of a tensor of an expert: floats as float32, int8 and int4 as stored."""
    if span.dtype == "U8":
        return span.size_bytes * (GROUP + 4) // GROUP  # and of int8, a scale for each block
    return 4 * math.prod(span.shape)


def padded(size: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-size // multiple) * multiple


@cache
def _nibbles() -> npt.NDArray[np.float64]:
    """Both values of every byte, low nibble first: two float32 in the guise of one float64, so that one look-up does."""
    byte = np.arange(256)
    pairs = np.stack([byte & 15, byte >> 4], axis=1).astype(np.float32) - ZERO_INT4
    return np.ascontiguousarray(pairs).view(np.float64)[:, 0]
