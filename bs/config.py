"""What a base station is told at its start."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from wdmoe.runtime.keys import default_keys_dir
from wdmoe.runtime.links import is_loopback
from wdmoe.runtime.messages import Wire


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
    in_flight: int = 1  # microbatches; more raises throughput over slow links, and the latency of each question
    batch: int = 1  # questions in a microbatch; more raises throughput, and the latency of each question
    wait_s: float = 60.0
    bs_holds: str = "none"  # experts the base station may hold for when a device is lost: a number, all, none
    trace: Path | None = None  # where to write a timeline
    health: str | None = None  # HOST:PORT to serve /health on
    when_lost: Literal["fail", "skip"] = "fail"  # under policies other than exact

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not self.listen.startswith(("tcp://", "ipc://")):
            raise ValueError(f"--listen is {self.listen!r}, expected tcp://ADDRESS:PORT")
        if self.insecure and self.encrypt:
            raise ValueError("--insecure and --encrypt contradict each other")
        for name in ("threads", "in_flight", "batch"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}, expected at least 1")
        if not self.wait_s > 0:
            raise ValueError(f"--wait is {self.wait_s}, expected more than 0 seconds")
        if self.bs_holds not in ("all", "none") and not (self.bs_holds.isdecimal() and int(self.bs_holds) > 0):
            raise ValueError(f"--bs-holds is {self.bs_holds!r}, expected a number of experts, all, or none")

    @property
    def encrypted(self) -> bool:
        """Whether the link is encrypted: always, but on this machine alone or at the user's word."""
        return self.encrypt or not (self.insecure or is_loopback(self.listen))
