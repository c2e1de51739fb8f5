"""One decision: which pairs are asked for, and what each device may use of the air. Plain values in, plain values out.

What a run, virtual time, the simulator and the benches decide is decided here: `context_of` and `choose` select,
`decide` also says how the air is used and how long the block should take.

Selection wants to know how fast devices are, which the division of a band decides; the division wants to know the loads,
which the selection decides. `bottleneck` knows such a band as a whole and is asked once; policies that know a device by
its row time may be asked again under the division that they led to (their option `rounds`), and the best round is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from wdmoe.bs import one_token
from wdmoe.bs.airtime import BlockTime, Ints, LatencyModel, Load, Medium, Times, latency_model, load_of, makespan
from wdmoe.bs.allocation import per_block, with_shares
from wdmoe.bs.latency import DeviceLatency
from wdmoe.bs.one_token import RowModel, RowTimes
from wdmoe.bs.policies import Bottleneck, Capacity, Context, Policy, RoundRobin, Sensitivity, Wlr, select
from wdmoe.bs.policies.exact import select_exact
from wdmoe.bs.routing import Bools, Floats, Plan, Routing, softmax

_NO_TIMES: Times = np.empty(0)
_TIMED = (Wlr, Capacity, Bottleneck)  # tuples: to make a union for each decision takes longer than to ask
_BY_ROW_TIME = (Wlr, Capacity)
_DEALING = (RoundRobin, Bottleneck)


@dataclass(frozen=True, slots=True)
class Decision:
    """What is asked of the devices in one block, and how long it should take."""

    plan: Plan
    load: Load
    block: BlockTime  # with the order of requests on a shared channel
    shares: Times | None  # [K], of a band that is divided for this block; else None


def knows_times(policy: Policy) -> bool:
    """Whether a policy looks at how fast devices are."""
    return isinstance(policy, _TIMED)


def asks_replicas(policy: Policy) -> bool:
    """Whether a policy asks others than the device that is preferred for an expert."""
    return isinstance(policy, _DEALING)


def reads_probabilities(policy: Policy) -> bool:
    """Whether a policy looks at what the router said of experts that it did not choose."""
    return isinstance(policy, Capacity) and policy.overflow == "next"


def context_of(
    policy: Policy,
    block: int,
    routing: Routing,
    router_logits: Floats,
    latencies: Sequence[DeviceLatency],
    medium: Medium,
    *,
    norms: Floats | None = None,
    holders: Bools | None = None,
    sensitivity: dict[str, Sensitivity] | None = None,
) -> Context:
    """Say what a policy may know of a block in a run; what it does not look at is not worked out.

    Args:
        policy: that is to be asked.
        block: number of it.
        routing: the model's own choice.
        router_logits: [tokens, n_experts].
        latencies: of the devices.
        medium: what their links are.
        norms: [n_experts].
        holders: [n_experts, n_devices].
        sensitivity: of the block.
    """
    return Context(
        block,
        model_of(latencies, len(routing.experts), medium) if knows_times(policy) else None,
        norms,
        holders,
        softmax(router_logits) if reads_probabilities(policy) else None,
        sensitivity,
    )


def model_of(latencies: Sequence[DeviceLatency], tokens: int, medium: Medium) -> RowTimes:
    """Return what is known of the devices, in the form that is sooner for so many tokens."""
    return RowModel(latencies, medium) if tokens == 1 else latency_model(latencies, tokens, medium=medium)


def choose(routing: Routing, owner: Ints, policy: Policy, context: Context) -> Plan:
    """Select for one block.

    Args:
        routing: the model's own choice.
        owner: [n_experts], the device that is preferred for each expert.
        policy: what to do.
        context: what is known of the block; its model is needed where the policy looks at times.
    """
    model = context.model
    # For one token no row time would change what `wlr` and `capacity` do.
    if model is None or len(routing.experts) == 1 or not isinstance(policy, _BY_ROW_TIME):
        return select(routing, owner, _NO_TIMES, policy, context)
    assert isinstance(model, LatencyModel)
    best = plan = select(routing, owner, row_times(routing, owner, model), policy, context)
    if policy.rounds == 1 or model.medium != "pooled":
        return best
    shares, best_ms = per_block(load_of_plan(plan, routing, owner, model.n_devices), model)
    for _ in range(policy.rounds - 1):
        # A device that is asked for nothing now has no share; it is known by the smallest one.
        shares = np.where(shares > 0, shares, shares[shares > 0].min(initial=1.0))
        before, times_ms = plan, row_times(routing, owner, with_shares(model, shares))
        plan = select(routing, owner, times_ms, policy, context)
        if np.array_equal(plan.keep, before.keep):
            break
        shares, total_ms = per_block(load_of_plan(plan, routing, owner, model.n_devices), model)
        if total_ms < best_ms:
            best, best_ms = plan, total_ms
    return best


def decide(routing: Routing, owner: Ints, policy: Policy, context: Context, model: RowTimes) -> Decision:
    """Select for one block, and say how the air is used and how long it takes.

    Args:
        routing: the model's own choice.
        owner: [n_experts], the device that is preferred for each expert.
        policy: what to do.
        context: see `choose`.
        model: of the devices, on the medium that counts.
    """
    plan = choose(routing, owner, policy, context)
    if len(routing.experts) == 1:
        return Decision(plan, *one_token.time_of(plan, one_token.devices_of(plan, routing, owner), model))
    assert isinstance(model, LatencyModel)
    load = load_of_plan(plan, routing, owner, model.n_devices)
    if model.medium != "pooled":
        return Decision(plan, load, makespan(load, model), None)
    shares, total_ms = per_block(load, model)
    finish_ms: Times = (load.rows > 0) * np.float64(total_ms)
    return Decision(plan, load, BlockTime(total_ms, finish_ms), shares)


def load_of_plan(plan: Plan, routing: Routing, owner: Ints, n_devices: int) -> Load:
    """Count what a plan asks of each device, if its policy did not."""
    if plan.load is not None:
        return plan.load
    experts = routing.experts if plan.experts is None else plan.experts
    asked = owner[experts] if plan.devices is None else plan.devices
    return load_of(experts, plan.keep, asked, len(owner), n_devices)


def pairs_of_model(plan: Plan, routing: Routing, owner: Ints, n_devices: int) -> int:
    """Count the pairs of the model's own choice, asked of whom the plan asks: with nothing left out, or other experts taken."""
    if len(routing.experts) == 1:
        return len(set((owner[routing.experts] if plan.devices is None else plan.devices)[0].tolist()))
    everything = replace(select_exact(routing), devices=plan.devices)
    return int(load_of_plan(everything, routing, owner, n_devices).rows.sum())


def row_times(routing: Routing, owner: Ints, model: LatencyModel) -> Times:
    """Predict the time of one row on each device at the load of the model's own top-k; of an idle one, of a single row.

    Returns:
        [n_devices] milliseconds.
    """
    counts = np.bincount(routing.experts.ravel(), minlength=len(owner))
    rows = np.bincount(owner, counts, model.n_devices)
    calls_ms = np.bincount(owner, model.call_ms(owner, counts), model.n_devices)
    idle = rows == 0
    if idle.any():
        everyone = np.arange(model.n_devices)
        calls_ms = np.where(idle, model.call_ms(everyone, np.ones_like(everyone)), calls_ms)
        rows = np.where(idle, 1.0, rows)
    result: Times = (2 * model.way_ms + calls_ms) / rows + model.staging_ms + model.row_air_ms
    return result
