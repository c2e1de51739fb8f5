"""Puts weights on pages of 2 MB: reading them all for one token is about a sixth faster (int4) than on pages of 4 kB.

ONNX Runtime allocates what it keeps by itself, so that nobody can ask for such pages before; this asks for them afterwards.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

_LEAST_BYTES = 8 << 20  # smaller regions hold no weights worth the trouble
_PAGE_BYTES = 2 << 20
_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25  # Linux 6.1; older kernels do it by themselves, within minutes, 16 MB every 10 s
# Private, writable, and of no file: "7f6e0043f000-7f6e023c0000 rw-p 00000000 00:00 0", perhaps followed by [heap].
_ANONYMOUS = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw-p 0+ 00:00 0 *(?:\[heap\])?$", re.MULTILINE)


def use_huge_pages(maps: Path = Path("/proc/self/maps")) -> int:
    """Ask the kernel for huge pages under all large allocations of this process; return how many bytes it was asked for.

    A wish and no more: where it cannot be had, nothing changes and nobody is told.
    """
    try:
        text = maps.read_text()
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):  # not Linux
        return 0
    asked_bytes = 0
    for start, size_bytes in _large_regions(text):
        for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(size_bytes), advice)
        asked_bytes += size_bytes
    return asked_bytes


def _large_regions(maps: str) -> Iterator[tuple[int, int]]:
    """Yield start and size of large anonymous regions, cut to whole huge pages."""
    for first, last in _ANONYMOUS.findall(maps):
        start = -(-int(first, 16) // _PAGE_BYTES) * _PAGE_BYTES
        size_bytes = int(last, 16) // _PAGE_BYTES * _PAGE_BYTES - start
        if size_bytes >= _LEAST_BYTES:
            yield start, size_bytes
