"""The loop fed from a trace: the decision functions and the latency model of a live run, without stages and experts.

One question at a time, block by block: routing from the trace, `select`, the loads of what it kept, the time of the block
on the medium. All that comes out is modelled; nothing is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from wdmoe.bs.airtime import LatencyModel, load_of, makespan
from wdmoe.bs.deciding import row_times
from wdmoe.bs.policies import Capacity, Context, Policy, select
from wdmoe.bs.radio import Cell
from wdmoe.bs.routing import Bools, Floats, Ints, Routing
from wdmoe.bs.trace import Trace

Times = npt.NDArray[np.float64]
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
        shares = self.shares if self.shares is not None else 1 / model.n_devices
        return model.with_rates(model.down_ms / shares, model.up_ms / shares, "own")


@dataclass(frozen=True, slots=True)
class Replicas:
    """The (expert, device) pairs of one block, numbered: to a policy each is an expert of its own."""

    device: Ints  # [V], of each pair, those of an expert side by side
    first: Ints  # [n_experts], number of its first pair
    count: Ints  # [n_experts]

    @classmethod
    def of(cls, holders: Bools) -> Replicas:
        """Number the pairs of `holders` [n_experts, K]."""
        _, device = np.nonzero(holders)
        count = holders.sum(axis=1)
        return cls(device, np.cumsum(count) - count, count)

    def deal(self, experts: Ints) -> Ints:
        """Deal the rows of each expert to its holders in turn: experts [tokens, k] -> pairs [tokens, k]."""
        if len(self.device) == len(self.count):
            return experts
        flat = experts.ravel()
        order = np.argsort(flat, kind="stable")
        counts = np.bincount(flat, minlength=len(self.count))
        turn = np.empty(len(flat), np.int64)
        turn[order] = np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts)
        return (self.first[flat] + turn % self.count[flat]).reshape(experts.shape)

    def spread(self, probabilities: Floats, routing: Routing, dealt: Routing) -> Floats:
        """Turn probabilities of experts [tokens, n_experts] into those of pairs [tokens, V].

        Each expert is offered to a token by one of its holders alone: where it was chosen by the one it was dealt to.
        """
        if len(self.device) == len(self.count):
            return probabilities
        turn = np.arange(len(probabilities))[:, None]
        offered = self.first + turn % self.count
        np.put_along_axis(offered, routing.experts, dealt.experts, axis=1)
        whole = np.zeros((len(probabilities), len(self.device)), np.float32)
        np.put_along_axis(whole, offered, probabilities, axis=1)
        return whole


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
    replicas = [Replicas.of(holders) for holders in site.holders]
    for question in range(trace.n_questions) if questions is None else questions:
        waiting_ms = 0.0
        for block in range(trace.n_blocks):
            routing = trace.routing(block, question)
            probabilities = trace.probabilities[block, trace.starts[question] : trace.starts[question + 1]]
            context = Context(
                block, site.now(), probabilities=probabilities.astype(np.float32), sensitivity=trace.sensitivity(block)
            )
            block_ms = _block_ms(routing, replicas[block], context, policy, result)
            waiting_ms += block_ms
            if site.cell is not None:
                site.cell.pass_time((block_ms + site.stage_ms) / 1e3)
        result.waiting_ms.append(waiting_ms)
        result.latency_ms.append(waiting_ms + (trace.n_blocks + 1) * site.stage_ms)
        result.tokens += len(routing.experts)
        on_question()
    return result


def _block_ms(routing: Routing, replicas: Replicas, context: Context, policy: Policy, result: Simulated) -> float:
    model = context.model
    assert model is not None
    dealt = Routing(replicas.deal(routing.experts), routing.weights)
    if isinstance(policy, Capacity) and context.probabilities is not None:  # alone reads them
        context = replace(context, probabilities=replicas.spread(context.probabilities, routing, dealt))
    devices, everything = replicas.device[dealt.experts], np.ones(dealt.experts.shape, np.bool_)
    n_pairs, n_devices = len(replicas.device), model.n_devices
    before = load_of(dealt.experts, everything, devices, n_pairs, n_devices)
    plan = select(dealt, replicas.device, row_times(dealt, replicas.device, model), policy, context)
    asked = dealt.experts if plan.experts is None else plan.experts
    devices = replicas.device[asked] if plan.devices is None else plan.devices
    after = load_of(asked, plan.keep, devices, n_pairs, n_devices)
    result.pairs += int(before.rows.sum())
    result.droppable += int(before.rows.sum()) - len(devices)
    result.sent += int(after.rows.sum())
    result.gate_mass += float(routing.weights.sum())
    result.gate_mass_dropped += plan.dropped_mass(dealt)
    return makespan(after, model).total_ms


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
    replicas = [Replicas.of(holders) for holders in site.holders]
    air, fixed = [], []
    for question in questions:
        for block in range(trace.n_blocks):
            experts = replicas[block].deal(trace.routing(block, question).experts)
            devices = replicas[block].device[experts]
            keep = np.ones(experts.shape, np.bool_)
            load = load_of(experts, keep, devices, len(replicas[block].device), site.model.n_devices)
            air.append(load.rows * site.model.row_air_ms)
            fixed.append(np.where(load.rows > 0, 2 * site.model.way_ms + load.compute_ms(site.model), 0.0))
    return np.array(air), np.array(fixed)


def static_shares(air_ms: Times, fixed_ms: Times, steps: int = 2000) -> Times:
    """Divide a band once for all blocks, so that the mean block time is least: [K] shares that sum to 1.

    The mean over blocks of max_k (fixed + air / share) is convex in the shares; multiplicative subgradient steps that
    shrink find its least value to about a thousandth.

    Args:
        air_ms: [blocks, K], as `block_loads` counts them.
        fixed_ms: [blocks, K].
        steps: more are more exact.
    """
    shares = air_ms.mean(axis=0) + 1e-9 * air_ms.max()
    shares = shares / shares.sum()
    best: Times = shares
    best_ms = np.inf
    rows = np.arange(len(air_ms))
    for step in range(steps):
        finish_ms = fixed_ms + air_ms / shares
        last = finish_ms.argmax(axis=1)
        mean_ms = float(finish_ms[rows, last].mean())
        if mean_ms < best_ms:
            best, best_ms = shares, mean_ms
        pull = np.bincount(last, air_ms[rows, last] / shares[last], len(shares))
        shares = shares * np.exp(0.5 / np.sqrt(step + 1) * pull / pull.max())
        shares = shares / shares.sum()
    return best
