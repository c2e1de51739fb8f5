"""The loop fed from a trace: the decision functions and the latency model of a live run, without stages and experts.

One question at a time, block by block: routing from the trace, `select`, the loads of what it kept, the time of the block
on the medium. All that comes out is modelled; nothing is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from wdmoe.bs.airtime import LatencyModel, Times
from wdmoe.bs.allocation import parts_ms, uniform, with_shares
from wdmoe.bs.allocation import static as static_shares
from wdmoe.bs.deciding import decide, load_of_plan, pairs_of_model, reads_probabilities
from wdmoe.bs.policies import Context, Policy, check_budgets
from wdmoe.bs.policies.exact import Replicas, select_exact
from wdmoe.bs.radio import Cell
from wdmoe.bs.routing import Bools, Ints, Routing
from wdmoe.bs.trace import Trace

__all__ = [
    "BANDWIDTHS",
    "Bandwidth",
    "Replicas",
    "Simulated",
    "Site",
    "block_loads",
    "holders_of",
    "preferred",
    "simulate",
    "spread",
    "static_shares",
]
Bandwidth = Literal["shared", "uniform", "static", "per-block"]
BANDWIDTHS: tuple[Bandwidth, ...] = ("shared", "uniform", "static", "per-block")


@dataclass(frozen=True, slots=True)
class Site:
    """Devices, the experts that they hold, and the medium between them and the base station."""

    model: LatencyModel  # with the whole band for each device; its `medium` is not looked at
    holders: Bools  # [n_blocks, n_experts, K]
    bandwidth: Bandwidth = "shared"
    shares: Times | None = None  # [K], where bandwidth is static
    stage_ms: float = 1.0  # of the base station
    cell: Cell | None = None  # rates come from it; None: from the model
    row_bits: float = 65_536.0  # one way, as charged; only with a cell

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        if not self.holders.any(axis=2).all():
            block, expert = np.argwhere(~self.holders.any(axis=2))[0]
            raise ValueError(f"expert {expert} of block {block} is on no device")
        if self.holders.shape[2] != self.model.n_devices:
            raise ValueError(f"holders speak of {self.holders.shape[2]} devices, the model of {self.model.n_devices}")
        if (self.bandwidth == "static") != (self.shares is not None):
            raise ValueError("static bandwidth, and no other, needs the shares of the devices")

    def now(self) -> LatencyModel:
        """Return the latency model of this block: rates of this moment, on the medium."""
        model = self.model
        if self.cell is not None:
            down, up = self.cell.efficiencies()
            bits_per_ms = self.cell.config.mhz * 1e3  # at 1 bit/s/Hz
            model = model.with_rates(self.row_bits / (down * bits_per_ms), self.row_bits / (up * bits_per_ms))
        if self.bandwidth in ("shared", "per-block"):
            return model.with_rates(model.down_ms, model.up_ms, "shared" if self.bandwidth == "shared" else "pooled")
        return with_shares(model, uniform(model.n_devices) if self.shares is None else self.shares)


@dataclass(slots=True)
class Simulated:
    """What one policy did in a simulation."""

    policy: str
    latency_ms: list[float] = field(default_factory=list)  # of each question
    waiting_ms: list[float] = field(default_factory=list)  # of each question, its blocks together
    tokens: int = 0
    pairs: int = 0  # of the model's own choice
    droppable: int = 0  # of these, all but one a token
    sent: int = 0
    gate_mass: float = 0.0
    gate_mass_dropped: float = 0.0

    def summary(self) -> dict[str, Any]:
        """Return plain values."""
        latency = np.array(self.latency_ms)
        p50, p95 = np.percentile(latency, (50, 95))
        return {
            "policy": self.policy,
            "questions": len(latency),
            "tokens": self.tokens,
            "latency_mean_ms": float(latency.mean()),
            "latency_p50_ms": float(p50),
            "latency_p95_ms": float(p95),
            "waiting_ms": float(np.mean(self.waiting_ms)),
            "dropped_share": (self.pairs - self.sent) / self.droppable if self.droppable else 0.0,
            "gate_mass_dropped": self.gate_mass_dropped / self.gate_mass if self.gate_mass else 0.0,
        }


def simulate(
    trace: Trace,
    site: Site,
    policy: Policy,
    questions: Sequence[int] | None = None,
    on_question: Callable[[], None] = lambda: None,
) -> Simulated:
    """Answer questions of a trace one after another.

    Args:
        trace: what the routers said.
        site: where; its cell, if it has one, goes on from where it is.
        policy: what to do.
        questions: which ones; None: all.
        on_question: called as each is done.
    """
    if site.holders.shape[:2] != (trace.n_blocks, trace.n_experts):
        raise ValueError(
            f"the devices hold {site.holders.shape[0]} blocks of {site.holders.shape[1]} experts, the trace has "
            f"{trace.n_blocks} of {trace.n_experts}"
        )
    result = Simulated(policy.describe())
    check_budgets(policy, trace.n_blocks)
    owners = [preferred(holders) for holders in site.holders]
    for question in range(trace.n_questions) if questions is None else questions:
        waiting_ms = 0.0
        for block in range(trace.n_blocks):
            routing = trace.routing(block, question)
            context = Context(
                block,
                site.now(),
                norms=None if trace.norms is None else trace.norms[block],
                holders=site.holders[block],
                probabilities=trace.probabilities_of(block, question) if reads_probabilities(policy) else None,
                sensitivity=trace.sensitivity(block),
            )
            block_ms = _block_ms(routing, owners[block], context, policy, result)
            waiting_ms += block_ms
            if site.cell is not None:
                site.cell.pass_time((block_ms + site.stage_ms) / 1e3)
        result.waiting_ms.append(waiting_ms)
        result.latency_ms.append(waiting_ms + (trace.n_blocks + 1) * site.stage_ms)
        result.tokens += len(routing.experts)
        on_question()
    return result


def _block_ms(routing: Routing, owner: Ints, context: Context, policy: Policy, result: Simulated) -> float:
    model = context.model
    assert model is not None
    decision = decide(routing, owner, policy, context, model)
    pairs = pairs_of_model(decision.plan, routing, owner, model.n_devices)
    result.pairs += pairs
    result.droppable += pairs - len(routing.experts)
    result.sent += int(decision.load.rows.sum())
    result.gate_mass += float(routing.weights.sum())
    result.gate_mass_dropped += decision.plan.dropped_mass(routing)
    return decision.block.total_ms


def preferred(holders: Bools) -> Ints:
    """Choose the device that each expert of a block is asked of where its rows are not dealt out: [n_experts].

    One expert after another goes to the holder that is preferred for the fewest so far, of equals the first.

    Args:
        holders: [n_experts, K].
    """
    owned, owner = np.zeros(holders.shape[1], np.int64), np.empty(len(holders), np.int64)
    for expert, mine in enumerate(holders):
        them = np.flatnonzero(mine)
        owner[expert] = them[owned[them].argmin()]
        owned[owner[expert]] += 1
    return owner


def spread(n_blocks: int, n_experts: int, n_devices: int, replicas: int = 1) -> Bools:
    """Place experts on devices evenly: [n_blocks, n_experts, K].

    With fewer devices than experts each holds a run of experts, and the first ones one more where it does not divide;
    with more, device k holds expert k modulo the experts. Copies go to the devices that follow.

    Args:
        n_blocks: all are placed alike.
        n_experts: of a block.
        n_devices: at least 1.
        replicas: devices that hold each expert, at least.
    """
    if not 1 <= replicas <= n_devices:
        raise ValueError(f"{replicas} replicas on {n_devices} devices; expected 1 to {n_devices}")
    holders = np.zeros((n_experts, n_devices), np.bool_)
    if n_devices <= n_experts:
        of_expert = np.sort(np.arange(n_experts) % n_devices)
        for copy in range(replicas):
            holders[np.arange(n_experts), (of_expert + copy) % n_devices] = True
    else:
        device = np.arange(n_devices)
        holders[device % n_experts, device] = True
        for expert in range(n_experts):
            for step in range(replicas - int(holders[expert].sum())):
                holders[expert, (expert + 1 + step * n_experts) % n_devices] = True
    return np.broadcast_to(holders, (n_blocks, n_experts, n_devices))


def holders_of(placement: Ints) -> Bools:
    """Turn one holder of each expert, [n_blocks, n_experts], into holders."""
    n_devices = int(placement.max()) + 1
    holders: Bools = placement[:, :, None] == np.arange(n_devices)
    return holders


def block_loads(trace: Trace, site: Site, questions: Sequence[int]) -> tuple[Times, Times]:
    """Return what exact asks of each device in each block: milliseconds of air with the whole band, and besides.

    Args:
        trace: what the routers said.
        site: where; with the rates of the model.
        questions: which ones.

    Returns:
        two arrays [questions x n_blocks, K].
    """
    owners = [preferred(holders) for holders in site.holders]
    parts = []
    for question in questions:
        for block in range(trace.n_blocks):
            routing = trace.routing(block, question)
            load = load_of_plan(select_exact(routing), routing, owners[block], site.model.n_devices)
            parts.append(parts_ms(load, site.model))
    air_ms, fixed_ms = map(np.array, zip(*parts, strict=True))
    return air_ms, fixed_ms
