from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from wdmoe.runtime.huge_pages import use_huge_pages

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MB = 1 << 20


def test_only_large_anonymous_memory_is_asked_for(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    # Nothing is mapped at these addresses, so that asking changes nothing.
    maps.write_text(
        "000010000000-000010400000 rw-p 00000000 00:00 0 \n"  # too small
        "000020100000-000021100000 rw-p 00000000 00:00 0 \n"  # 16 MB that begin in the middle of a huge page
        "000030000000-000031000000 r--p 00000000 00:00 0 \n"
        "000040000000-000041000000 rw-p 00000000 fd:00 42 /usr/lib/libsomething.so\n"
        "000050000000-000051000000 rw-p 00000000 00:00 0                          [heap]\n"
        "000060000000-000061000000 rw-p 00000000 00:00 0                          [stack]\n"
    )
    assert use_huge_pages(maps) == (14 + 16) * MB


def test_where_the_kernel_does_not_say_nothing_is_asked_for(tmp_path: Path) -> None:
    assert use_huge_pages(tmp_path / "maps") == 0


MOVED = """
import mmap, re
from pathlib import Path
from wdmoe.runtime.huge_pages import use_huge_pages
from wdmoe.runtime.memory import resident_bytes

def huge_kb():
    return int(re.search(r"AnonHugePages:\\s+(\\d+) kB", Path("/proc/self/smaps_rollup").read_text())[1])

MB = 1 << 20
with mmap.mmap(-1, 64 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as region:
    region.madvise(mmap.MADV_NOHUGEPAGE)
    for at in range(0, 64 * MB, 4096):
        region[at] = at >> 12 & 0xFF
    before_kb, before_bytes = huge_kb(), resident_bytes()
    asked_bytes = use_huge_pages()
    unharmed = all(region[at] == at >> 12 & 0xFF for at in range(0, 64 * MB, 4096))
    print(asked_bytes, resident_bytes() - before_bytes, huge_kb() - before_kb, unharmed)
"""


@pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="this kernel has no huge pages for the asking"
)
def test_what_was_touched_is_moved_unharmed_and_takes_no_more_memory() -> None:
    done = subprocess.run(  # by itself: the memory of other tests would be moved too
        [sys.executable, "-c", MOVED], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    asked_bytes, more_bytes, more_kb, unharmed = done.stdout.split()
    assert int(asked_bytes) >= 62 * MB and int(more_bytes) < 16 * MB and unharmed == "True"
    if int(more_kb) == 0:
        pytest.skip("this kernel moves memory by and by (before Linux 6.1), or has no free huge page now")
    assert int(more_kb) >= 16 * 1024
