"""Reads config.json field by field; a value that the graphs cannot express is refused by its name."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from wdmoe.runtime.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Config:
    """config.json (with the ids of generation_config.json), and the names of the checkpoint's tensors."""

    values: Mapping[str, Any]
    generation: Mapping[str, Any]
    tensors: Collection[str]

    def count(self, *fields: str, default: int | None = None) -> int:
        """Read a positive integer; null counts as absent.

        Args:
            fields: names of the field, of which the first that is there counts.
            default: where none is.

        Raises:
            CheckpointError: it is missing and has no default, or is something else.
        """
        field = next((field for field in fields if self.values.get(field) is not None), fields[0])
        value = self._value(field, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"config.json: field {field} is {value!r}, expected a positive integer")
        return value

    def number(self, field: str, default: float) -> float:
        """Read a positive number; null counts as absent."""
        value = self._value(field, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise CheckpointError(f"config.json: field {field} is {value!r}, expected a positive number")
        return float(value)

    def flag(self, field: str, default: bool) -> bool:
        """Read a truth value; null counts as absent."""
        value = self._value(field, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: field {field} is {value!r}, expected true or false")
        return value

    def require(self, field: str, *, understood: object) -> None:
        """Refuse a model that differs in a way the graphs cannot express; an absent field and null do not.

        Raises:
            CheckpointError: the field holds anything but the value understood.
        """
        value = self._value(field, understood)
        if value != understood:
            raise CheckpointError(f"config.json: {field} = {value!r} is not supported, only {understood!r}")

    @property
    def head_dim(self) -> int:
        """Width of one head: the config's own, or d_model / n_heads."""
        return self.count("head_dim", default=self.count("hidden_size") // self.count("num_attention_heads"))

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text."""
        ids = self._ids("bos_token_id")
        return ids[0] if ids else None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text; generation_config.json has the last word."""
        return self._ids("eos_token_id")

    def _value(self, field: str, default: Any) -> Any:
        value = self.values.get(field)
        return default if value is None else value

    def _ids(self, field: str) -> tuple[int, ...]:
        value = self.generation.get(field)
        value = self.values.get(field) if value is None else value
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) for token in ids):
            raise CheckpointError(f"config.json: field {field} is {value!r}, expected token ids")
        return tuple(ids)
