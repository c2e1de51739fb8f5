"""What was refused and why: counted by kind, with the last words of each, so that no stranger can make it grow."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal[
    "malformed",
    "key",
    "name",
    "protocol",
    "bundle",
    "experts",
    "profile",
    "enrolment",
    "not introduced",
    "misplaced",
    "full",
]
WORDS = 500  # characters that are kept of a refusal: a stranger's own words may be in it


@dataclass(slots=True)
class Refusals:
    """A closed set of kinds: its size does not depend on what strangers send."""

    counts: Counter[Kind] = field(default_factory=Counter)
    last: dict[Kind, str] = field(default_factory=dict)  # the words that were last said

    def add(self, kind: Kind, text: str) -> None:
        """Count one."""
        self.counts[kind] += 1
        self.last[kind] = text[:WORDS]

    def described(self) -> dict[str, int]:
        """Return the last words of each kind, and how often something of the kind was refused."""
        return {self.last[kind]: count for kind, count in self.counts.items()}
