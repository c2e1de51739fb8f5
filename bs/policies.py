"""Selection policies: functions from a routing and per-row latencies to a plan. No clock, no socket, no chance.

The unit that costs, and so the unit that may be dropped, is the pair (token, device): a token's row travels once to
a device that holds one or more of its experts, and one weighted sum comes back.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from wdmoe.bs.routing import Bools, Floats, Ints, Plan, Routing, pair_weights, pairs_used

Latencies = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Exact:
    """The model's own top-k: the control."""

    def describe(self) -> str:
        """Name the policy with what differs from its defaults."""
        return "exact"


@dataclass(frozen=True, slots=True)
class Wlr:
    """Weight-to-latency ratio; our reconstruction of WDMoE's selection (docs/architecture.md).

    alpha is the first threshold theta, `step` its increment, gamma the gain in WLR at which it stops.
    """

    alpha: float = 0.5
    step: float = 0.05
    gamma: float = 1.05
    renormalise: bool = True  # scale what is kept of a token to the sum it had

    def __post_init__(self) -> None:
        """Refuse options under which the search would not end or mean nothing."""
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"wlr: alpha is {self.alpha}, expected 0 to 1 (a cosine of non-negative vectors)")
        if not 0 < self.step <= 1:
            raise ValueError(f"wlr: step is {self.step}, expected more than 0 and at most 1")
        if not self.gamma >= 1:
            raise ValueError(f"wlr: gamma is {self.gamma}, expected at least 1")

    def describe(self) -> str:
        """Name the policy with what differs from its defaults."""
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return ":".join(["wlr", ",".join(changed)]) if changed else "wlr"


Policy = Exact | Wlr
POLICIES: dict[str, type[Exact | Wlr]] = {"exact": Exact, "wlr": Wlr}


def parse_policy(text: str) -> Policy:
    """Read a policy as users type it: a name, then options after a colon, as in `wlr:alpha=0.4,renormalise=false`.

    Raises:
        ValueError: the name or an option is unknown, or a value does not fit.
    """
    name, _, rest = text.partition(":")
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}, expected one of {', '.join(POLICIES)}")
    kinds = {field.name: type(field.default) for field in fields(POLICIES[name])}
    options: dict[str, float | bool] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key not in kinds:
            raise ValueError(f"policy {name} has no option {key!r}; it has: {', '.join(kinds) or 'none'}")
        options[key] = _parse_option(f"policy {name}, option {key}", value, kinds[key])
    return POLICIES[name](**options)  # type: ignore[arg-type]


def select(routing: Routing, owner: Ints, row_ms: Latencies, policy: Policy) -> Plan:
    """Decide which experts are asked for which tokens in one block.

    Args:
        routing: the model's own choice.
        owner: [n_experts], the device of each expert, 0 .. n_devices - 1.
        row_ms: [n_devices], predicted time of one row on each device, milliseconds.
        policy: what to do.
    """
    match policy:
        case Exact():
            return Plan(np.ones(routing.experts.shape, np.bool_), routing.weights)
        case Wlr():
            return _select_wlr(routing, owner, row_ms, policy)


def _select_wlr(routing: Routing, owner: Ints, row_ms: Latencies, policy: Wlr) -> Plan:
    """Raise theta until dropping the minor pairs of tokens with S <= theta gains gamma in WLR.

    S is the cosine between a token's weights by device and the devices' latencies: where it is low, the weight
    sits on fast devices, and the minor pair can go cheaply. Each theta starts again from the model's top-k, so a
    token loses at most its smallest pair. WLR = sum over devices of (weights of their pairs) / (rows x row_ms).
    """
    pairs = pair_weights(routing, owner, len(row_ms))
    used = pairs_used(routing.experts, np.ones(routing.experts.shape, np.bool_), owner, len(row_ms))
    similarity = (pairs @ row_ms) / (np.linalg.norm(pairs, axis=1) * np.linalg.norm(row_ms))
    smallest = np.where(used, pairs, np.inf).argmin(axis=1)
    droppable = used.sum(axis=1) > 1
    weight_by_device, rows_by_device = pairs.sum(axis=0), used.sum(axis=0)
    minor = pairs[np.arange(len(pairs)), smallest]

    start = _wlr(weight_by_device, rows_by_device, row_ms)
    step = 0
    while True:
        theta = min(1.0, policy.alpha + step * policy.step)
        # A cosine can come out a rounding above 1.
        drop = droppable & ((similarity <= theta) | (theta >= 1.0))
        where = smallest[drop]
        weight = weight_by_device - np.bincount(where, minor[drop], len(row_ms))
        rows = rows_by_device - np.bincount(where, minlength=len(row_ms))
        gained = _wlr(weight, rows, row_ms) > policy.gamma * start
        if gained or theta >= 1.0:
            break
        step += 1
    keep = ~(drop[:, None] & (owner[routing.experts] == smallest[:, None]))
    stopped = "gain reached" if gained else "theta at its end"
    return Plan(keep, _kept_weights(routing, keep, policy.renormalise), theta, stopped)


def _wlr(weight: npt.NDArray[np.floating], rows: Ints, row_ms: Latencies) -> float:
    busy = rows > 0
    return float((weight[busy] / (rows[busy] * row_ms[busy])).sum())


def _kept_weights(routing: Routing, keep: Bools, renormalise: bool) -> Floats:
    weights = np.where(keep, routing.weights, np.float32(0))
    if renormalise:
        weights *= routing.weights.sum(axis=1, keepdims=True) / weights.sum(axis=1, keepdims=True)
    return weights


def _parse_option(where: str, value: str, kind: type) -> float | bool:
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{where} is {value!r}, expected true or false")
        return value.lower() == "true"
    try:
        return float(value)
    except ValueError as error:
        raise ValueError(f"{where} is {value!r}, expected a number") from error
