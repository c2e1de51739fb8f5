"""How long one expert takes on one device: the measured table, and the prediction drawn from it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

VERSION = 1
Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Minute = Annotated[float, msgspec.Meta(ge=0, le=60_000)]  # in ms, at most
Count = Annotated[int, msgspec.Meta(ge=1)]


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """The time of one expert call with a number of tokens."""

    tokens: Count
    p50_ms: Positive
    p95_ms: Positive


class StagingPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """What a request costs beside its expert calls, at a number of rows; medians."""

    tokens: Count
    convert_ms: Minute  # twice as many rows off the wire to float32, sums back to the wire
    gather_ms: Minute  # rows of one expert into one piece
    weight_ms: Minute  # outputs times gate weights
    sum_ms: Minute  # into one row for each row of the request


class Conditions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a measurement was made under; None: this machine does not say."""

    power_mode: str | None = None  # of nvpmodel, for example "MAXN"
    jetson_clocks: bool | None = None  # whether the clocks are held at their top
    clocks_mhz: dict[str, float] = {}  # "cpu", "gpu", "emc": while it was at work
    throttled: tuple[str, ...] = ()  # what held the clocks down meanwhile; empty: nothing was noticed
    rss_bytes: Annotated[int, msgspec.Meta(ge=0)] | None = None  # of the process, at its highest
    weights_bytes: Annotated[int, msgspec.Meta(ge=0)] | None = None  # that loading the engine took
    load_average: NotNegative | None = None  # of one minute, when it began: others on the machine


class Emulated(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an emulated device pretends to be, and what it charges time for."""

    device: str  # of `hardware_names()`
    link: str | None  # of `link_names()`; None: the real link, as it is
    seed: int
    d_model: Count
    d_ff: Count
    precision: str
    shared: bool = False  # whether the link's channel is shared with other emulated devices
    share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0  # of the link's bandwidth that is the device's own

    def __str__(self) -> str:
        """Say it in one line, as reports do."""
        how = "shared " if self.shared else f"{100 * self.share:.3g} % of " if self.share < 1 else ""
        link = f" over {how}{self.link}" if self.link is not None else ""
        return f"emulated {self.device}{link}, charged as {self.d_model}x{self.d_ff} {self.precision}"


class DeviceProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The latency table of one device, engine and expert shape; travels in the device's hello.

    Predictions are monotone in tokens and linear between points; beyond the last, see `interpolate`.
    """

    version: int
    device: str  # the hardware, for example "Intel(R) Xeon(R) Processor, 2 cores"
    software: str  # engine and its version, Python, operating system
    engine: str
    precision: str  # of the weights
    d_model: int
    d_ff: int
    points: Annotated[tuple[Point, ...], msgspec.Meta(min_length=1)]  # ascending in tokens
    origin: Literal["measured", "modelled", "emulated"] = "measured"
    cold: tuple[Point, ...] = ()  # the same calls with weights that no cache holds
    staging: tuple[StagingPoint, ...] = ()
    conditions: Conditions | None = None
    sources: tuple[str, ...] = ()  # of what is modelled: which value comes from where
    emulated: Emulated | None = None
    row_link_ms: Minute = 0.0  # on an emulated link, what each float16 row adds, there and back
    row_up_ms: Minute | None = None  # of that, what the way back takes; None: half

    def __post_init__(self) -> None:
        """Refuse a table that does not ascend."""
        for table in (self.points, self.cold, self.staging):
            tokens = [point.tokens for point in table]
            if tokens != sorted(set(tokens)):
                raise ValueError(f"token counts of a profile must ascend, got {tokens}")
        if (self.origin == "emulated") != (self.emulated is not None):
            raise ValueError("a profile whose origin is emulated, and no other, says what is emulated")
        if self.row_up_ms is not None and self.row_up_ms > self.row_link_ms:
            raise ValueError(f"of {self.row_link_ms} ms there and back, the way back takes {self.row_up_ms}")

    def call_ms(self, tokens: int) -> float:
        """Predict the median time of one expert call with `tokens` rows; 0 for none."""
        return interpolate(self.curve(), tokens)

    def curve(self) -> tuple[tuple[int, float], ...]:
        """The table as (tokens, p50 in ms), made monotone: more rows never take less time."""
        highest = 0.0
        steps: list[tuple[int, float]] = []
        for point in self.points:
            highest = max(highest, point.p50_ms)
            steps.append((point.tokens, highest))
        return tuple(steps)

    @property
    def staging_ms(self) -> float:
        """What each row of a request costs beside the expert calls, at the most rows that were measured; 0 if none were."""
        if not self.staging:
            return 0.0
        most = self.staging[-1]
        return (most.convert_ms / 2 + most.gather_ms + most.weight_ms + most.sum_ms) / most.tokens

    @property
    def tail_ratio(self) -> float:
        """The worst p95 over p50 of the table: how far a call may stray without anything being wrong."""
        return max(1.0, *(point.p95_ms / point.p50_ms for point in self.points))


def interpolate(curve: Sequence[tuple[int, float]], tokens: int) -> float:
    """Read a monotone curve of (tokens, ms): flat before its points, linear between, the roofline beyond.

    Beyond the last point a call takes at least what the best rate of the table gives (which is all that a table that
    ends on the flat part of the roofline can tell) and at least what the last slope gives.
    """
    if tokens <= 0:
        return 0.0
    at = bisect_right(curve, tokens, key=lambda step: step[0])
    if at == 0:
        return curve[0][1]
    last_tokens, last_ms = curve[-1]
    if tokens == last_tokens:
        return last_ms
    if at < len(curve):
        (n0, t0), (n1, t1) = curve[at - 1], curve[at]
        return t0 + (t1 - t0) * (tokens - n0) / (n1 - n0)
    at_best_rate = tokens * min(ms / count for count, ms in curve)
    n0, t0 = curve[-2] if len(curve) > 1 else (0, 0.0)
    return max(last_ms, at_best_rate, last_ms + (last_ms - t0) / (last_tokens - n0) * (tokens - last_tokens))


def read_profile(path: Path) -> DeviceProfile:
    """Read a profile from JSON.

    Raises:
        ValueError: the file is not a profile of this version; names the file and the field.
    """
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=DeviceProfile)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise ValueError(f"{path}: not a device profile ({error})") from error
    if profile.version != VERSION:
        raise ValueError(f"{path}: profile version {profile.version}, expected {VERSION}; run wdmoe-device again")
    return profile


def encode_profile(profile: DeviceProfile) -> bytes:
    """Turn a profile into JSON that a person can read."""
    return msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n"
