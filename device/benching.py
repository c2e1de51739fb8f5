"""`wdmoe-device bench`: the full profile of an engine on this machine, with what it was measured under."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Callable, Sequence

import numpy as np

from wdmoe.device.machine import Machine, MachineState, hardware_name, throttling
from wdmoe.profiles.device_profile import VERSION, Conditions, DeviceProfile, Point, StagingPoint
from wdmoe.runtime.engines import ExpertEngine
from wdmoe.runtime.manifest import DeviceManifest
from wdmoe.runtime.memory import resident_bytes
from wdmoe.runtime.messages import Rows, pack_rows, unpack_rows

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_WARM_CALLS, _COLD_CALLS, _STAGING_CALLS = 50, 9, 15
_LEAST_CALLS = 5
_UNTIMED_CALLS = 2  # the first calls allocate
_SWEEP_BYTES = 64 << 20  # more than the last cache of any machine that experts run on


def bench(
    engine: ExpertEngine,
    manifest: DeviceManifest,
    machine: Machine,
    say: Callable[[str], None],
    *,
    tokens: Sequence[int] = TOKENS,
    seconds: float = 2.0,
    weights_bytes: int | None = None,
) -> DeviceProfile:
    """Measure expert calls, warm and cold, and what staging costs beside them.

    Warm calls take another expert each time, as in service. Cold calls come after a sweep that leaves nothing of the
    weights in any cache of the CPU.

    Args:
        engine: with the slice loaded.
        manifest: of the slice.
        machine: to ask for power mode, clocks and throttling.
        say: told about each token count.
        tokens: counts to measure, ascending.
        seconds: for the warm calls of each count, and half as much for the cold ones; five calls are made anyway.
        weights_bytes: that loading the engine took, see `loaded_bytes`.
    """
    model, rng = manifest.model, np.random.default_rng(0)
    before, load = machine.state(), os.getloadavg()[0]
    sweep = np.ones(_SWEEP_BYTES // 8)
    warm: list[Point] = []
    cold: list[Point] = []
    staging: list[StagingPoint] = []
    at_work: list[MachineState] = []
    for count in tokens:
        rows = rng.standard_normal((count, model.d_model), dtype=np.float32)
        calls = 0

        def call(rows: Rows = rows) -> None:
            nonlocal calls
            entry = manifest.experts[calls % len(manifest.experts)]
            engine.run(entry.block, entry.expert, rows)
            calls += 1

        warm.append(_point(count, _times_ms(call, _WARM_CALLS, seconds, None)))
        at_work.append(machine.state())  # at once, before the clocks go down again
        cold.append(_point(count, _times_ms(call, _COLD_CALLS, seconds / 2, lambda: sweep.sum())))
        staging.append(staging_point(rows))
        say(f"{count} tokens: {warm[-1].p50_ms:.3f} ms warm, {cold[-1].p50_ms:.3f} ms cold")
    clocks = {name for state in at_work for name in state.clocks_mhz}
    noticed = {line: None for state in at_work for line in throttling(before, state)}
    conditions = Conditions(
        power_mode=before.power_mode,
        jetson_clocks=before.jetson_clocks,
        clocks_mhz={
            name: float(np.median([s.clocks_mhz[name] for s in at_work if name in s.clocks_mhz]))
            for name in sorted(clocks)
        },
        throttled=tuple(noticed),
        rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        weights_bytes=weights_bytes,
        load_average=load,
    )
    return DeviceProfile(
        VERSION,
        device=hardware_name(machine),
        software=software_of(engine),
        engine=engine.name,
        precision=manifest.precision,
        d_model=model.d_model,
        d_ff=model.d_ff,
        points=tuple(warm),
        cold=tuple(cold),
        staging=tuple(staging),
        conditions=conditions,
    )


def loaded_bytes(machine: Machine) -> Callable[[], int | None]:
    """Look at the memory before an engine is loaded; what is returned tells by how much its loading took more.

    That is what the process grew by. On a Tegra, whose GPU's allocations are in no process's resident memory, it is what
    the memory that is available fell by, if that is more; there nothing else should run while something is measured.
    """
    resident, available = resident_bytes(), machine.available_bytes if machine.l4t is not None else None

    def grown() -> int | None:
        now, left = resident_bytes(), machine.available_bytes
        grew = [now - resident] if now is not None and resident is not None else []
        grew += [available - left] if left is not None and available is not None else []
        return max(0, *grew) if grew else None

    return grown


def software_of(engine: ExpertEngine) -> str:
    """Name what runs experts here."""
    return f"{engine.name} {engine.version}, Python {platform.python_version()}, {platform.system()}"


def _times_ms(
    call: Callable[[], object], calls: int, seconds: float, prepare: Callable[[], object] | None
) -> list[float]:
    """Time calls, each after `prepare`; fewer of them where they take long."""
    times_ms: list[float] = []
    started_s = time.perf_counter()
    for number in range(_UNTIMED_CALLS + calls):
        if prepare is not None:
            prepare()
        before_s = time.perf_counter()
        call()
        after_s = time.perf_counter()
        if number >= _UNTIMED_CALLS:
            times_ms.append((after_s - before_s) * 1e3)
        if len(times_ms) >= _LEAST_CALLS and after_s - started_s > seconds:
            break
    return times_ms


def _point(tokens: int, times_ms: Sequence[float]) -> Point:
    p50, p95 = np.percentile(times_ms, (50, 95))
    return Point(tokens, float(p50), float(p95))


def staging_point(rows: Rows) -> StagingPoint:
    """Time the steps of `weighted_sums` beside the engine, for rows that do not lie in one piece."""
    count = len(rows)
    sent = np.repeat(rows, 2, axis=0)  # a request of twice as many rows, of which an expert wants every other
    index, weights = np.arange(0, 2 * count, 2, dtype=np.uint32), np.ones((count, 1), np.float32)
    packed, _ = pack_rows(sent, "fp16")
    total, weighted = np.zeros(sent.shape, np.float32), rows * weights

    def convert() -> None:
        pack_rows(unpack_rows(packed), "fp16")

    def add() -> None:
        total[index] += weighted

    steps: tuple[Callable[[], object], ...] = (convert, lambda: sent[index], lambda: rows * weights, add)
    medians = (float(np.median(_times_ms(step, _STAGING_CALLS, 0.2, None))) for step in steps)
    return StagingPoint(count, *medians)
