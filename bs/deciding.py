"""One decision: which pairs are asked for, and what each device may use of the air. Plain values in, plain values out.

Selection wants to know how fast devices are, which the division of the band decides; the division wants to know the
loads, which the selection decides. `bottleneck` knows the band as a whole (medium "pooled") and is asked once; policies
that know a device by its row time alone start from a uniform division and may be asked again under the one that they
led to (`rounds`); the best of all rounds is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from wdmoe.bs.airtime import BlockTime, Ints, LatencyModel, Load, Times, load_of, makespan
from wdmoe.bs.allocation import Radio, per_block, uniform
from wdmoe.bs.policies import Bottleneck, Capacity, Context, Policy, Wlr, select
from wdmoe.bs.routing import Plan, Routing

Division = Literal["uniform", "per-block", "shared"]


@dataclass(frozen=True, slots=True)
class Band:
    """Devices on one radio, made ready once for many decisions; see `make_band`."""

    devices: LatencyModel
    radio: Radio
    uniform: LatencyModel  # on equal shares
    shared: LatencyModel
    pooled: LatencyModel


def make_band(devices: LatencyModel, radio: Radio) -> Band:
    """Put devices on a radio.

    Args:
        devices: what they compute; their links do not matter.
        radio: says how fast their links are.
    """
    equal = radio.model(devices, uniform(radio))
    return Band(devices, radio, equal, radio.whole(devices, "shared"), radio.whole(devices, "pooled"))


@dataclass(frozen=True, slots=True)
class Decision:
    """What is asked of the devices in one block, and how long it should take."""

    plan: Plan
    load: Load
    block: BlockTime  # with the order of requests on a shared channel
    shares_hz: Times | None  # [K]; None on a shared channel


def decide(
    routing: Routing,
    owner: Ints,
    policy: Policy,
    band: Band,
    division: Division | Times,
    context: Context,
    rounds: int = 1,
) -> Decision:
    """Select and allocate for one block.

    Args:
        routing: the model's own choice.
        owner: [n_experts], the device of each expert.
        policy: what to do.
        band: the devices and their radio.
        division: how the band is divided, or a fixed division such as `allocation.static` gives, [K] Hz.
        context: what else is known of the block; its model is not read.
        rounds: how often selection and a division per block may take turns.
    """
    if isinstance(division, str) and division == "shared":
        plan, load = _select(routing, owner, policy, band.shared, context)
        return Decision(plan, load, makespan(load, band.shared), None)
    radio, devices = band.radio, band.devices
    if not isinstance(division, str) or division == "uniform":
        shares_hz = uniform(radio) if isinstance(division, str) else division
        model = band.uniform if isinstance(division, str) else radio.model(devices, shares_hz)
        plan, load = _select(routing, owner, policy, model, context)
        return Decision(plan, load, makespan(load, model), shares_hz)
    if isinstance(policy, Bottleneck) and radio.rate == "linear":
        return _divided(*_select(routing, owner, policy, band.pooled, context), devices, radio)
    if not isinstance(policy, (Wlr, Capacity, Bottleneck)):
        return _divided(*_select(routing, owner, policy, devices, context), devices, radio)  # they know no times
    model, best = band.uniform, None
    for turn in range(rounds):
        plan, load = _select(routing, owner, policy, model, context)
        found = _divided(plan, load, devices, radio)
        if best is None or found.block.total_ms < best.block.total_ms:
            best = found
        if turn < rounds - 1 and found.shares_hz is not None:
            # A device that is asked for nothing now has no share; it is known by the smallest one.
            least_hz = found.shares_hz[load.rows > 0].min()
            model = radio.model(devices, np.where(load.rows > 0, found.shares_hz, least_hz))
    if best is None:
        raise ValueError(f"{rounds} rounds, expected at least 1")
    return best


def row_times(routing: Routing, owner: Ints, model: LatencyModel) -> Times:
    """Predict the time of one row on each device at the load of the model's own top-k; of an idle one, of a single row.

    Returns:
        [n_devices] milliseconds.
    """
    if len(routing.experts) == 1:
        # A row with one expert call on each device, but where the token has several experts.
        call_ms = model.tables[model.table, 1] * model.slowness
        result: Times = 2 * model.way_ms + call_ms + model.staging_ms + model.row_air_ms
        asked = owner[routing.experts[0]].tolist()
        for k in set(asked):
            if (n := asked.count(k)) > 1:
                result[k] -= 2 * model.way_ms[k] * (1 - 1 / n)
        return result
    counts = np.bincount(routing.experts.ravel(), minlength=len(owner))
    rows = np.bincount(owner, counts, model.n_devices)
    calls_ms = np.bincount(owner, model.call_ms(owner, counts), model.n_devices)
    idle = rows == 0
    if idle.any():
        everyone = np.arange(model.n_devices)
        calls_ms = np.where(idle, model.call_ms(everyone, np.ones_like(everyone)), calls_ms)
        rows = np.where(idle, 1.0, rows)
    result = (2 * model.way_ms + calls_ms) / rows + model.staging_ms + model.row_air_ms
    return result


def _select(routing: Routing, owner: Ints, policy: Policy, model: LatencyModel, context: Context) -> tuple[Plan, Load]:
    times = row_times(routing, owner, model) if isinstance(policy, (Wlr, Capacity)) else model.way_ms
    plan = select(routing, owner, times, policy, replace(context, model=model))
    experts = routing.experts if plan.experts is None else plan.experts
    asked = owner[experts] if plan.devices is None else plan.devices
    return plan, load_of(experts, plan.keep, asked, len(owner), model.n_devices)


def _divided(plan: Plan, load: Load, devices: LatencyModel, radio: Radio) -> Decision:
    allocation = per_block(load, devices, radio)
    finish_ms: Times = (load.rows > 0) * np.float64(allocation.total_ms)
    return Decision(plan, load, BlockTime(allocation.total_ms, finish_ms), allocation.shares_hz)
