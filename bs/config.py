"""What a base station is told at its start."""

from __future__ import annotations

import os
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from wdmoe.runtime.messages import Wire


@dataclass(frozen=True, slots=True)
class StationConfig:
    """Checked when built; the defaults fit those of wdmoe-export and wdmoe-device."""

    bundle: Path = Path("bundle/bs")
    listen: str = "tcp://127.0.0.1:5555"
    insecure: bool = False
    wire: Wire = "fp16"
    threads: int = os.cpu_count() or 1
    in_flight: int = 2
    wait_s: float = 60.0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant, and what would send hidden states over a network in the clear."""
        if not self.listen.startswith(("tcp://", "ipc://")):
            raise ValueError(f"--listen is {self.listen!r}, expected tcp://ADDRESS:PORT")
        if not (is_loopback(self.listen) or self.insecure):
            raise ValueError(
                f"--listen {self.listen} is reachable from the network and this version does not encrypt yet: "
                "token rows would travel in the clear and anybody could answer; add --insecure if that is acceptable"
            )
        if self.threads < 1 or self.in_flight < 1:
            raise ValueError(f"--threads and --in-flight are {self.threads} and {self.in_flight}, expected at least 1")
        if not self.wait_s > 0:
            raise ValueError(f"--wait is {self.wait_s}, expected more than 0 seconds")


def is_loopback(address: str) -> bool:
    """Say whether an address can only be reached from this machine."""
    if address.startswith("ipc://"):
        return True
    host = urlsplit(address).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
