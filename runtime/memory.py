"""How much memory this machine has left, and this process takes."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_KEPT_BYTES = 32 << 20  # the most that glibc allows
_KEPT_BYTES = 64 << 20


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


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, for what is allocated next.

    By default it gives rows of half a megabyte back as soon as they are freed. The next ones then cost a page fault for
    each 4 kB: four devices' sums of 64 rows took ten times as long to add up. Nothing happens where it is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def forget_pages(path: Path) -> None:
    """Tell the kernel that a file will not be read again soon.

    On a Jetson the GPU's memory is the machine's, and large allocations have been seen to fail beside a full page cache.
    """
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
