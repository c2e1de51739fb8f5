"""Selection policies: functions from a routing and what is known of devices to a plan. No clock, no socket, no chance.

docs/policies.md lists them with their rules and options.
"""

from __future__ import annotations

from wdmoe.bs.policies.bottleneck import Bottleneck, select_bottleneck
from wdmoe.bs.policies.capacity import Capacity, select_capacity
from wdmoe.bs.policies.exact import Exact, RoundRobin, select_exact, select_round_robin
from wdmoe.bs.policies.options import Context, Latencies, Sensitivity, option_fields, parse_options, policy_name
from wdmoe.bs.policies.rivals import Ser, TopCut, select_ser, select_top_cut
from wdmoe.bs.policies.wlr import Wlr, select_wlr
from wdmoe.bs.routing import Ints, Plan, Routing

__all__ = [
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
    "option_fields",
    "parse_policy",
    "select",
]

Policy = Exact | RoundRobin | Wlr | Ser | TopCut | Capacity | Bottleneck
POLICIES: dict[str, type[Policy]] = {
    policy_name(policy): policy for policy in (Exact, Wlr, RoundRobin, Ser, TopCut, Capacity, Bottleneck)
}
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
    match policy:
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
        case Bottleneck():
            return select_bottleneck(routing, owner, row_ms, policy, context)
