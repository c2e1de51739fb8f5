"""What a model will need and how fast it will answer on given devices and links, from config and profiles alone."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from wdmoe.export.balance import Placement, balanced, read_counts
from wdmoe.export.families import ModelLayout
from wdmoe.export.placement import held_by, placement_of, split_per_device
from wdmoe.export.planning import describe_held, gb
from wdmoe.export.sizing import HEADROOM, StationSize, device_memory, fits, most_held, station_size
from wdmoe.export.weights import Part, embedding_parts, head_parts, shared_parts, stage_parts
from wdmoe.profiles.base_station import BaseStation, modelled_station
from wdmoe.profiles.forecast import PassTime, RoutedWork, Site, StationWork, pass_time
from wdmoe.profiles.link_profile import LinkProfile, modelled_link
from wdmoe.profiles.modelled import ExpertShape, memory_bytes, modelled_profile
from wdmoe.runtime.manifest import PRECISIONS, Precision

if TYPE_CHECKING:
    from rich.console import RenderableType

Channel = Literal["shared", "orthogonal"]
# Means over 400 validation rows of PIQA in SmolLM2's tokens: 14 of the question, 2 answers of 23 with a shared beginning.
QUESTION_ROWS, ANSWER_ROWS = 50, 46
CONTEXT_TOKENS = 512  # before a token that is generated
_MOST_DEVICES = 1000


@dataclass(frozen=True, slots=True)
class PlannedDevice:
    """One device of a forecast."""

    hardware: str
    link: str
    memory_bytes: int
    could_hold: int  # experts of all blocks together, with headroom
    held: int  # 0 where no placement fits
    needed_bytes: int

    @property
    def fits(self) -> bool:
        """Whether it holds its experts with headroom."""
        return fits(self.memory_bytes, self.needed_bytes)


@dataclass(frozen=True, slots=True)
class Forecast:
    """A plan before anything is bought; every number of it is modelled."""

    layout: ModelLayout
    config: str  # where the config is from
    precision: Precision
    channel: Channel
    station: BaseStation
    station_size: StationSize
    devices: tuple[PlannedDevice, ...]
    placement: Placement | None  # None: the devices cannot hold the model
    advice: str | None  # what to change, where something does not fit
    question: PassTime | None  # one of PIQA's size
    token: PassTime | None  # of a text that is generated
    sources: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether base station and devices hold their parts."""
        enough = fits(self.station.memory_bytes, self.station_size.memory_bytes)
        return enough and self.placement is not None and all(device.fits for device in self.devices)

    def as_json(self) -> dict[str, Any]:
        """Say the same for programs."""
        spec = self.layout.spec
        return {
            "origin": "modelled",
            "model": spec.name,
            "config": self.config,
            "precision": self.precision,
            "channel": self.channel,
            "fits": self.fits,
            "advice": self.advice,
            "headroom": HEADROOM,
            "bs": {"hardware": self.station.name, "memory_bytes": self.station.memory_bytes}
            | {"needed_bytes": self.station_size.memory_bytes, "kv_bytes": self.station_size.kv_bytes}
            | {"kv_tokens": self.station_size.context},
            "devices": [asdict(device) | {"fits": device.fits} for device in self.devices],
            "placement": self.placement,
            "question": self.question and _pass_json(self.question) | {"answer_rows": ANSWER_ROWS},
            "generated_token": self.token and _pass_json(self.token) | {"context": CONTEXT_TOKENS},
            "tokens_per_s": self.token and 1000 / self.token.total_ms,
            "sources": self.sources,
        }


