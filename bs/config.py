"""What a base station is told at its start."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from wdmoe.profiles.base_station import modelled_station
from wdmoe.profiles.link_profile import LinkProfile, modelled_link
from wdmoe.profiles.modelled import ExpertShape, memory_bytes
from wdmoe.runtime.keys import default_keys_dir
from wdmoe.runtime.links import is_loopback
from wdmoe.runtime.messages import Wire

StagesOn = Literal["cpu", "cuda", "auto"]
InFlight = int | Literal["auto"]  # auto: as many as keep the busiest of stages, links and devices at work


@dataclass(frozen=True, slots=True)
class StationConfig:
    """Checked when built; the defaults fit those of wdmoe-export and wdmoe-device."""

    bundle: Path = Path("bundle/bs")
    listen: str = "tcp://127.0.0.1:5555"
    insecure: bool = False  # do not encrypt although the address can be reached from the network
    encrypt: bool = False  # encrypt although it cannot
    keys: Path = field(default_factory=default_keys_dir)
    wire: Wire = "fp16"
    threads: int = os.cpu_count() or 1
    stage_workers: int = (
        1  # stages at a time, each of another microbatch; more raises throughput with several in flight
    )
    stages_on: StagesOn = "cpu"
    in_flight: InFlight = 1  # microbatches; more raises throughput over slow links, and the latency of each question
    batch: int = 1  # questions in a microbatch; more raises throughput, and the latency of each question
    wait_s: float = 60.0
    bs_holds: str = "none"  # experts the base station may hold for when a device is lost: a number, all, none
    bs_experts: str = "none"  # experts that the base station runs itself, in all: a number, auto, none
    bs_counts: Path | None = None  # how often each is used; None: as the manifest says
    trace: Path | None = None  # where to write a timeline
    health: str | None = None  # HOST:PORT to serve /health on
    when_lost: Literal["fail", "skip"] = "fail"  # under policies other than exact
    split: Literal["auto", "none"] = "auto"  # requests into pieces, where a device then computes while others travel
    # Of devices that dial in, as VirtualConfig has it for modelled ones:
    links: tuple[str, ...] = ()  # what real links carry, one for all or one each by name; empty: as requests tell
    channel: Literal["shared", "orthogonal"] | None = None  # None: as emulated devices say, else orthogonal
    bandwidth: str | None = (
        None  # uniform, static, per-block, or numbers like 0.2,0.3,0.5 by name; None: nothing is divided
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not self.listen.startswith(("tcp://", "ipc://")):
            raise ValueError(f"--listen is {self.listen!r}, expected tcp://ADDRESS:PORT")
        if self.insecure and self.encrypt:
            raise ValueError("--insecure and --encrypt contradict each other")
        for name in ("threads", "stage_workers", "in_flight", "batch"):
            if (value := getattr(self, name)) != "auto" and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}, expected at least 1")
        if self.stage_workers > 1 and self.stages_on != "cpu":
            raise ValueError(f"--stage-workers is {self.stage_workers}, but stages on a GPU run one at a time")
        if not self.wait_s > 0:
            raise ValueError(f"--wait is {self.wait_s}, expected more than 0 seconds")
        if self.bs_holds not in ("all", "none") and not (self.bs_holds.isdecimal() and int(self.bs_holds) > 0):
            raise ValueError(f"--bs-holds is {self.bs_holds!r}, expected a number of experts, all, or none")
        if self.bs_experts not in ("auto", "none") and not (self.bs_experts.isdecimal() and int(self.bs_experts) > 0):
            raise ValueError(f"--bs-experts is {self.bs_experts!r}, expected a number of experts, auto, or none")
        for link in self.links:
            modelled_link(link)
        if self.channel == "shared" and self.bandwidth is not None:
            raise ValueError(
                "--bandwidth divides orthogonal shares, --channel shared is one for all; leave one of them out"
            )
        if self.in_flight == "auto" and self.bandwidth == "per-block":
            raise ValueError("--bandwidth per-block divides the band among the microbatches; give --in-flight a number")
        if (shares := self.fixed_shares) is not None and (min(shares) <= 0 or sum(shares) > 1 + 1e-9):
            raise ValueError(f"--bandwidth is {self.bandwidth}: shares must be positive and sum to at most 1")

    @property
    def fixed_shares(self) -> tuple[float, ...] | None:
        """The shares that --bandwidth lists; None: it lists none."""
        if self.bandwidth in (None, "uniform", "static", "per-block"):
            return None
        try:
            return tuple(float(part) for part in self.bandwidth.split(","))
        except ValueError as error:
            raise ValueError(
                f"--bandwidth is {self.bandwidth!r}, expected uniform, static, per-block, or numbers like 0.2,0.3,0.5"
            ) from error

    @property
    def encrypted(self) -> bool:
        """Whether the link is encrypted: always, but on this machine alone or at the user's word."""
        return self.encrypt or not (self.insecure or is_loopback(self.listen))


