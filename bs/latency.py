"""How long a request will take: the device's own profile and the round trip, corrected by what is measured."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from wdmoe.profiles.device_profile import DeviceProfile, interpolate

_WINDOW = 33  # measurements the correction is the median of: robust, and quick to follow a change
_CORRECTION_RANGE = (0.05, 50.0)
_ROWS_THAT_TELL = 16  # of a request, from which its time on the air says something of the link's rate
_ENOUGH = 4  # such requests, from which the rate counts as known


@dataclass(frozen=True, slots=True)
class DeviceLatency:
    """The latency model of one device, as plain values."""

    curve: tuple[tuple[int, float], ...]  # (tokens, ms per expert call), monotone
    round_trip_ms: float
    correction: float = 1.0  # measured over predicted, median of the last requests
    row_link_ms: float = 0.0  # what each row adds on a link whose rate is known, there and back
    up_part: float = 0.5  # of that, what the way back takes
    staging_ms: float = 0.0  # what each row adds on the device beside the expert calls

    def request_ms(self, counts: Sequence[int], rows: int | None = None) -> float:
        """Predict a request that calls one expert after another.

        Args:
            counts: rows of each expert called.
            rows: that travel; None: no row is used by two experts.
        """
        compute_ms = sum(interpolate(self.curve, count) for count in counts)
        rows_ms = (self.row_link_ms + self.staging_ms) * (sum(counts) if rows is None else rows)
        return (self.round_trip_ms + rows_ms + compute_ms) * self.correction


@dataclass(slots=True)
class LatencyTracker:
    """Corrects one device's prediction while the system runs."""

    profile: DeviceProfile
    round_trip_ms: float = 0.0
    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    compute_ratios: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))  # the same, computing alone
    rows_air_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))  # a row there and back, measured
    row_air_ms: tuple[float, float] = (0.0, 0.0)  # a row down and up with the whole band, as far as is known
    air_from: Literal["nobody", "operator", "profile", "requests"] = "nobody"  # who told
    share: float = 1.0  # of the band, that its requests get now
    _lasting_share: float = 1.0  # that predictions for later blocks are for
    _model: DeviceLatency | None = None
    _curve: tuple[tuple[int, float], ...] = ()  # of the profile
    _staging_ms: float = 0.0  # of the profile, of each row
    _call_ms: dict[int, float] = field(default_factory=dict)  # of the profile, by tokens: each is worked out once

    def __post_init__(self) -> None:
        """Work out the profile's curve, once, and take what the profile says of the link."""
        self._curve, self._staging_ms = self.profile.curve(), self.profile.staging_ms
        if self.profile.row_link_ms:
            up_ms = self.profile.row_up_ms
            up_ms = self.profile.row_link_ms / 2 if up_ms is None else up_ms
            self.row_air_ms, self.air_from = (self.profile.row_link_ms - up_ms, up_ms), "profile"

    def state_air(self, down_ms: float, up_ms: float) -> None:
        """Take what the operator says that a row is on the air; it holds, whatever requests tell."""
        self.row_air_ms, self.air_from, self._model = (down_ms, up_ms), "operator", None

    def set_share(self, share: float, lasting: bool) -> None:
        """Set the share of the band; one that lasts is what the next blocks are predicted with."""
        self.share = share
        if lasting and share != self._lasting_share:
            self._lasting_share, self._model = share, None

    def observe_round_trip(self, measured_ms: float) -> None:
        """Take the round trip of a ping; the smallest seen is the link, the rest was waiting."""
        self.round_trip_ms = min(self.round_trip_ms, measured_ms) if self.round_trip_ms else measured_ms
        self._model = None

    def observe_request(
        self,
        counts: Sequence[int],
        measured_ms: float | None,
        rows: int | None = None,
        compute_ms: float | None = None,
    ) -> None:
        """Take what a request really took, and what of it the device says it computed; see `DeviceLatency.request_ms`.

        Without what a share of the band made it take longer: rates are those of the whole. None of a piece of a request, which
        was on its way while others were: what it computed counts, and of the link nothing is learnt.
        """
        rows = sum(counts) if rows is None else rows
        computing_ms = self._computing_ms(counts, rows)
        uncorrected = self.round_trip_ms + sum(self.row_air_ms) * rows + computing_ms
        if uncorrected > 0:
            whole = measured_ms is not None
            if measured_ms is None:
                measured_ms = uncorrected - computing_ms + (computing_ms if compute_ms is None else compute_ms)
            low, high = _CORRECTION_RANGE
            self.ratios.append(min(high, max(low, measured_ms / uncorrected)))
            if compute_ms is not None:
                self.compute_ratios.append(min(high, max(low, compute_ms / computing_ms)))
                if whole and rows >= _ROWS_THAT_TELL and self.air_from in ("nobody", "requests"):
                    self._learn_air(max(0.0, measured_ms - compute_ms - self.round_trip_ms) / rows)
            self._model = None

    def _learn_air(self, row_ms: float) -> None:
        """Learn the rate of a link that nobody tells.

        The quarter of requests that were least disturbed tells it: of the others, some waited for the air behind each other.
        """
        self.rows_air_ms.append(row_ms)
        if len(self.rows_air_ms) < _ENOUGH:
            return
        if self.air_from == "nobody":
            self.ratios.clear()  # until now, what was the air's was put down to the device
        half_ms = sorted(self.rows_air_ms)[len(self.rows_air_ms) // 4] / 2
        self.row_air_ms, self.air_from = (half_ms, half_ms), "requests"

    def request_ms(self, counts: Sequence[int], rows: int) -> float:
        """Predict a request that has the whole band; see `DeviceLatency.request_ms`."""
        link_ms = self.round_trip_ms + sum(self.row_air_ms) * rows
        return (link_ms + self._computing_ms(counts, rows)) * self.model().correction

    def parts_ms(self, counts: Sequence[int], rows: int) -> tuple[float, float]:
        """Predict how long a request is on the air, there and back, and how long the device computes it."""
        slowness = median(self.compute_ratios) if self.compute_ratios else 1.0
        return rows * sum(self.row_air_ms), self._computing_ms(counts, rows) * slowness

    def asked_ms(self, counts: Sequence[int], rows: int) -> tuple[float, float, float, float]:
        """Predict a request by its parts: on the air, one way, computing, its reply on the air; see `airtime.Asked`."""
        down_ms, up_ms = self.row_air_ms
        return rows * down_ms, self.round_trip_ms / 2, self.parts_ms(counts, rows)[1], rows * up_ms

    def asked_on_share_ms(self, counts: Sequence[int], rows: int) -> tuple[float, float, float, float]:
        """Predict the same on the share of the band that the device has now."""
        send_ms, way_ms, compute_ms, reply_ms = self.asked_ms(counts, rows)
        return send_ms / self.share, way_ms, compute_ms, reply_ms / self.share

    def model(self) -> DeviceLatency:
        """Return the model as it stands now."""
        if self._model is None:
            correction = median(self.ratios) if self.ratios else 1.0
            whole_ms = sum(self.row_air_ms)
            up_part = self.row_air_ms[1] / whole_ms if whole_ms else 0.5
            link_ms = whole_ms / self._lasting_share
            self._model = DeviceLatency(self._curve, self.round_trip_ms, correction, link_ms, up_part, self._staging_ms)
        return self._model

    def _computing_ms(self, counts: Sequence[int], rows: int) -> float:
        """Predict what the device does for a request, without the correction: its rows staged, one call after another."""
        known = self._call_ms
        for count in counts:
            if count not in known:
                known[count] = interpolate(self._curve, count)
        return sum([known[count] for count in counts]) + rows * self._staging_ms
