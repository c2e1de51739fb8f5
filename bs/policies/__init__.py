"""Selection policies: functions from a routing and what is known of devices to a plan. No clock, no socket, no chance.

docs/policies.md lists them with their rules and options.
"""

from __future__ import annotations

from wdmoe.bs.policies.bottleneck import Bottleneck, select_bottleneck
from wdmoe.bs.policies.capacity import Capacity, select_capacity
from wdmoe.bs.policies.exact import Exact, RoundRobin, select_exact, select_round_robin
from wdmoe.bs.policies.options import (
    Context,
    Latencies,
    Sensitivity,
    check_budgets,
    option_fields,
    parse_options,
    policy_name,
)
from wdmoe.bs.policies.rivals import Ser, TopCut, select_ser, select_top_cut
from wdmoe.bs.policies.wlr import Wlr, select_wlr
from wdmoe.bs.routing import Ints, Plan, Routing

__all__ = [
    "AUTO",
    "AUTO_LOSS",
    "POLICIES",
    "Bottleneck",
    "Capacity",
    "Context",
    "Exact",
    "Latencies",
    "Policy",
    "RoundRobin",
    "Sensitivity",
    "Ser",
    "TopCut",
    "Wlr",
    "check_budgets",
    "option_fields",
    "parse_policy",
    "resolve_auto",
    "select",
]

Policy = Exact | RoundRobin | Wlr | Ser | TopCut | Capacity | Bottleneck
POLICIES: dict[str, type[Policy]] = {
    policy_name(policy): policy for policy in (Exact, Wlr, RoundRobin, Ser, TopCut, Capacity, Bottleneck)
}
AUTO = "auto"  # what users type for the best that is known for their bundle
# Nats that a token may lose under `auto`. Of ten families of options, `bottleneck` with this loss and without
# renormalisation gained most within the margin of the quality bar, on training text, the small model and the testbed's
# modelled devices: scripts/bench/tune_policies.py finds it, docs/policies.md has the figures.
AUTO_LOSS = 0.0075
_NOTHING_KNOWN = Context()


def parse_policy(text: str) -> Policy:
    """Read a policy as users type it: a name, then options after a colon, as in `wlr:alpha=0.4,renormalise=false`.

    Raises:
        ValueError: the name or an option is unknown, or a value does not fit.
    """
    name, _, rest = text.partition(":")
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}, expected one of {', '.join(POLICIES)}")
    return POLICIES[name](**parse_options(name, POLICIES[name], rest))


def resolve_auto(text: str, calibrated: bool) -> str:
    """Return the policy that `auto` stands for, as `describe` names it; any other text as it is.

    Args:
        text: a policy as users type it.
        calibrated: whether it is known what the blocks lose (`wdmoe-bs calibrate`), without which no loss can be kept to.

    Raises:
        ValueError: `auto` is given options.
    """
    name, colon, _ = text.partition(":")
    if name != AUTO:
        return text
    if colon:
        raise ValueError(
            f"policy auto takes no options, got {text!r}; name the policy to choose them, as in bottleneck:loss=0.01"
        )
    return (Bottleneck(loss=AUTO_LOSS, renormalise=False) if calibrated else Bottleneck()).describe()


def select(routing: Routing, owner: Ints, row_ms: Latencies, policy: Policy, context: Context = _NOTHING_KNOWN) -> Plan:
    """Decide which experts are asked for which tokens in one block.

    Args:
        routing: the model's own choice.
        owner: [n_experts], the device of each expert, 0 .. n_devices - 1.
        row_ms: [n_devices], predicted time of one row on each device, milliseconds.
        policy: what to do.
        context: what else is known of the block.

    Raises:
        ValueError: the policy's options ask for what is not known of this model.
    """
    match policy:  # the default first: it is asked most
        case Bottleneck():
            return select_bottleneck(routing, owner, row_ms, policy, context)
        case Exact():
            return select_exact(routing)
        case RoundRobin():
            return select_round_robin(routing, context)
        case Wlr():
            return select_wlr(routing, owner, row_ms, policy, context)
        case Ser():
            return select_ser(routing, policy, context)
        case TopCut():
            return select_top_cut(routing, owner, policy, context)
        case Capacity():
            return select_capacity(routing, owner, row_ms, policy, context)
