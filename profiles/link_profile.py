"""How long bytes take on a link: the modelled radios and cables that ship with the package."""

from __future__ import annotations

import math
from functools import cache
from importlib.resources import files
from typing import Annotated, Literal

import msgspec

Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]

RADIO = "radio:"  # begins the description of a channel by bandwidth and spectral efficiency
RADIO_EXAMPLE = "radio:mhz=100:efficiency=6"
ALIASES = {"wifi-5ghz": "wifi-5ghz-mid", "wifi-6": "wifi-6-mid"}


class LinkProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One device's way to the base station and back."""

    name: str
    description: str
    down_mbps: Positive  # to the device, 10^6 bit/s of payload while nobody else sends
    up_mbps: Positive
    round_trip_ms: Positive  # of a message that weighs nothing, at its best
    jitter_ms: NotNegative  # mean of what is added to a round trip, exponentially distributed
    half_duplex: bool  # one channel that both directions share, as on WiFi
    sources: tuple[str, ...]
    origin: Literal["measured", "modelled"] = "modelled"

    def down_ms(self, size_bytes: float) -> float:
        """Return how long bytes to the device occupy the link."""
        return size_bytes * 8e-3 / self.down_mbps

    def up_ms(self, size_bytes: float) -> float:
        """Return how long bytes from the device occupy the link."""
        return size_bytes * 8e-3 / self.up_mbps

    def row_ms(self, row_bytes: float) -> float:
        """Return how long one row occupies the link, there and back."""
        return self.down_ms(row_bytes) + self.up_ms(row_bytes)

    def exchange_ms(self, down_bytes: float, up_bytes: float) -> float:
        """Predict the median time of a request and its reply on an idle link, without what the device computes."""
        return self.round_trip_ms + self.down_ms(down_bytes) + self.up_ms(up_bytes) + math.log(2) * self.jitter_ms


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    description: str
    half_duplex: bool
    down_mbps: tuple[Positive, str]  # value and source, in all four
    up_mbps: tuple[Positive, str]
    round_trip_ms: tuple[Positive, str]
    jitter_ms: tuple[NotNegative, str]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sources: dict[str, str]
    links: dict[str, _Entry]


def link_names() -> tuple[str, ...]:
    """Return the names that `modelled_link` takes, aliases last."""
    return (*_table().links, *ALIASES)


def modelled_link(name: str) -> LinkProfile:
    """Return a link of the table, or the radio channel that a text such as `radio:mhz=100:efficiency=6` describes.

    Raises:
        ValueError: no such link; names those there are.
    """
    if name.startswith(RADIO):
        return _radio_link(name)
    table = _table()
    name = ALIASES.get(name, name)
    if name not in table.links:
        raise ValueError(
            f"no link is called {name!r}; expected one of {', '.join(link_names())}, or a radio channel as in {RADIO_EXAMPLE}"
        )
    entry = table.links[name]
    values = {field: getattr(entry, field) for field in ("down_mbps", "up_mbps", "round_trip_ms", "jitter_ms")}
    sources = tuple(
        f"{field} {value:g}: {'; '.join(table.sources[key] for key in source.split(' x '))}"
        for field, (value, source) in values.items()
    )
    numbers = {field: value for field, (value, _) in values.items()}
    return LinkProfile(name, entry.description, **numbers, half_duplex=entry.half_duplex, sources=sources)


def _radio_link(text: str) -> LinkProfile:
    """Read `radio:` and its options: mhz, efficiency (bit/s/Hz, both ways), rtt_ms, jitter_ms."""
    values = {"rtt_ms": 2.0, "jitter_ms": 0.0}
    for item in text.removeprefix(RADIO).split(":"):
        key, _, value = item.partition("=")
        if key not in ("mhz", "efficiency", "rtt_ms", "jitter_ms"):
            raise ValueError(f"link {text!r} has no option {key!r}; expected {RADIO_EXAMPLE}, and rtt_ms and jitter_ms")
        try:
            values[key] = float(value)
        except ValueError as error:
            raise ValueError(f"link {text!r}: {key} is {value!r}, expected a number") from error
    if missing := [key for key in ("mhz", "efficiency") if key not in values]:
        raise ValueError(f"link {text!r} does not say {' and '.join(missing)}; expected {RADIO_EXAMPLE}")
    if min(values["mhz"], values["efficiency"], values["rtt_ms"]) <= 0 or values["jitter_ms"] < 0:
        raise ValueError(f"link {text!r}: expected positive numbers; jitter_ms may be 0")
    mbps = values["mhz"] * values["efficiency"]
    description = f"{values['mhz']:g} MHz at {values['efficiency']:g} bit/s/Hz, both ways"
    return LinkProfile(
        text, description, mbps, mbps, values["rtt_ms"], values["jitter_ms"], half_duplex=True,
        sources=("declared by its user",),
    )  # fmt: skip


@cache
def _table() -> _Table:
    return msgspec.json.decode((files("wdmoe.profiles") / "links.json").read_bytes(), type=_Table)
