"""What several experiments need beside the model: policies of the testbed, and devices that are not what they say."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec

from scripts.experiments._model import TESTBED
from wdmoe.bs.config import StationConfig, VirtualConfig
from wdmoe.bs.policies import parse_policy
from wdmoe.bs.station import Station
from wdmoe.bs.virtual import VirtualDevice, in_this_process, open_virtual_station
from wdmoe.profiles.device_profile import DeviceProfile
from wdmoe.runtime.messages import Wire
from wdmoe.runtime.virtual_time import TimedPeer

KNOW_LATENCY = ("wlr", "capacity", "bottleneck")  # policies that look at what devices take


def chosen(*kinds: str) -> list[str]:
    """Return the testbed's policies, the first of each kind with the options that it has there: all kinds, or these."""
    found: dict[str, str] = {}
    for text in TESTBED.policies:
        name = parse_policy(text).describe()
        kind = name.partition(":")[0]
        if not kinds or kind in kinds:
            found.setdefault(kind, name)
    return list(found.values())


def open_tapped(
    folder: Path,
    arm: VirtualConfig | None = None,
    tap: Callable[[VirtualDevice], TimedPeer] = lambda device: device,
    wire: Wire = TESTBED.wire,
) -> AbstractContextManager[Station]:
    """Open a bundle in virtual time, with something between the base station and its devices.

    Args:
        folder: of the bundle.
        arm: devices, links and medium; None: only the answers matter.
        tap: as for `open_virtual_station`.
        wire: precision of the rows on the wire.
    """
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    config = StationConfig(folder, wire=wire, threads=threads)
    return open_virtual_station(config, in_this_process(folder) if arm is None else arm, lambda line: None, tap)


def slower(profile: DeviceProfile, factor: float) -> DeviceProfile:
    """Return the profile of a device whose expert calls take `factor` times as long."""
    points = tuple(
        msgspec.structs.replace(point, p50_ms=factor * point.p50_ms, p95_ms=factor * point.p95_ms)
        for point in profile.points
    )
    return msgspec.structs.replace(profile, points=points)