def forecast(
    layout: ModelLayout,
    config: str,
    hardware: Sequence[str],
    links: Sequence[str],
    precision: Precision,
    bs: str,
    experts_per_device: int | None,
    channel: Channel,
) -> Forecast:
    """Work out what fits where and how long it takes.

    Args:
        layout: of the model.
        config: where it is from.
        hardware: names of modelled devices, one for each.
        links: names of modelled links, one for each device, or one for all.
        precision: of the experts.
        bs: name of a modelled base station.
        experts_per_device: contiguous, the same in every block; None: balanced by speed, as memory allows.
        channel: whether the devices share one channel or each has its own.

    Raises:
        ValueError: a name is not known, or numbers do not fit each other.
    """
    if len(links) not in (1, len(hardware)):
        raise ValueError(f"{len(links)} links for {len(hardware)} devices; give one for all, or one for each")
    spec, station = layout.spec, modelled_station(bs)
    shape = ExpertShape(spec.d_model, spec.d_ff)
    each = [modelled_link(name) for name in (links if len(links) > 1 else [*links] * len(hardware))]
    sites = [Site(modelled_profile(name, precision, shape), link) for name, link in zip(hardware, each, strict=True)]
    room = [most_held(spec, precision, memory_bytes(name)) for name in hardware]
    placement = _place(layout, precision, sites, room, experts_per_device)
    devices = tuple(
        _planned(layout, precision, name, link, room[k], placement, k)
        for k, (name, link) in enumerate(zip(hardware, each, strict=True))
    )
    size = station_size(layout)
    known = {line for site in sites for line in (*site.profile.sources, *site.link.sources)} | set(station.sources)
    question = token = None
    if placement is not None:
        work, routed = station_work(layout), RoutedWork(spec.n_experts, spec.top_k, spec.d_model)
        places = [[devices_of[0] for devices_of in row] for row in placement]
        shared = channel == "shared"
        question = pass_time(
            QUESTION_ROWS, ANSWER_ROWS, QUESTION_ROWS, station, work, routed, sites, places, shared
        )  # fmt: skip
        token = pass_time(1, 1, CONTEXT_TOKENS, station, work, routed, sites, places, shared)
    return Forecast(
        layout, config, precision, channel, station, size, devices, placement,
        _advice(layout, precision, hardware, devices, placement, station, size), question, token, tuple(sorted(known)),
    )  # fmt: skip


def read_devices(text: str) -> tuple[str, ...]:
    """Read names of devices with their numbers, such as agx-orin-64gb,2xorin-nano-8gb.

    Raises:
        ValueError: a part of it has no name, or there are too many.
    """
    names: list[str] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(?:(\d{1,4})\s*x)?\s*([a-z][a-z0-9.-]*)\s*", part)
        if found is None:
            raise ValueError(f"{part.strip()!r} is not a device; expected a name like orin-nx-16gb or 2xorin-nano-8gb")
        names += [found[2]] * int(found[1] or 1)
    if not 1 <= len(names) <= _MOST_DEVICES:
        raise ValueError(f"{len(names)} devices; expected 1 to {_MOST_DEVICES}")
    return tuple(names)


def station_work(layout: ModelLayout) -> StationWork:
    """Count the weights that the base station multiplies with."""
    spec = layout.spec
    stages = tuple(_weights(stage_parts(layout, block)) for block in range(spec.n_blocks))
    head = head_parts(layout) or embedding_parts(layout)
    query_dim = spec.n_heads * spec.head_dim
    return StationWork(stages, _weights(shared_parts(layout, 0)), _weights(head), spec.kv_dim, query_dim)


