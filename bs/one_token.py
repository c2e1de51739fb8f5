"""One token of one block in plain numbers: what generation asks for all the time, and what arrays are slow for.

A token has few experts on few devices, so only these devices are looked at, and nothing is put into an array but what others
read as arrays. What is decided is the same as for many tokens, and tests compare the two; only `bottleneck` does better here, as it
can try everything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.bs.airtime import Asked, BlockTime, Ints, LatencyModel, Load, Medium, Row, Times, few_finish_ms, pooled_root
from wdmoe.bs.allocation import finish_together
from wdmoe.bs.latency import DeviceLatency
from wdmoe.bs.routing import Plan, Routing
from wdmoe.profiles.device_profile import interpolate


@dataclass(slots=True)  # not frozen: one is made for every token and block, and that would take twice as long
class RowModel:
    """What one row takes on each device: `airtime.latency_model`, of which only what is asked for is worked out."""

    latencies: Sequence[DeviceLatency]
    medium: Medium = "own"
    _rows: dict[int, Row] = field(init=False, repr=False, compare=False, default_factory=dict)

    @property
    def n_devices(self) -> int:
        """How many devices it speaks of."""
        return len(self.latencies)

    def row(self, k: int) -> Row:
        """Return what one row of a device takes, with one expert call."""
        if (known := self._rows.get(k)) is None:
            device = self.latencies[k]
            correction, link_ms, curve = device.correction, device.row_link_ms, device.curve
            if self.medium == "own":
                link_ms *= correction
            up_ms = link_ms * device.up_part
            known = self._rows[k] = (
                link_ms - up_ms,
                correction * device.round_trip_ms / 2,
                (curve[0][1] if curve[0][0] == 1 else interpolate(curve, 1)) * correction,
                correction * device.staging_ms,
                up_ms,
            )
        return known


RowTimes = RowModel | LatencyModel  # either tells what a row takes


def asked_of(k: int, calls: int, model: RowTimes) -> Asked:
    """Return what one row with some expert calls of one token takes; see `airtime.few_finish_ms`."""
    down_ms, way_ms, call_ms, staging_ms, up_ms = model.row(k)
    return down_ms, way_ms, calls * call_ms + staging_ms, up_ms


def block_ms(asked: Sequence[Asked], medium: Medium) -> float:
    """Return how long the block takes; see `airtime.makespan`."""
    if len(asked) == 1:  # has its link, the channel or the whole band to itself
        send, way, compute, back = asked[0]
        return send + 2 * way + compute + back
    if medium == "own":
        return max([send + 2 * way + compute + back for send, way, compute, back in asked])
    if len(asked) == 2:
        return (_two_on_channel if medium == "shared" else _two_in_band)(*asked)
    if medium == "pooled":
        return pooled_root([send + back for send, _, _, back in asked], [2 * way + c for _, way, c, _ in asked])
    return max(few_finish_ms(asked, medium)[0])


def _two_on_channel(a: Asked, b: Asked) -> float:
    """Return when the later of two devices on a shared channel is done: the most usual case of `airtime.few_finish_ms`."""
    if 2 * b[1] + b[2] + b[3] > 2 * a[1] + a[2] + a[3]:
        a, b = b, a
    sent = a[0] + b[0]
    a_ready, b_ready = a[0] + a[1] + a[2], sent + b[1] + b[2]
    if b_ready < a_ready:
        a, b, a_ready, b_ready = b, a, b_ready, a_ready
    a_end = max(sent, a_ready) + a[3]
    return max(a_end + a[1], max(a_end, b_ready) + b[3] + b[1])


def _two_in_band(a: Asked, b: Asked) -> float:
    """Return when two devices are done together in a band that is divided: see `airtime.pooled_root`."""
    a_air, b_air = a[0] + a[3], b[0] + b[3]
    a_ms, b_ms = 2 * a[1] + a[2] + a_air, 2 * b[1] + b[2] + b_air
    return (a_ms + b_ms + math.sqrt((a_ms - b_ms) ** 2 + 4 * a_air * b_air)) / 2


def devices_of(plan: Plan, routing: Routing, owner: Ints) -> list[int]:
    """Return who is asked for each expert, were nothing left out."""
    if plan.devices is not None:
        devices: list[int] = plan.devices[0].tolist()
    else:
        devices = owner[(routing.experts if plan.experts is None else plan.experts)[0]].tolist()
    return devices


def time_of(plan: Plan, devices: Sequence[int], model: RowTimes) -> tuple[Load, BlockTime, Times | None]:
    """Return what a plan asks of the devices, how long the block takes, and the shares of a band that is divided.

    Args:
        plan: of one token.
        devices: who is asked for each expert; see `devices_of`.
        model: of the devices, on the medium that counts.
    """
    calls = tuple(sorted([k for k, kept in zip(devices, plan.keep[0].tolist(), strict=True) if kept]))
    loaded = list(dict.fromkeys(calls))
    asked = [asked_of(k, calls.count(k), model) for k in loaded]
    n, medium = model.n_devices, model.medium
    load = _load_of(calls, n)
    if len(loaded) == 1:
        return load, *_time_of_one(loaded[0], asked[0], n, medium)
    if medium == "pooled":
        air_ms = [send + back for send, _, _, back in asked]
        parts, total_ms = finish_together(air_ms, [2 * way + compute for _, way, compute, _ in asked])
        finish_ms = _of_each(loaded, [total_ms] * len(loaded), n)
        return load, BlockTime(total_ms, finish_ms), _of_each(loaded, parts, n)
    done_ms, turns = few_finish_ms(asked, medium)
    order = _in_order(tuple([loaded[turn] for turn in turns])) if medium == "shared" else None
    return load, BlockTime(max(done_ms, default=0.0), _of_each(loaded, done_ms, n), order), None


def _time_of_one(k: int, asked: Asked, n: int, medium: Medium) -> tuple[BlockTime, Times | None]:
    """Return how long one device takes, which has its link, the channel or the whole band to itself, and its share."""
    total_ms = block_ms([asked], medium)
    block = BlockTime(total_ms, _of_each([k], [total_ms], n), _in_order((k,)) if medium == "shared" else None)
    needs_air = asked[0] + asked[3] > 0
    return block, _of_each([k], [float(needs_air)], n) if medium == "pooled" else None


@lru_cache(maxsize=512)  # a token's devices come again and again, and three arrays take longer than all else here
def _load_of(calls: tuple[int, ...], n: int) -> Load:
    """Return a row for each device that is called, and the calls, ascending, of one token each."""
    loaded = list(dict.fromkeys(calls))
    load = Load(
        _of_each(loaded, [1] * len(loaded), n, np.int64), np.array(calls, np.int64), np.ones(len(calls), np.int64)
    )
    for array in (load.rows, load.device, load.tokens):
        array.flags.writeable = False
    return load


@lru_cache(maxsize=512)
def _in_order(devices: tuple[int, ...]) -> Ints:
    order = np.array(devices, np.int64)
    order.flags.writeable = False
    return order


def _of_each(devices: Sequence[int], values: Sequence[float], n: int, kind: type = np.float64) -> npt.NDArray[Any]:
    """Put the values of a few devices in an array of all: sooner one by one."""
    every: npt.NDArray[Any] = np.zeros(n, kind)
    for k, value in zip(devices, values, strict=True):
        every[k] = value
    return every
