"""Which devices may be given work, and who takes over from whom: a state machine without I/O.

    healthy --slow, or a hedge won--> penalised --20 good answers--> healthy
    any     --lost, error, bad rows--> blocked --a probe answered--> penalised

A penalised device is used where no healthy one holds the expert; a blocked one is not used at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

GOOD_ANSWERS = 20  # that make a penalised device healthy again
SLOW_CORRECTION = 4.0  # measured over predicted, from which a device counts as slow
PROBE_FIRST_S = 1.0
PROBE_LAST_S = 60.0  # the pause between probes doubles up to this
MAX_GONE = 64  # devices that are remembered after they left: anybody may join an unencrypted link, under any name
BS_HOLDS = "bs"  # the base station itself, as a holder of experts
NOBODY = "nobody"  # as the holder of experts that are left out


class Health(str, Enum):
    """The state of one device."""

    HEALTHY = "healthy"
    PENALISED = "penalised"
    BLOCKED = "blocked"


@dataclass(slots=True)
class Standing:
    """What is thought of one device, and why."""

    health: Health = Health.HEALTHY
    reason: str = ""
    good_answers: int = 0  # in a row
    failures: int = 0
    probe_at_s: float = 0.0  # when to try a blocked one next
    probe_pause_s: float = PROBE_FIRST_S
    silent_since_s: float | None = None  # when it was last heard, if it was blocked for its silence


@dataclass(slots=True)
class Fleet:
    """The standing of every connected device, by name, and of the last that left."""

    standings: dict[str, Standing] = field(default_factory=dict)
    gone: dict[str, None] = field(default_factory=dict)  # who left, in that order
    changes: int = 0  # of anything that `preferred` looks at

    def of(self, device: str) -> Standing:
        """Return a device's standing; a new one is healthy."""
        return self.standings.get(device) or Standing()

    def on_good_answer(self, device: str, correction: float) -> None:
        """Count an answer that came in time and was sound.

        Args:
            device: who answered.
            correction: its measured over predicted latency, see `LatencyTracker`.
        """
        standing = self.standings.get(device)
        if correction >= SLOW_CORRECTION:
            self.penalise(device, f"{correction:.1f} x slower than its profile")
        elif standing is not None and standing.health is Health.PENALISED:
            standing.good_answers += 1
            self.changes += 1
            if standing.good_answers >= GOOD_ANSWERS:
                self.standings[device] = Standing(failures=standing.failures)

    def penalise(self, device: str, reason: str) -> None:
        """Use a device only where no healthy one can do the work; a blocked one stays blocked."""
        standing = self.standings.setdefault(device, Standing())
        if standing.health is not Health.BLOCKED:
            if standing.health is Health.HEALTHY or standing.good_answers:
                self.changes += 1
            standing.health, standing.reason, standing.good_answers = Health.PENALISED, reason, 0

    def block(self, device: str, reason: str, now_s: float, silent_since_s: float | None = None) -> None:
        """Use a device no more until a probe is answered.

        Args:
            device: whose.
            reason: as it is shown.
            now_s: the next probe is due some time after; each block doubles it.
            silent_since_s: when it was last heard, if its silence is the reason.
        """
        standing = self.of(device)
        pause_s = min(PROBE_LAST_S, 2 * standing.probe_pause_s) if standing.failures else PROBE_FIRST_S
        self.changes += 1
        self.standings[device] = Standing(
            Health.BLOCKED, reason, 0, standing.failures + 1, now_s + pause_s, pause_s, silent_since_s
        )

    def on_heard(self, device: str, heard_s: float, now_s: float) -> None:
        """Make the next probe due at once where a device was blocked for its silence and has been heard since."""
        standing = self.standings.get(device)
        if standing is not None and standing.silent_since_s is not None and heard_s > standing.silent_since_s:
            standing.silent_since_s, standing.probe_at_s = None, now_s

    def on_joined(self, device: str) -> None:
        """Take a device that said hello: one that was blocked may work again, under watch."""
        self.gone.pop(device, None)
        if self.of(device).health is Health.BLOCKED:
            self._readmit(device, "back after: ")

    def on_left(self, device: str) -> None:
        """Remember who left; of too many, forget who left first."""
        self.gone.pop(device, None)
        self.gone[device] = None
        while len(self.gone) > MAX_GONE:
            first = next(iter(self.gone))
            del self.gone[first]
            self.standings.pop(first, None)
            self.changes += 1

    def on_probe_answered(self, device: str) -> None:
        """Re-admit a blocked device."""
        if self.of(device).health is Health.BLOCKED:
            self._readmit(device, "probe answered after: ")

    def probes_due(self, connected: Iterable[str], now_s: float) -> list[str]:
        """Return the blocked devices to probe now; their next turn comes after a doubled pause."""
        due: list[str] = []
        for device in sorted(self.standings.keys() & connected):  # of the others, nothing is known against them
            standing = self.standings[device]
            if standing.health is Health.BLOCKED and now_s >= standing.probe_at_s:
                standing.probe_pause_s = min(PROBE_LAST_S, 2 * standing.probe_pause_s)
                standing.probe_at_s = now_s + standing.probe_pause_s
                due.append(device)
        return due

    def usable(self, device: str) -> bool:
        """Whether a device may be given work."""
        standing = self.standings.get(device)
        return standing is None or standing.health is not Health.BLOCKED

    def preferred(self, candidates: Iterable[str]) -> str | None:
        """Choose among the devices that hold an expert; None if none is usable.

        Healthy before penalised; of those, who has given more good answers since: one of them may be dead, and not yet
        silent for long enough to be blocked. Then by name, so that the same fleet gives the same plan.
        """

        def rank(device: str) -> tuple[bool, int, str]:
            standing = self.of(device)
            return standing.health is not Health.HEALTHY, -standing.good_answers, device

        return min((device for device in candidates if self.usable(device)), key=rank, default=None)

    def sharing(self, candidates: Iterable[str]) -> list[str]:
        """Return those who may share the work of an expert, by name: all healthy ones, or if there are none who is preferred."""
        candidates = sorted(candidates)
        healthy = [device for device in candidates if self.of(device).health is Health.HEALTHY]
        preferred = self.preferred(candidates)
        return healthy or ([] if preferred is None else [preferred])

    def _readmit(self, device: str, why: str) -> None:
        standing = self.of(device)
        self.changes += 1
        self.standings[device] = Standing(
            Health.PENALISED, why + standing.reason, 0, standing.failures, 0.0, standing.probe_pause_s
        )
