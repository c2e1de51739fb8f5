"""Policies that change nothing of what the model computes: `exact`, and `round-robin` over replicas."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from wdmoe.bs.policies.options import Context
from wdmoe.bs.routing import Bools, Ints, Plan, Routing


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
    return Plan(_everything(*routing.experts.shape), routing.weights)


@lru_cache(maxsize=64)
def _everything(tokens: int, k: int) -> Bools:
    """Return True [tokens, k], to be read only: making it takes as long as all else that is done here for a token."""
    keep = np.ones((tokens, k), np.bool_)
    keep.flags.writeable = False
    return keep


def select_round_robin(routing: Routing, context: Context) -> Plan:
    """Deal the rows of an expert to its holders; the block number decides who begins.

    With several experts on a device a token may need more rows than under `exact`: the deal does not look at that.
    """
    plan = select_exact(routing)
    if context.holders is None or int(np.count_nonzero(context.holders)) == len(context.holders):
        return plan  # nobody holds what another holds, too
    if len(routing.experts) == 1:
        holding = [np.flatnonzero(context.holders[expert]) for expert in routing.experts[0]]
        dealt = [int(them[context.block % len(them)]) for them in holding]
        return Plan(plan.keep, plan.weights, devices=np.array([dealt], np.int64))
    devices = np.empty(routing.experts.shape, np.int64)
    for expert in np.unique(routing.experts):
        at = np.flatnonzero(routing.experts == expert)
        holders: Ints = np.flatnonzero(context.holders[expert])
        devices.ravel()[at] = holders[(np.arange(len(at)) + context.block) % len(holders)]
    return Plan(plan.keep, plan.weights, devices=devices)
