"""What a device process is told at its start."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from wdmoe.profiles.link_profile import modelled_link
from wdmoe.profiles.modelled import ExpertShape, memory_bytes
from wdmoe.runtime.emulation import EmulationOptions
from wdmoe.runtime.keys import decode_token, default_keys_dir
from wdmoe.runtime.links import is_loopback
from wdmoe.runtime.messages import NAME_PATTERN

_TCP, _LAST_PORT = re.compile(r"tcp://\S+:([0-9]{1,5})"), 65535


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """Checked when built; the defaults fit those of wdmoe-export and wdmoe-bs."""

    bundle: Path = Path("bundle")
    bs: str = "tcp://127.0.0.1:5555"
    name: str | None = None  # None: the folder's device-K
    engine: str = "auto"
    threads: int = 1
    profile: Path | None = None  # that bench wrote; None: a short measurement at the start
    enrol: str | None = None  # a token, on the first start
    insecure: bool = False  # do not encrypt although the base station is on the network
    encrypt: bool = False  # encrypt although it is on this machine
    keys: Path = field(default_factory=default_keys_dir)
    emulate: str | None = None  # a modelled device to pretend to be; what follows is for it alone
    link: str | None = None  # a modelled link
    seed: int = 0  # of the jitter
    cost_shape: ExpertShape | None = None  # what time is charged for; None: the slice as it is
    cost_precision: str | None = None
    channel: Path | None = None  # a file: devices that are given the same one share the link's channel

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        tcp = _TCP.fullmatch(self.bs)
        if not (self.bs.startswith("ipc://") or (tcp is not None and 1 <= int(tcp[1]) <= _LAST_PORT)):
            raise ValueError(f"--bs is {self.bs!r}, expected tcp://HOST:PORT with a port from 1 to {_LAST_PORT}")
        if self.threads < 1:
            raise ValueError(f"--threads is {self.threads}, expected at least 1")
        if self.name is not None and not re.match(NAME_PATTERN, self.name):
            raise ValueError(f"--name is {self.name!r}, expected 1 to 64 letters, digits, dots, dashes, underscores")
        if self.insecure and (self.encrypt or self.enrol is not None):
            raise ValueError("--insecure contradicts --encrypt and --enrol")
        if self.enrol is not None:
            decode_token(self.enrol)
        if self.emulate is None:
            for name in ("link", "cost_shape", "cost_precision", "channel"):
                if getattr(self, name) is not None:
                    raise ValueError(f"--{name.replace('_', '-')} is for an emulated device; give --emulate as well")
        else:
            memory_bytes(self.emulate)  # both raise if there is no such thing
            if self.link is not None:
                modelled_link(self.link)
            elif self.channel is not None:
                raise ValueError("--channel is of an emulated link; give --link as well")

    @property
    def emulation(self) -> EmulationOptions | None:
        """What to pretend to be, if anything."""
        if self.emulate is None:
            return None
        return EmulationOptions(
            self.emulate, self.link, self.seed, self.cost_shape, self.cost_precision, self.channel is not None
        )

    @property
    def encrypted(self) -> bool:
        """Whether the link is encrypted: always, but on this machine alone or at the user's word."""
        return self.encrypt or self.enrol is not None or not (self.insecure or is_loopback(self.bs))
