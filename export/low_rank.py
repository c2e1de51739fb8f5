"""Low-rank changes of weight matrices, and how they are kept in 8 bits an element."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

_INT8_LIMIT = 127


@dataclass(frozen=True, slots=True)
class LowRank:
    """A change of a weight matrix [outputs, inputs]: `out @ into`."""

    into: FloatArray  # [rank, inputs]
    out: FloatArray  # [outputs, rank]

    def __post_init__(self) -> None:
        if self.into.ndim != 2 or self.out.ndim != 2 or self.into.shape[0] != self.out.shape[1]:
            raise ValueError(f"factors {self.out.shape} and {self.into.shape} do not make a matrix")

    def matrix(self) -> FloatArray:
        """Return the change itself, [outputs, inputs], the same to the bit on every machine.

        Ranks are added one after another: a BLAS adds in an order of its own, and weights that are rounded to 16 bits from
        its sums are now and then others on another processor.
        """
        total = np.zeros((self.out.shape[0], self.into.shape[1]), np.float32)
        product = np.empty_like(total)
        for column, row in zip(self.out.T, self.into, strict=True):
            total += np.multiply.outer(column, row, out=product)
        return total


def quantise(name: str, change: LowRank) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays `name.into`, `name.out` (int8) and `name.scale` (float16, [rank]) that `restore` reads.

    The two vectors of each rank are brought to int8 by their largest elements; the product of the two factors is the
    rank's one scale.
    """
    into_peak = np.maximum(np.abs(change.into).max(axis=1), 1e-12)
    out_peak = np.maximum(np.abs(change.out).max(axis=0), 1e-12)
    return {
        f"{name}.into": np.rint(change.into / into_peak[:, None] * _INT8_LIMIT).astype(np.int8),
        f"{name}.out": np.rint(change.out / out_peak * _INT8_LIMIT).astype(np.int8),
        # Times 127: the product of two peaks over 127^2 would be lost in float16.
        f"{name}.scale": (into_peak * out_peak / _INT8_LIMIT).astype(np.float16),
    }


def restore(name: str, arrays: Mapping[str, npt.NDArray[Any]]) -> LowRank:
    """Return the change that `quantise` kept under this name.

    Raises:
        KeyError: one of its three arrays is missing.
        ValueError: their shapes do not fit together.
    """
    scale = arrays[f"{name}.scale"].astype(np.float32)
    into = arrays[f"{name}.into"].astype(np.float32)
    scale /= _INT8_LIMIT
    return LowRank(into * scale[:, None], arrays[f"{name}.out"].astype(np.float32))