def forecast_table(found: Forecast) -> RenderableType:
    """Lay out a forecast for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    spec = found.layout.spec
    memory = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("", "hardware", "experts", "needs GB", "has GB", "fits"):
        memory.add_column(name, justify="right" if "GB" in name else "left")
    size, station = found.station_size, found.station
    memory.add_row(
        "bs", station.name, "none", gb(size.memory_bytes), gb(station.memory_bytes),
        _yes(fits(station.memory_bytes, size.memory_bytes)),
    )  # fmt: skip
    for number, device in enumerate(found.devices):
        held = f"room for {device.could_hold}" if found.placement is None else describe_held(found.placement, number)
        cells = (gb(device.needed_bytes), gb(device.memory_bytes), _yes(device.fits))
        memory.add_row(f"device-{number}", device.hardware, held, *(cells if found.placement else ("-", cells[1], "-")))
    notes = [
        (
            f"Memory is to stay {HEADROOM:.0%} free. Needs of the bs: float32 stages, scratch and {gb(size.kv_bytes)} GB of keys "
            f"and values ({size.context:,} tokens); of a device: experts in {found.precision}, scratch."
        )
    ]
    if found.advice is not None:
        notes.append(f"Does not fit: {found.advice}.")
    heading = [
        f"{spec.name} ({found.config}), experts {found.precision}, {found.channel} channel, all modelled",
        f"{spec.n_blocks} blocks x {spec.n_experts} experts, top-{spec.top_k}; {_links(found.devices)}",
    ]
    parts: list[RenderableType] = [*map(Text, heading), memory, *map(Text, notes)]
    if found.question is not None and found.token is not None:
        parts += [
            _times_table(found.question, found.token),
            *map(Text, _time_notes(found, found.question, found.token)),
        ]
    return Group(*parts)


def _times_table(question: PassTime, token: PassTime) -> RenderableType:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    times = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("alone in the system", "seconds", "BS", "air", "devices", "bottleneck"):
        times.add_column(name, justify="left" if name in ("alone in the system", "bottleneck") else "right")
    for name, one in ((f"question, {QUESTION_ROWS} rows", question), ("next token", token)):
        cells = [f"{ms / 1000:.3f}" for ms in (one.total_ms, one.bs_ms, one.air_ms, one.device_ms)]
        times.add_row(name, *cells, one.bottleneck)
    return times


def _time_notes(found: Forecast, question: PassTime, token: PassTime) -> list[str]:
    return [
        (
            f"{question.total_ms / 1000:.3g} s a question, {1000 / token.total_ms:.3g} tokens/s in generation. With many questions "
            f"in flight at most {question.at_best_per_s:.3g} a second, bound by {question.busiest}."
        ),
        (
            f"Assumed: a question like PIQA's is {QUESTION_ROWS} tokens ({ANSWER_ROWS} of them of two answers, shared beginnings "
            f"once); a token is generated after {CONTEXT_TOKENS}; fp16 on the wire; every expert equally likely; policy exact. "
            "Formulas: docs/export.md. --json names the source of each figure."
        ),
    ]


def _place(
    layout: ModelLayout,
    precision: Precision,
    sites: Sequence[Site],
    room: Sequence[int],
    experts_per_device: int | None,
) -> Placement | None:
    spec = layout.spec
    if experts_per_device is not None:
        groups = split_per_device(spec.n_experts, experts_per_device)
        if len(groups) != len(sites):
            raise ValueError(
                f"{spec.n_experts} experts by {experts_per_device} are for {len(groups)} devices, {len(sites)} are given"
            )
        return placement_of(groups, spec.n_blocks)
    if sum(room) < spec.n_blocks * spec.n_experts:
        return None
    # Rows of an expert that is asked in a question; on the flat part of a profile any number would do.
    rows = max(1, round(QUESTION_ROWS * spec.top_k / spec.n_experts))
    speeds = [1 / site.profile.call_ms(rows) for site in sites]
    return balanced(read_counts(None, spec.n_blocks, spec.n_experts), speeds, list(room))


def _planned(
    layout: ModelLayout,
    precision: Precision,
    name: str,
    link: LinkProfile,
    room: int,
    placement: Placement | None,
    number: int,
) -> PlannedDevice:
    held = 0 if placement is None else len(held_by(placement, number))
    return PlannedDevice(
        name, link.name, memory_bytes(name), room, held, device_memory(layout.spec, held, precision)
    )  # fmt: skip


def _advice(
    layout: ModelLayout,
    precision: Precision,
    hardware: Sequence[str],
    devices: Sequence[PlannedDevice],
    placement: Placement | None,
    station: BaseStation,
    size: StationSize,
) -> str | None:
    spec, said = layout.spec, []
    if not fits(station.memory_bytes, size.memory_bytes):
        said.append(f"the base station needs {size.memory_bytes / (1 - HEADROOM) / 1e9:.0f} GB (--bs)")
    n_experts = spec.n_blocks * spec.n_experts
    if placement is None or not all(device.fits for device in devices):
        room = sum(device.could_hold for device in devices)
        if room >= n_experts:
            said.append("leave --experts-per-device out, so that larger devices hold more")
        else:
            said.append(f"the devices hold {room} of {n_experts} experts in {precision}")
            for smaller in PRECISIONS[PRECISIONS.index(precision) + 1 :]:
                if sum(most_held(spec, smaller, memory_bytes(name)) for name in hardware) >= n_experts:
                    said.append(f"--precision {smaller} fits")
                    break
            else:
                said.append("more or larger devices are needed")
    return "; ".join(said) or None


def _links(devices: Sequence[PlannedDevice]) -> str:
    names = list(dict.fromkeys(device.link for device in devices))
    return f"{len(devices)} device{'' if len(devices) == 1 else 's'} over {', '.join(names)}"


def _weights(parts: Sequence[Part]) -> int:
    return sum(math.prod(part.shape) for part in parts)


def _yes(fits_: bool) -> str:
    return "yes" if fits_ else "NO"


def _pass_json(one: PassTime) -> dict[str, Any]:
    return asdict(one) | {
        "seconds": one.total_ms / 1000,
        "bottleneck": one.bottleneck,
        "busiest": one.busiest,
        "at_best_per_s": one.at_best_per_s,
    }
