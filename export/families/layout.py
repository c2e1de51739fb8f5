"""What a family file says about its checkpoints, in the words of the exporter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from wdmoe.runtime.errors import CheckpointError
from wdmoe.runtime.manifest import ModelSpec


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Tensors of one gated feed-forward: down (silu(gate x) * up x)."""

    gate: str  # [d_ff, d_model]
    up: str  # [d_ff, d_model]
    down: str  # [d_model, d_ff]


@dataclass(frozen=True, slots=True)
class BlockNames:
    """Tensors of one block that stay at the base station."""

    input_norm: str  # [d_model]
    query: str  # [n_heads x head_dim, d_model]
    key: str  # [n_kv_heads x head_dim, d_model]
    value: str  # [n_kv_heads x head_dim, d_model]
    output: str  # [d_model, n_heads x head_dim]
    post_norm: str  # [d_model]
    router: str  # [n_experts, d_model]
    biases: tuple[str, str, str] | None = None  # of query, key and value
    shared: ExpertNames | None = None
    shared_gate: str | None = None  # [1, d_model]; its sigmoid scales the shared expert


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """A model as the exporter sees it: its shapes, a few numbers of its graphs, and the names of its tensors."""

    spec: ModelSpec
    norm_eps: float
    tied_head: bool  # the head is the embedding
    block: Callable[[int], BlockNames]
    expert: Callable[[int, int], ExpertNames]  # block, expert
    shared_ff: int = 0  # width of the shared expert
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Config:
    """config.json (with the ids of generation_config.json), read field by field."""

    values: Mapping[str, Any]
    generation: Mapping[str, Any]

    def count(self, field: str, default: int | None = None) -> int:
        """Read a positive integer; null counts as absent.

        Raises:
            CheckpointError: it is missing and has no default, or is something else.
        """
        value = self.values.get(field)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"config.json: field {field} is {value!r}, expected a positive integer")
        return value

    def number(self, field: str, default: float) -> float:
        """Read a number; null counts as absent."""
        value = self.values.get(field)
        value = default if value is None else value
        if not isinstance(value, int | float):
            raise CheckpointError(f"config.json: field {field} is {value!r}, expected a number")
        return float(value)

    def flag(self, field: str, default: bool) -> bool:
        """Read a truth value; null counts as absent."""
        value = self.values.get(field)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: field {field} is {value!r}, expected true or false")
        return value

    def require(self, field: str, *, understood: object, default: object = None) -> None:
        """Refuse a model that differs in a way the graphs cannot express.

        Raises:
            CheckpointError: the field holds anything but the value understood.
        """
        value = self.values.get(field)
        value = default if value is None else value
        if value != understood:
            raise CheckpointError(f"config.json: {field} = {value!r} is not supported, only {understood!r}")

    @property
    def head_dim(self) -> int:
        """Width of one head: the config's own, or d_model / n_heads."""
        return self.count("head_dim", self.count("hidden_size") // self.count("num_attention_heads"))

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text."""
        ids = self._ids("bos_token_id")
        return ids[0] if ids else None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text; generation_config.json has the last word."""
        return self._ids("eos_token_id")

    def _ids(self, field: str) -> tuple[int, ...]:
        value = self.generation.get(field)
        value = self.values.get(field) if value is None else value
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) for token in ids):
            raise CheckpointError(f"config.json: field {field} is {value!r}, expected token ids")
        return tuple(ids)