@dataclass(frozen=True, slots=True)
class VirtualConfig:
    """Which devices and links a run in virtual time has, and what its base station is declared to take."""

    devices: tuple[str, ...]  # of `hardware_names()`, one for each device folder of the bundle, in order
    links: tuple[str, ...]  # as `modelled_link` takes them: one for all, or one for each device
    channel: Literal["shared", "orthogonal"] = "shared"  # one half-duplex channel for all, or a share for each device
    bandwidth: str | None = None  # of orthogonal shares: uniform, static, per-block, or numbers like 0.2,0.3,0.5
    cost_shape: ExpertShape | None = None  # what is charged for; None: the experts of the bundle
    cost_precision: str | None = None
    stage_ms: float = 1.0  # a stage of the base station, its share of combining, routing and deciding included
    seed: int = 0  # of the links' jitter
    engine: str = "onnxruntime"  # that really runs the experts, in this process
    bs_machine: str = "laptop-8-core"  # of `station_names()`: what the base station's own experts are charged as

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for device in self.devices:
            memory_bytes(device)  # raises if there is no such device; so does the next for links
        for link in self.links:
            modelled_link(link)
        modelled_station(self.bs_machine)
        if len(self.links) not in (1, len(self.devices)):
            raise ValueError(f"{len(self.links)} links for {len(self.devices)} devices; give one for all, or one each")
        if self.channel == "shared" and self.bandwidth is not None:
            raise ValueError("--bandwidth divides orthogonal shares; give --channel orthogonal as well")
        if not self.stage_ms >= 0:
            raise ValueError(f"--stage-ms is {self.stage_ms}, expected at least 0")
        if (
            (shares := self.shares) is not None
            and self.bandwidth not in ("per-block", "static")
            and (min(shares) <= 0 or sum(shares) > 1 + 1e-9)
        ):
            raise ValueError(f"--bandwidth is {self.bandwidth}: shares must be positive and sum to at most 1")

    @property
    def shares(self) -> tuple[float, ...] | None:
        """The share of each device, 1 where it is yet to be divided; None on a shared channel."""
        if self.channel == "shared":
            return None
        if self.bandwidth in ("per-block", "static"):
            return (1.0,) * len(self.devices)
        if self.bandwidth in (None, "uniform"):
            return (1 / len(self.devices),) * len(self.devices)
        try:
            shares = tuple(float(part) for part in self.bandwidth.split(","))
        except ValueError:
            shares = ()
        if len(shares) != len(self.devices):
            raise ValueError(
                f"--bandwidth is {self.bandwidth!r}, expected uniform, static, per-block, or {len(self.devices)} numbers like "
                "0.2,0.3,0.5"
            )
        return shares

    @property
    def profiles(self) -> tuple[LinkProfile, ...]:
        """The link of each device."""
        links = tuple(modelled_link(link) for link in self.links)
        return links * len(self.devices) if len(links) == 1 else links
