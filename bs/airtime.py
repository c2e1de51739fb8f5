"""How long one block takes on all devices: rows go down, experts run, sums come back, on links of two kinds.

Own links (wires, or shares of a band as in OFDMA): devices do not hinder each other, and

    finish_k = 2 way_k + n_k (down_k + staging_k + up_k) + sum over its experts of call_k(tokens of the expert)

One shared half-duplex channel (WiFi): whoever sends, the others wait, so time on the air is conserved and the order
matters. All requests go first: a request that changes place with a reply before it starts its device earlier and ends
nobody later. Replies go in the order in which they are ready. What remains to be chosen is the order of the requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from wdmoe.bs.latency import DeviceLatency
from wdmoe.profiles.device_profile import interpolate

Times = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Curve = tuple[tuple[int, float], ...]
Asked = tuple[float, float, float, float]  # of one device: request on the air, one way, computing, reply on the air; ms
Row = tuple[float, float, float, float, float]  # down, one way, an expert call with it alone, staging, up; ms
FEW = 16  # expert calls, or loaded devices, up to which plain numbers are faster than arrays
_MANY = 64  # devices, beyond which arrays are faster in solving for one number

# own: each device its link or share of the band. shared: one half-duplex channel. pooled: one band that is divided
# anew for each block once its loads are known, see `allocation.per_block`.
Medium = Literal["own", "shared", "pooled"]


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """What K devices take, as plain values; all in milliseconds."""

    tables: Times  # [n_tables, up to + 1], an expert call with 0, 1, ... tokens
    table: Ints  # [K], which of them is each device's
    slowness: Times  # [K], factor on the table: the live correction
    staging_ms: Times  # [K], of each row on the device, beside the expert calls
    way_ms: Times  # [K], a message that weighs nothing, one way
    down_ms: Times  # [K], of each row on the way to the device; shared and pooled: with the whole band
    up_ms: Times  # [K], of each row on the way back
    medium: Medium = "own"
    _rows: list[Row] = field(init=False, repr=False, compare=False, default_factory=list)

    def __post_init__(self) -> None:
        """Refuse arrays that do not speak of the same devices."""
        arrays = (self.slowness, self.staging_ms, self.way_ms, self.down_ms, self.up_ms)
        if any(len(array) != len(self.table) for array in arrays):
            lengths = sorted({len(array) for array in arrays})
            raise ValueError(f"a latency model of {len(self.table)} devices has arrays of length {lengths}")

    @property
    def n_devices(self) -> int:
        """How many devices it speaks of."""
        return len(self.table)

    @property
    def up_to(self) -> int:
        """The most tokens of an expert call that the tables know."""
        return int(self.tables.shape[1]) - 1

    @property
    def row_air_ms(self) -> Times:
        """[K], a row there and back."""
        return self.down_ms + self.up_ms

    def call_ms(self, devices: Ints, tokens: Ints) -> Times:
        """Return the time of expert calls.

        Args:
            devices: [C], who is called.
            tokens: [C], with how many.
        """
        return self.tables[self.table[devices], tokens] * self.slowness[devices]

    def row(self, k: int) -> Row:
        """Return what one row of a device takes, in plain numbers, which are faster one by one."""
        if not self._rows:
            call_ms = self.tables[self.table, 1] * self.slowness
            parts = (self.down_ms, self.way_ms, call_ms, self.staging_ms, self.up_ms)
            self._rows.extend(zip(*(part.tolist() for part in parts), strict=True))
        return self._rows[k]

    def with_rates(self, down_ms: Times, up_ms: Times, medium: Medium = "own") -> LatencyModel:
        """Return the same devices on other links."""
        return replace(self, down_ms=down_ms, up_ms=up_ms, medium=medium)


@dataclass(frozen=True, slots=True)
class Load:
    """What one block asks of each device."""

    rows: Ints  # [K], rows that travel
    device: Ints  # [C], of each expert call
    tokens: Ints  # [C], of each expert call; 0: not made

    def few(self, model: LatencyModel) -> tuple[list[int], list[Asked]]:
        """Return the loaded devices, and what is asked of each, in plain numbers; see `few_finish_ms`."""
        compute_ms: dict[int, float] = {}
        for k, ms in zip(self.device.tolist(), model.call_ms(self.device, self.tokens).tolist(), strict=True):
            compute_ms[k] = compute_ms.get(k, 0.0) + ms
        loaded, asked = [], []
        for k, n in enumerate(self.rows.tolist()):
            if n:
                down, way, _, staging, up = model.row(k)
                loaded.append(k)
                asked.append((n * down, way, compute_ms.get(k, 0.0) + n * staging, n * up))
        return loaded, asked

    def compute_ms(self, model: LatencyModel) -> Times:
        """[K], what each device computes: its calls one after another, and the staging of its rows."""
        calls = np.bincount(self.device, model.call_ms(self.device, self.tokens), model.n_devices)
        return calls + self.rows * model.staging_ms


@dataclass(frozen=True, slots=True)
class BlockTime:
    """When a block is done, counted from the first byte."""

    total_ms: float
    finish_ms: Times  # [K], when the last byte of each device is back; 0 if it is idle
    order: Ints | None = None  # on a shared channel: the devices in the order in which their requests are sent


def load_of(experts: Ints, keep: npt.NDArray[np.bool_], devices: Ints, n_experts: int, n_devices: int) -> Load:
    """Count what is asked of each device.

    Args:
        experts: [tokens, k].
        keep: [tokens, k], False: not asked for.
        devices: [tokens, k], who is asked; a token's experts on one device share one row.
        n_experts: of a block.
        n_devices: number of devices.
    """
    rows, made, tokens = count_calls(experts, keep, devices, n_experts, n_devices)
    return Load(rows, made // n_experts, tokens)


def count_calls(
    experts: Ints, keep: npt.NDArray[np.bool_], devices: Ints, n_experts: int, n_devices: int
) -> tuple[Ints, Ints, Ints]:
    """Return the rows of each device, the calls that are made, each as device x n_experts + expert, and the tokens of each call."""
    calls = np.bincount((devices * n_experts + experts).ravel(), keep.ravel()).astype(np.int64)
    made = np.flatnonzero(calls)
    rows = np.bincount(made // n_experts, calls[made], n_devices).astype(np.int64)
    for slot in range(1, experts.shape[1]):  # an earlier slot of the token already brought the row
        again = (devices[:, slot] == devices[:, 0]) & keep[:, 0]
        for earlier in range(1, slot):
            again |= (devices[:, slot] == devices[:, earlier]) & keep[:, earlier]
        tokens = np.flatnonzero(again & keep[:, slot])
        if len(tokens):
            rows -= np.bincount(devices[tokens, slot], minlength=n_devices)
    return rows, made, calls[made]


def makespan(load: Load, model: LatencyModel, order: Sequence[int] | Ints | None = None) -> BlockTime:
    """Predict how long a block takes.

    Args:
        load: what is asked of each device.
        model: of the devices and their links.
        order: on a shared channel, all devices in the order in which requests are sent; None: as `send_order` says.
    """
    if order is None and len(load.device) <= FEW:
        return _few_makespan(load, model)
    return finish_of(load.rows, load.compute_ms(model), model, order)


def finish_of(
    rows: Ints, compute_ms: Times, model: LatencyModel, order: Sequence[int] | Ints | None = None
) -> BlockTime:
    """Do what `makespan` does once it is known what each device computes: rows and compute_ms are [K]."""
    if model.medium == "shared":
        return _shared_makespan(rows, compute_ms, model, order)
    if model.medium == "pooled":
        total_ms = pooled_ms(rows, compute_ms, model)
        return BlockTime(total_ms, np.where(rows > 0, total_ms, 0.0))
    finish_ms = np.where(rows > 0, 2 * model.way_ms + compute_ms + rows * model.row_air_ms, 0.0)
    return BlockTime(float(finish_ms.max(initial=0.0)), finish_ms)


def _few_makespan(load: Load, model: LatencyModel) -> BlockTime:
    loaded, asked = load.few(model)
    done_ms, turns = few_finish_ms(asked, model.medium)
    finish_ms = np.zeros(len(load.rows))
    finish_ms[loaded] = done_ms
    order = np.array([loaded[turn] for turn in turns], np.int64) if model.medium == "shared" else None
    return BlockTime(max(done_ms, default=0.0), finish_ms, order)


def send_order(rows: Ints, compute_ms: Times, model: LatencyModel) -> Ints:
    """Order the requests on a shared channel: first to the device with the most left to do once it has its rows.

    This is Jackson's rule, which would be exact if replies did not share the channel.
    """
    tail_ms = 2 * model.way_ms + compute_ms + rows * model.up_ms
    loaded = np.flatnonzero(rows > 0)
    return loaded[np.argsort(-tail_ms[loaded], kind="stable")]


def pooled_ms(rows: Ints, compute_ms: Times, model: LatencyModel) -> float:
    """Return the block time when the band is divided so that all finish together, at rates linear in bandwidth.

    A device that needs air_k with the whole band and has until T - fixed_k to use it needs the share
    air_k / (T - fixed_k). Where these sum to one T is found. One over that sum is concave in T (a harmonic mean of what
    is linear) and nearly straight: Newton on it, from the left, takes few steps, and none passes the root.
    """
    loaded = rows > 0
    air_ms: list[float] = (rows * model.row_air_ms)[loaded].tolist()
    fixed_ms: list[float] = (2 * model.way_ms + compute_ms)[loaded].tolist()
    return pooled_root(air_ms, fixed_ms)


def pooled_root(air_ms: Sequence[float], fixed_ms: Sequence[float]) -> float:
    """Solve sum of air / (T - fixed) = 1 for T; see `pooled_ms`. A few plain numbers are faster without numpy."""
    if len(air_ms) > _MANY:
        return _pooled_root_of_many(np.array(air_ms), np.array(fixed_ms))
    if len(air_ms) == 2:  # a quadratic
        (air_a, air_b), (fixed_a, fixed_b) = air_ms, fixed_ms
        a_ms, b_ms = fixed_a + air_a, fixed_b + air_b
        return (a_ms + b_ms + math.sqrt((a_ms - b_ms) ** 2 + 4 * air_a * air_b)) / 2
    # Each device alone with the whole band: not enough for all. Nor is it if all had the mean fixed time (by air; Jensen).
    t_ms = max((fixed + air for fixed, air in zip(fixed_ms, air_ms, strict=True)), default=0.0)
    on_air = [(air, fixed) for air, fixed in zip(air_ms, fixed_ms, strict=True) if air > 0]
    if on_air:
        whole_ms = sum([air for air, _ in on_air])
        t_ms = max(t_ms, whole_ms + sum([air * fixed for air, fixed in on_air]) / whole_ms)
    while on_air:
        excess, slope = -1.0, 0.0
        least_ms = 1e-12 * t_ms  # what is lost to rounding beside a long fixed time
        for air, fixed in on_air:
            if (left_ms := t_ms - fixed) < least_ms:
                left_ms = least_ms
            share = air / left_ms
            excess += share
            slope += share / left_ms
        if excess <= 0:  # one that needs no air is done last: the others have time to spare
            break
        step_ms = excess * (1 + excess) / slope
        t_ms += step_ms
        if step_ms <= 1e-13 * t_ms:
            break
    return t_ms


def _pooled_root_of_many(air_ms: Times, fixed_ms: Times) -> float:
    t_ms = float((fixed_ms + air_ms).max())
    air_ms, fixed_ms = air_ms[air_ms > 0], fixed_ms[air_ms > 0]
    if whole_ms := float(air_ms.sum()):
        t_ms = max(t_ms, whole_ms + float(air_ms @ fixed_ms) / whole_ms)
    while True:
        left_ms = np.maximum(t_ms - fixed_ms, 1e-12 * t_ms)
        shares = air_ms / left_ms
        excess = float(shares.sum()) - 1
        if excess <= 0:
            return t_ms
        step_ms = excess * (1 + excess) / float((shares / left_ms).sum())
        t_ms += step_ms
        if step_ms <= 1e-13 * t_ms:
            return t_ms


def few_finish_ms(asked: Sequence[Asked], medium: Medium) -> tuple[list[float], list[int]]:
    """Do what `makespan` does for a few devices, in plain numbers, which for them is faster.

    Returns:
        When each is done, and on a shared channel the order of the requests.
    """
    if medium == "own":
        return [send + 2 * way + compute + reply for send, way, compute, reply in asked], []
    if medium == "pooled":
        air_ms = [send + reply for send, _, _, reply in asked]
        return [pooled_root(air_ms, [2 * way + c for _, way, c, _ in asked])] * len(asked), []
    order = sorted(range(len(asked)), key=lambda i: -(2 * asked[i][1] + asked[i][2] + asked[i][3]))
    sent = 0.0
    ready: list[tuple[float, int]] = []
    for turn, i in enumerate(order):
        send, way, compute, _ = asked[i]
        sent += send
        ready.append((sent + way + compute, turn))
    end, finish = sent, [0.0] * len(asked)
    for at, turn in sorted(ready):
        _, way, _, reply = asked[order[turn]]
        end = max(end, at) + reply
        finish[order[turn]] = end + way
    return finish, order


def latency_model(devices: Sequence[DeviceLatency], up_to: int, medium: Medium = "own") -> LatencyModel:
    """Put the live models of devices together.

    Args:
        devices: as the trackers have them, whose curves stay the same objects; a correction holds for all that a device
            is charged with, but not for the air of a channel that it shares with others.
        up_to: the most tokens that a call may have.
        medium: what the links are.
    """
    table, tables = _tables(tuple(device.curve for device in devices), 1 << max(0, up_to - 1).bit_length())
    known = [(d.correction, d.row_link_ms, d.up_part, d.staging_ms, d.round_trip_ms) for d in devices]
    correction, link_ms, up_part, staging_ms, round_trip_ms = np.array([*zip(*known, strict=True)])  # one array: sooner
    link_ms = link_ms * correction if medium == "own" else link_ms
    up_ms = link_ms * up_part
    return LatencyModel(
        tables=tables,
        table=table,
        slowness=correction,
        staging_ms=correction * staging_ms,
        way_ms=correction * round_trip_ms / 2,
        down_ms=link_ms - up_ms,
        up_ms=up_ms,
        medium=medium,
    )


def linear_model(row_ms: Times, up_to: int) -> LatencyModel:
    """Return the model of a row time and nothing else: every row of a device takes as long."""
    none = np.zeros(len(row_ms))
    tables = np.zeros((1, up_to + 1))
    return LatencyModel(tables, np.zeros(len(row_ms), np.int64), none + 1.0, none, none, row_ms, none)


_KEPT_TABLES = 64
_kept_tables: dict[tuple[int, ...], tuple[tuple[Curve, ...], Ints, Times]] = {}


def _tables(curves: tuple[Curve, ...], up_to: int) -> tuple[Ints, Times]:
    """Return which table each of some curves is, and the tables.

    Trackers hand out the same curves for every block. They are looked up by identity: to hash one takes longer than all else.
    """
    key = (up_to, *map(id, curves))
    if (known := _kept_tables.get(key)) is None:
        number: dict[Curve, int] = {}
        table = np.array([number.setdefault(curve, len(number)) for curve in curves], np.int64)
        tables = np.stack([_call_table(curve, up_to) for curve in number])
        tables.setflags(write=False)
        table.setflags(write=False)
        if len(_kept_tables) >= _KEPT_TABLES:
            _kept_tables.clear()
        known = _kept_tables[key] = curves, table, tables  # the curves as well, so that nobody else gets their identity
    return known[1], known[2]


@lru_cache(maxsize=1024)
def _call_table(curve: Curve, up_to: int) -> Times:
    """Tabulate a curve for 0 .. up_to tokens."""
    tokens = [float(step[0]) for step in curve]
    table = np.interp(np.arange(up_to + 1), tokens, [step[1] for step in curve])
    table[0] = 0.0
    for beyond in range(curve[-1][0] + 1, up_to + 1):
        table[beyond] = interpolate(curve, beyond)
    return table


def _shared_makespan(
    rows: Ints, compute_ms: Times, model: LatencyModel, order: Sequence[int] | Ints | None
) -> BlockTime:
    loaded = send_order(rows, compute_ms, model) if order is None else np.array([k for k in order if rows[k] > 0])
    finish_ms = np.zeros(len(rows))
    if len(loaded) == 0:
        return BlockTime(0.0, finish_ms, loaded)
    way_ms = model.way_ms[loaded]
    sent_ms = np.cumsum((rows * model.down_ms)[loaded])
    ready_ms = sent_ms + way_ms + compute_ms[loaded]
    turn = np.argsort(ready_ms, kind="stable")
    reply_ms = (rows * model.up_ms)[loaded][turn]
    # A reply starts when it is ready and the one before is done; none before the last request is sent:
    # end_i = sum up to i + max over j <= i of (start_j - sum before j).
    until_ms = np.cumsum(reply_ms)
    start_ms = np.maximum(ready_ms[turn], sent_ms[-1])
    end_ms = until_ms + np.maximum.accumulate(start_ms - (until_ms - reply_ms))
    finish_ms[loaded[turn]] = end_ms + way_ms[turn]
    return BlockTime(float(finish_ms.max()), finish_ms, loaded)
