"""A timeline of a run in Chrome's trace format, which Perfetto opens (https://ui.perfetto.dev).

Devices have clocks of their own: a request's queue and compute time are what the device reports, the rest between sending and
reply is the air, half of it drawn before and half after. In virtual time what takes no time is left out, and every track
says that its times are modelled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wdmoe.runtime.outputs import written_whole

BS = "base station"
STAGES, LOOP, WAITS = "stages", "loop", "waits"  # tracks of the base station

_Span = tuple[str, str, str, float, float]  # process, track, what, begin and end in seconds


@dataclass(frozen=True, slots=True)
class Reply:
    """One request that was answered."""

    device: str
    block: int
    microbatch: str
    sent_s: float
    replied_s: float
    queue_s: float  # as the device reports
    compute_s: float


@dataclass(slots=True)
class Trace:
    """Collects what happens, from any thread; nothing is worked out before it is written."""

    spans: list[_Span] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    modelled: bool = False  # whether time is virtual: what computes does so in no time, and is noted as declared

    def add(self, track: str, what: str, begin_s: float, end_s: float) -> None:
        """Note what the base station did."""
        if end_s > begin_s or not self.modelled:
            self.spans.append((BS, track, what, begin_s, end_s))

    def write(self, path: Path) -> None:
        """Write the timeline, whole or not at all."""
        with written_whole(path) as partial, partial.open("w", encoding="utf-8") as file:
            json.dump({"traceEvents": list(self._events()), "displayTimeUnit": "ms"}, file)

    def _events(self) -> Iterator[dict[str, Any]]:
        """Return events: a process for the base station and for each device, microseconds since the first event."""
        units = [[span] for span in self.spans] + [list(_parts(reply)) for reply in self.replies]
        start_s = min((unit[0][3] for unit in units), default=0.0)
        devices = sorted({reply.device for reply in self.replies})
        numbers = {name: number for number, name in enumerate([BS, *devices])}
        origin = " (modelled)" if self.modelled else ""
        for name, number in numbers.items():
            yield {"ph": "M", "name": "process_name", "pid": number, "tid": 0, "args": {"name": name + origin}}
        rows: dict[tuple[str, str], int] = {}
        for process, track, what, begin_s, end_s in _side_by_side(units):
            if (process, track) not in rows:
                rows[process, track] = len(rows)
                place = {"pid": numbers[process], "tid": rows[process, track]}
                yield {"ph": "M", "name": "thread_name", **place, "args": {"name": track}}
            yield {
                "ph": "X", "name": what, "pid": numbers[process], "tid": rows[process, track],
                "ts": (begin_s - start_s) * 1e6, "dur": (end_s - begin_s) * 1e6,
            }  # fmt: skip


def _parts(reply: Reply) -> Iterator[_Span]:
    """Return a request with what lies inside it; they nest."""
    took_s = reply.replied_s - reply.sent_s
    compute_s = min(reply.compute_s, took_s)
    queue_s = min(reply.queue_s, took_s - compute_s)
    here_s = reply.sent_s + (took_s - compute_s - queue_s) / 2
    where = (reply.device, reply.device)
    yield (*where, f"block {reply.block} of {reply.microbatch}", reply.sent_s, reply.replied_s)
    parts = (
        ("air, down", reply.sent_s, here_s),
        ("queue", here_s, here_s + queue_s),
        ("compute", here_s + queue_s, here_s + queue_s + compute_s),
        ("air, up", here_s + queue_s + compute_s, reply.replied_s),
    )
    yield from ((*where, *part) for part in parts if part[2] > part[1])


def _side_by_side(units: list[list[_Span]]) -> Iterator[_Span]:
    """Give each unit (a span and what lies inside it) its track, or where that is taken, one beside it."""
    free_at_s: dict[tuple[str, str], list[float]] = {}  # of each track and those beside it
    for unit in sorted(units, key=lambda unit: unit[0][3]):
        process, track, _, begin_s, end_s = unit[0]
        lanes = free_at_s.setdefault((process, track), [])
        lane = next((lane for lane, free_s in enumerate(lanes) if free_s <= begin_s), len(lanes))
        lanes[lane : lane + 1] = [end_s]
        name = track if lane == 0 else f"{track} ({lane + 1})"
        yield from ((process, name, what, first_s, last_s) for _, _, what, first_s, last_s in unit)
