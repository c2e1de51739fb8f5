"""How much memory this machine has left, and this process takes."""

from __future__ import annotations

import os
from pathlib import Path


def available_memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Return what can be allocated without swapping; None where the system does not say."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def resident_bytes(statm: Path = Path("/proc/self/statm")) -> int | None:
    """Return what this process holds in memory now; None where the system does not say."""
    try:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def forget_pages(path: Path) -> None:
    """Tell the kernel that a file will not be read again soon.

    On a Jetson the GPU's memory is the machine's, and large allocations have been seen to fail beside a full page cache.
    """
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
