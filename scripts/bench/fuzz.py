"""Damaged frames and files by the hundred thousand: none may crash, hang or be taken for sound.

    python scripts/bench/fuzz.py --frames 100000 --json -

What counts as accepted is defined in `tests/fuzzing.py`. Of the frames, most go through decoding, a device and a base
station at work in memory; one in ten through real sockets: strangers at an encrypted base station that is at work, and
a stranger that plays base station for a device. Frames over the limit go to a device process: its peak memory may not
grow by half a frame, and it must dial again, be welcomed and answer as before. Then every file of a small bundle is damaged `--rounds` times in each
way. The bars: `crashes`, `hangs` and `accepted` 0, resident memory grows by at most 64 MiB.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
from fuzzing.files import fuzz_files
from fuzzing.frames import Tally, recorded_frames
from fuzzing.inside import fuzz_base_station, fuzz_decoding, fuzz_service
from fuzzing.sockets import fuzz_device_socket, fuzz_station_socket, throw_oversized
from guarded import open_guarded
from processes import exit_on_sigterm

from scripts.bench._environment import environment, progress, write_json
from scripts.bench._system import TINY, exported, rss_mib

MAX_GROWTH_MIB = 64.0
OVERSIZED_BYTES = (6 << 20, 64 << 20)  # the limit here is that of headers, 4 MiB
_WARM_UP = 500


@click.command()
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, allow_dash=True), help="Keep the result; - prints it."
)
@click.option("--frames", type=click.IntRange(min=100), default=100_000, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Damages of each kind a file.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(target: str | None, frames: int, rounds: int, seed: int) -> None:
    """Throw damage at everything that listens or reads; exit code 1 if a bar is missed."""
    exit_on_sigterm()
    parts: dict[str, Any] = {}
    with exported(TINY) as (_, bundle), tempfile.TemporaryDirectory(prefix="wdmoe-fuzz-") as scratch:
        corpus, d_model = recorded_frames(bundle)
        device = bundle / "device-1"

        def station(rng: np.random.Generator, count: int, tally: Tally) -> None:
            with open_guarded(bundle, Path(tempfile.mkdtemp(dir=scratch))) as guarded:
                fuzz_station_socket(rng, corpus, guarded, count, tally)

        targets = {
            "decoding": (0.4, lambda rng, n, tally: fuzz_decoding(rng, corpus, d_model, n, tally)),
            "device": (0.2, lambda rng, n, tally: fuzz_service(rng, corpus, device, n, tally)),
            "base_station": (0.3, lambda rng, n, tally: fuzz_base_station(rng, corpus, bundle, n, tally)),
            "base_station_socket": (0.05, station),
            "device_socket": (0.05, lambda rng, n, tally: fuzz_device_socket(rng, corpus, device, n, tally)),
        }
        for number, (name, (share, fuzz)) in enumerate(targets.items()):
            fuzz(np.random.default_rng([seed, number, 1]), _WARM_UP, Tally())
            tally, before_mib, started_s = Tally(), rss_mib(os.getpid()), time.monotonic()
            fuzz(np.random.default_rng([seed, number]), round(share * frames), tally)
            growth_mib = rss_mib(os.getpid()) - before_mib
            wall_s = time.monotonic() - started_s
            parts[name] = described(tally) | {"memory_growth_mib": growth_mib, "wall_s": wall_s}
            progress(f"{name}: {dict(tally.counts)}, {growth_mib:+.1f} MiB, {wall_s:.0f} s")
        tally, started_s = Tally(), time.monotonic()
        growth_mib = throw_oversized(device, OVERSIZED_BYTES, tally)
        wall_s = time.monotonic() - started_s
        parts["device_oversized"] = described(tally) | {"memory_growth_mib": growth_mib, "wall_s": wall_s}
        progress(f"device_oversized: {dict(tally.counts)}, {growth_mib:+.1f} MiB, {wall_s:.0f} s")
        tally = Tally()
        fuzz_files(np.random.default_rng([seed, 9]), bundle, Path(scratch), rounds, tally)
        parts["files"] = described(tally) | {"memory_growth_mib": 0.0}
        progress(f"files: {dict(tally.counts)}")
    totals: dict[str, Any] = {
        key: sum(part["counts"].get(key, 0) for part in parts.values())
        for key in ("frames", "files_damaged", "crashes", "hangs", "accepted")
    }
    totals["memory_growth_mib"] = max(part["memory_growth_mib"] for part in parts.values())
    bars: dict[str, float] = {"crashes": 0, "hangs": 0, "accepted": 0, "memory_growth_mib": MAX_GROWTH_MIB}
    missed = [f"{key} {totals[key]:g}" for key, bar in bars.items() if totals[key] > bar]
    result = {
        **totals, "bars": bars, "passed": not missed, "seed": seed, "rounds": rounds, "parts": parts,
        **environment(("numpy", "msgspec", "pyzmq")),
    }  # fmt: skip
    progress(f"missed: {', '.join(missed)}" if missed else "all bars are met")
    if target is not None:
        write_json(target, result)
    sys.exit(1 if missed else 0)


def described(tally: Tally) -> dict[str, Any]:
    """Turn a tally into plain JSON values."""
    return {
        "counts": dict(tally.counts),
        "crashes": tally.crashes,
        "accepted": tally.accepted,
        "hangs": tally.hangs,
    }


if __name__ == "__main__":
    main()
