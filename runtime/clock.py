"""Time as an object that can be swapped: the real clock, and one that moves only when told."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock."""

    def now_s(self) -> float:
        """Seconds since an arbitrary start."""
        ...


class RealClock:
    """The machine's monotonic clock."""

    def now_s(self) -> float:
        """Seconds since an arbitrary start."""
        return time.perf_counter()


class VirtualClock:
    """A clock for tests and simulation: waiting moves it instead of passing time."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        """Seconds since the start."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        if seconds < 0:
            raise ValueError(f"time does not run backwards: {seconds} s")
        self._now_s += seconds

    def advance_to(self, at_s: float) -> None:
        """Let time pass until a moment, exactly; one that is past changes nothing."""
        self._now_s = max(self._now_s, at_s)
