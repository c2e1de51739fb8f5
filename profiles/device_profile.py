"""How long one expert takes on one device: the measured table, and the prediction drawn from it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

VERSION = 1
Positive = Annotated[float, msgspec.Meta(gt=0)]


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """The time of one expert call with a number of tokens."""

    tokens: Annotated[int, msgspec.Meta(ge=1)]
    p50_ms: Positive
    p95_ms: Positive


class DeviceProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The latency table of one device, engine and expert shape; travels in the device's hello.

    Predictions are monotone in tokens, linear between points, and proportional to the last slope beyond them.
    """

    version: int
    device: str  # the hardware, for example "Intel(R) Xeon(R) Processor, 2 cores"
    software: str  # engine and its version, Python, operating system
    engine: str
    precision: str  # of the weights
    d_model: int
    d_ff: int
    points: Annotated[tuple[Point, ...], msgspec.Meta(min_length=1)]  # ascending in tokens
    origin: Literal["measured", "modelled"] = "measured"

    def __post_init__(self) -> None:
        """Refuse a table that does not ascend."""
        tokens = [point.tokens for point in self.points]
        if tokens != sorted(set(tokens)):
            raise ValueError(f"token counts of a profile must ascend, got {tokens}")

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
    def tail_ratio(self) -> float:
        """The worst p95 over p50 of the table: how far a call may stray without anything being wrong."""
        return max(1.0, *(point.p95_ms / point.p50_ms for point in self.points))


def interpolate(curve: Sequence[tuple[int, float]], tokens: int) -> float:
    """Read a monotone curve of (tokens, ms): flat before, linear between, last slope beyond its points."""
    if tokens <= 0:
        return 0.0
    at = bisect_right(curve, tokens, key=lambda step: step[0])
    if at == 0:
        return curve[0][1]
    if at < len(curve):
        (n0, t0), (n1, t1) = curve[at - 1], curve[at]
        return t0 + (t1 - t0) * (tokens - n0) / (n1 - n0)
    last_tokens, last_ms = curve[-1]
    if len(curve) == 1:
        return last_ms * tokens / last_tokens
    n0, t0 = curve[-2]
    return last_ms + (last_ms - t0) / (last_tokens - n0) * (tokens - last_tokens)


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


def write_profile(path: Path, profile: DeviceProfile) -> None:
    """Write a profile as JSON, under a temporary name first."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")
    partial.replace(path)
