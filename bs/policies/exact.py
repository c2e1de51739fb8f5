"""Policies that change nothing of what the model computes: `exact`, and `round-robin` over replicas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wdmoe.bs.policies.options import Context
from wdmoe.bs.routing import Bools, Ints, Plan, Routing, everything, small_ints


@dataclass(frozen=True, slots=True)
class Exact:
    """The model's own top-k: the control."""

    def describe(self) -> str:
        """Name the policy."""
        return "exact"


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """The model's own top-k; the rows of each expert are dealt in turn to all devices that hold it."""

    def describe(self) -> str:
        """Name the policy."""
        return "round-robin"


def select_exact(routing: Routing) -> Plan:
    """Keep everything."""
    return Plan(everything(*routing.experts.shape), routing.weights)


def select_round_robin(routing: Routing, context: Context) -> Plan:
    """Deal the rows of an expert to its holders; the block number decides who begins.

    With several experts on a device a token may need more rows than under `exact`: the deal does not look at that.
    """
    plan = select_exact(routing)
    if context.holders is None or int(np.count_nonzero(context.holders)) == len(context.holders):
        return plan  # nobody holds what another holds, too
    if len(routing.experts) == 1:
        holding = [context.holders[expert].nonzero()[0].tolist() for expert in routing.experts[0].tolist()]
        turn = [them[context.block % len(them)] for them in holding]
        return Plan(plan.keep, plan.weights, devices=np.array([turn], np.int64))
    replicas = Replicas.of(context.holders)
    dealt = replicas.deal(routing.experts, context.block)
    return Plan(plan.keep, plan.weights, devices=replicas.device[dealt])


@dataclass(frozen=True, slots=True)
class Replicas:
    """The (expert, device) pairs of one block, numbered."""

    device: Ints  # [V], of each pair, those of an expert side by side
    first: Ints  # [n_experts], number of its first pair
    count: Ints  # [n_experts]

    @classmethod
    def of(cls, holders: Bools) -> Replicas:
        """Number the pairs of `holders` [n_experts, K]."""
        _, device = np.nonzero(holders)
        count = holders.sum(axis=1)
        return cls(device, np.cumsum(count) - count, count)

    def of_expert(self, expert: int) -> list[int]:
        """Return the devices that hold an expert."""
        first = int(self.first[expert])
        devices: list[int] = self.device[first : first + int(self.count[expert])].tolist()
        return devices

    def deal(self, experts: Ints, begin: int = 0) -> Ints:
        """Deal the rows of each expert to its holders in turn: experts [tokens, k] -> pairs [tokens, k].

        Args:
            experts: of each slot.
            begin: which holder is first.
        """
        flat = experts.ravel()
        order = np.argsort(small_ints(flat), kind="stable")
        counts = np.bincount(flat, minlength=len(self.count))
        turn = np.empty(len(flat), np.int64)
        turn[order] = np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts)
        return (self.first[flat] + (turn + begin) % self.count[flat]).reshape(experts.shape)
