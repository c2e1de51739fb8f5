"""What stands beside every result of a benchmark: on what it was measured, with what, and how."""

from __future__ import annotations

import json
import os
import platform
import resource
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import click

from wdmoe.device.machine import hardware_name

Measured = TypeVar("Measured")
OTHERS_LIMIT = 0.05  # share of the whole machine that others may take while something is timed


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """Say on what, with which versions and how a script runs; `load_average` tells of others on the machine."""
    return {
        "hardware": hardware_name(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("wdmoe", *packages)},
        "load_average": os.getloadavg(),  # 1, 5 and 15 minutes
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


class CpuUse:
    """Who used the processors since this was made: we, or others on the machine, beside whom a timing means little.

    Args:
        pids: processes of ours that run on; those that have ended and this one are counted anyway.
    """

    def __init__(self, pids: Sequence[int] = ()) -> None:
        self._pids = pids
        self._started = self._read()

    def since(self) -> dict[str, float | None]:
        """Return CPU seconds of ours, and the share of the whole machine that others took; None off Linux."""
        (wall_s, ours_s, all_s), now = self._started, self._read()
        ours_s = now[1] - ours_s
        if all_s is None or now[2] is None:
            return {"cpu_s": ours_s, "others_cpu_share": None}
        others_s = now[2] - all_s - ours_s
        return {"cpu_s": ours_s, "others_cpu_share": max(0.0, others_s / (now[0] - wall_s) / (os.cpu_count() or 1))}

    def _read(self) -> tuple[float, float, float | None]:
        usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        ours_s = sum(usage.ru_utime + usage.ru_stime for usage in usages)
        hz = os.sysconf("SC_CLK_TCK")
        try:
            first = Path("/proc/stat").read_text().partition("\n")[0].split()
            stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self._pids]
        except OSError:
            return time.perf_counter(), ours_s, None
        ours_s += sum(int(stat[11]) + int(stat[12]) for stat in stats) / hz  # user and system time
        # Stolen is what the host of a virtual machine gave to others.
        user, nice, system, _idle, _iowait, irq, softirq, stolen, *_ = map(int, first[1:])
        return time.perf_counter(), ours_s, (user + nice + system + irq + softirq + stolen) / hz


def undisturbed(
    measure: Callable[[], Measured], attempts: int, watch: Callable[[], CpuUse] = CpuUse
) -> tuple[Measured, dict[str, Any]]:
    """Measure until others leave the machine alone meanwhile, and keep the measurement in which they took least.

    Args:
        measure: takes a second or so: the kernel counts in hundredths.
        attempts: at most.
        watch: starts to watch who uses the processors.

    Returns:
        The measurement; and for the result, what others took meanwhile, whether that was too much, and the attempts.
    """
    made: list[tuple[float, Measured]] = []  # each with what others took
    while len(made) < attempts and not (made and made[-1][0] <= OTHERS_LIMIT):
        use = watch()
        measured = measure()
        made.append((use.since()["others_cpu_share"] or 0.0, measured))
    share, measured = min(made, key=lambda one: one[0])
    return measured, {"others_cpu_share": share, "disturbed": share > OTHERS_LIMIT, "attempts": len(made)}


def write_json(target: str, result: dict[str, Any]) -> None:
    """Write a result to a file, or with - to stdout."""
    text = json.dumps(result, indent=2) + "\n"
    if target == "-":
        click.echo(text, nl=False)
    else:
        path = Path(target)
        path.parent.mkdir(parents=True, exist_ok=True)  # what took an hour is not lost for want of a folder
        path.write_text(text)


def progress(line: str) -> None:
    """Progress goes to stderr; stdout is for results."""
    click.echo(line, err=True)
