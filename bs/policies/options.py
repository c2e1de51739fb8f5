"""What policies have in common: options, how they are typed and described, and what is known of one block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.bs.one_token import RowTimes
from wdmoe.bs.routing import Bools, Floats

Latencies = npt.NDArray[np.float64]
IMPORTANCE = ("weight", "norm")


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What a block loses by what is left out in it; see `wdmoe.bs.sensitivity`."""

    nats: float  # divergence from exact, of a token, for each squared importance
    share: float  # of what all blocks may lose together


@dataclass(frozen=True, slots=True)
class Context:
    """What a policy may know of a block beside the routing; what is not known is None."""

    block: int = 0
    model: RowTimes | None = None  # of the devices; None: `row_ms` is all that is known
    norms: Floats | None = None  # [n_experts], calibrated mean norm of each expert's output in this block
    holders: Bools | None = None  # [n_experts, n_devices], who has each expert; None: its owner alone
    probabilities: Floats | None = None  # [tokens, n_experts], the router's, over all experts
    sensitivity: Mapping[str, Sensitivity] | None = None  # of this block, by kind of importance


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of every policy that leaves something out."""

    renormalise: bool = True  # scale what is kept of a token to the sum it had
    protect: bool = False  # never leave out a token's top expert
    importance: str = "weight"  # of an expert for a token: its gate weight, or with `norm` times its calibrated norm
    budget: tuple[float, ...] = ()  # largest share of importance to leave out in a block: one, or one for each block
    loss: float = math.inf  # nats that a token may lose by all blocks together, as calibrated; takes the budget's place

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        require(self, "importance", self.importance in IMPORTANCE, f"one of {', '.join(IMPORTANCE)}")
        for share in self.budget:
            require(self, "budget", 0 <= share <= 1, "shares from 0 to 1", share)
        require(self, "loss", self.loss >= 0, "at least 0 nats")

    def describe(self) -> str:
        """Name the policy with what differs from its defaults."""
        changed = [
            f"{f.name}={_spell(getattr(self, f.name))}"
            for f in option_fields(type(self))
            if getattr(self, f.name) != f.default
        ]
        name = policy_name(type(self))
        return f"{name}:{','.join(changed)}" if changed else name

    def allowance(self, importance: float, block: int) -> float:
        """Return how much importance may be left out in a block, infinite without a budget.

        Args:
            importance: of all that the model chose.
            block: which one.

        Raises:
            ValueError: there are several budgets, but none for this block.
        """
        if not self.budget:
            return math.inf
        if len(self.budget) > 1 and block >= len(self.budget):
            raise ValueError(f"{policy_name(type(self))}: {len(self.budget)} budgets, but there is a block {block}")
        share = self.budget[block if len(self.budget) > 1 else 0]
        return share * importance

    def uncalibrated(self) -> str:
        """Say that a loss is given, and that nothing is known to keep to it by."""
        return (
            f"{self.describe()}: this bundle was not calibrated for loss= with importance={self.importance}; "
            "run wdmoe-bs calibrate (then record traces again), or give a budget"
        )

    def costs(self, pairs: Floats, importance: Floats, context: Context) -> tuple[Floats, float]:
        """Return what each pair counts if it is left out, and how much all that is left out may count.

        Args:
            pairs: importance of each pair, in any shape.
            importance: of all that the model chose, [tokens, k].
            context: of the block.

        Raises:
            ValueError: a loss is given, but was never calibrated for this bundle.
        """
        if self.loss == math.inf:
            whole = float(importance.sum(dtype=np.float64)) if self.budget else 0.0
            return pairs, self.allowance(whole, context.block)
        known = self._calibrated(context)
        return np.float32(known.nats) * pairs * pairs, self.loss * known.share * len(importance)

    def costs_of_one(
        self, pairs: Sequence[float], importance: Sequence[float], context: Context
    ) -> tuple[Sequence[float], float]:
        """Return the same of one token, in plain numbers."""
        if self.loss == math.inf:
            return pairs, self.allowance(sum(importance), context.block)
        known = self._calibrated(context)
        nats = np.float32(known.nats)
        return [float(nats * np.float32(pair) * np.float32(pair)) for pair in pairs], self.loss * known.share

    def _calibrated(self, context: Context) -> Sensitivity:
        known = (context.sensitivity or {}).get(self.importance)
        if known is None:
            raise ValueError(self.uncalibrated())
        return known


def check_budgets(policy: object, n_blocks: int) -> None:
    """Refuse a policy that has several budgets, but not one for each block of a model.

    Raises:
        ValueError: says how many there are.
    """
    if isinstance(policy, Options) and len(policy.budget) > 1 and len(policy.budget) != n_blocks:
        raise ValueError(
            f"{policy.describe()}: {len(policy.budget)} budgets for {n_blocks} blocks; give one, or one for each block"
        )


def policy_name(policy: type) -> str:
    """Return what users type: TopCut is `top-cut`."""
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in policy.__name__).lstrip("-")


def option_fields(policy: type) -> list[Field[Any]]:
    """Return the options of a policy: its own, then those that policies share."""
    shared = {field.name for field in fields(Options)}
    return sorted(fields(policy), key=lambda field: field.name in shared)


def parse_options(name: str, policy: type, text: str) -> dict[str, Any]:
    """Read `key=value,key=value`.

    Raises:
        ValueError: an option is unknown, or a value is not of its kind.
    """
    kinds = {field.name: type(field.default) for field in option_fields(policy)}
    options: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key not in kinds:
            raise ValueError(f"policy {name} has no option {key!r}; it has: {', '.join(kinds) or 'none'}")
        options[key] = _parse(f"policy {name}, option {key}", value, kinds[key])
    return options


def require(policy: object, option: str, holds: bool, expected: str, got: object = None) -> None:
    """Refuse an option's value unless a condition holds."""
    if not holds:
        value = getattr(policy, option) if got is None else got
        raise ValueError(f"{policy_name(type(policy))}: {option} is {value}, expected {expected}")


def _parse(where: str, value: str, kind: type) -> Any:
    if kind is str:
        return value
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{where} is {value!r}, expected true or false")
        return value.lower() == "true"
    expected = {int: "a whole number", float: "a number", tuple: "a number, or one for each block as in 0.1/0.2/0.1"}
    try:
        return tuple(map(float, value.split("/"))) if kind is tuple else kind(value)
    except ValueError as error:
        raise ValueError(f"{where} is {value!r}, expected {expected[kind]}") from error


def _spell(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)
