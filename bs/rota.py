"""Who runs which expert now, and how fast they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from wdmoe.bs.fleet import BS_HOLDS, NOBODY
from wdmoe.bs.held import HeldExperts
from wdmoe.bs.hub import Hub
from wdmoe.bs.latency import DeviceLatency
from wdmoe.bs.requests import Requests
from wdmoe.bs.routing import Bools, Ints
from wdmoe.runtime.errors import DeviceFailed, DevicesMissing
from wdmoe.runtime.manifest import ModelSpec

_STAND_IN = DeviceLatency(((1, 1.0),), 0.0)  # of experts that no device runs now: they are not measured


@dataclass(frozen=True, slots=True)
class Workers:
    """Who runs the experts of one block."""

    names: tuple[str, ...]
    owner: Ints  # [n_experts], index into names
    kept: Bools | None = None  # [n_experts], what the base station keeps as well; None: nothing of the block
    holders: Bools | None = None  # [n_experts, n_names], all who may run each expert; None: its owner alone is asked

    @property
    def station(self) -> int:
        """Number of the base station, where it keeps anything."""
        return self.names.index(BS_HOLDS)


NO_WORKERS = Workers((), np.empty(0, np.int64))


class Rota:
    """Looks up who runs which expert, anew only when a device came, went, failed or recovered."""

    def __init__(
        self, hub: Hub, requests: Requests, held: HeldExperts | None, model: ModelSpec, on_change: Callable[[], None]
    ) -> None:
        """Start with nothing known.

        Args:
            hub: the devices.
            requests: knows who may be asked.
            held: experts at the base station, if it has any.
            model: whose experts they are.
            on_change: called when it looks anew.
        """
        self._hub, self._requests, self._held, self._model = hub, requests, held, model
        self._on_change = on_change
        self._known: dict[tuple[int, bool, bool], Workers] = {}
        self._known_at = self._served_at = (-1, -1)

    def all_served(self) -> bool:
        """Whether every expert has somebody who may run it."""
        if (now_at := self._now_at()) != self._served_at and not self._requests.unserved(self._model):
            self._served_at = now_at
        return now_at == self._served_at

    def of_block(self, block: int, may_skip: bool, deals: bool) -> Workers:
        """Say who runs which expert of a block now.

        Args:
            block: number of it.
            may_skip: whether experts that nobody runs may be left out.
            deals: whether others than who is preferred may be asked: all who may are told.

        Raises:
            DeviceFailed, DevicesMissing: an expert has nobody who may run it, and must not be left out.
        """
        if (now_at := self._now_at()) != self._known_at:
            self._known, self._known_at = {}, now_at
            self._on_change()
        if (known := self._known.get((block, may_skip, deals))) is not None:
            return known
        owners: list[str] = []
        for expert in range(self._model.n_experts):
            holder = self._requests.preferred(block, expert)
            if holder is None and not may_skip:
                raise self._nobody(block, expert)
            owners.append(holder or NOBODY)
        sharing = [self._requests.sharing(block, expert) for expert in range(self._model.n_experts)] if deals else []
        kept = self._held.kept_in(block) if self._held is not None else np.zeros(0, np.bool_)
        own = {BS_HOLDS} if kept.any() else set()
        names = tuple(sorted({*owners, *own, *(name for those in sharing for name in those)}))
        owner = np.array([names.index(one) for one in owners])
        holders = np.array([[name in those for name in names] for those in sharing]) if deals else None
        if holders is not None:
            holders[np.arange(len(owners)), owner] = True
            if kept.any():
                holders[kept, names.index(BS_HOLDS)] = True
        workers = Workers(names, owner, kept if kept.any() else None, holders)
        self._known[block, may_skip, deals] = workers
        return workers

    def latencies(self, workers: Workers, shared_ms: float, in_flight: int) -> tuple[DeviceLatency, ...]:
        """Return how fast each of the workers is.

        Args:
            workers: of a block.
            shared_ms: what the base station's last shared expert took.
            in_flight: microbatches on their way now.
        """
        devices = self._hub.devices
        return tuple(
            devices[name].latency.model()
            if name in devices
            else self._own_latency(shared_ms, in_flight)
            if name == BS_HOLDS
            else _STAND_IN
            for name in workers.names
        )

    def _own_latency(self, shared_ms: float, in_flight: int) -> DeviceLatency:
        """Return how fast the base station is: a device without a link, whose worker does other things as well.

        It runs the shared expert of the block too. And what it does for one microbatch holds up the stages of the others
        in flight: with n of them, its time is taken to be worth n times that of a device.
        """
        if self._held is None or self._held.latency is None:
            return _STAND_IN
        model = self._held.latency.model()
        other_ms = shared_ms if self._model.shared_expert and np.isfinite(shared_ms) else 0.0
        return DeviceLatency(model.curve, other_ms, model.correction * max(1, in_flight))

    def _nobody(self, block: int, expert: int) -> DeviceFailed | DevicesMissing:
        for device in self._requests.holders(block, expert):
            return DeviceFailed(device, f"{self._requests.fleet.of(device).reason}; nobody else holds its experts")
        gone = sorted(self._requests.fleet.gone)
        left = f"; gone: {', '.join(gone)}" if gone else ""
        return DevicesMissing(f"expert {expert} of block {block} is served by no connected device{left}")

    def _now_at(self) -> tuple[int, int]:
        return self._hub.changes, self._requests.fleet.changes
