"""What leaves later: when a share of a link lets a message go, and what is held until its moment. Plain values, no clock."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")
SPIN_S = 1e-3  # a poll counts in milliseconds: what is due within one is waited for without sleeping


@dataclass(slots=True)
class Pace:
    """Lets messages take a share of a link, one after another.

    A message leaves so late that the link, which carries it at its full rate, has it there when the share alone would
    have: whatever the window, no more arrives in it than the share carries.
    """

    _free_s: float = float("-inf")

    def leave_s(self, ready_s: float, link_s: float, share: float) -> float:
        """Say when a message leaves.

        Args:
            ready_s: when it could.
            link_s: what it takes of the whole link.
            share: of the link, above 0 and at most 1.
        """
        self._free_s = max(self._free_s, ready_s) + link_s / share
        return self._free_s - link_s


@dataclass(slots=True)
class Departures(Generic[Item]):
    """Holds things until they leave; of those that leave at one moment, the first held is the first to go."""

    _held: list[tuple[float, int, Item]] = field(default_factory=list)  # a heap
    _count: int = 0

    def hold(self, item: Item, until_s: float) -> None:
        """Hold something until a moment."""
        self._count += 1
        heapq.heappush(self._held, (until_s, self._count, item))

    def due(self, now_s: float) -> Iterator[Item]:
        """Take what leaves now."""
        while self._held and self._held[0][0] <= now_s:
            yield heapq.heappop(self._held)[2]

    @property
    def next_s(self) -> float:
        """When something leaves next; infinity if nothing is held."""
        return self._held[0][0] if self._held else float("inf")

    def wait_s(self, now_s: float, at_most_s: float, spin_s: float = SPIN_S) -> float:
        """Return how long to sleep: until shortly before something leaves, and not at all from then on."""
        return min(at_most_s, max(0.0, self._held[0][0] - now_s - spin_s)) if self._held else at_most_s
