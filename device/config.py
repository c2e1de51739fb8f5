"""What a device process is told at its start."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from wdmoe.runtime.keys import decode_token, default_keys_dir
from wdmoe.runtime.links import is_loopback
from wdmoe.runtime.messages import NAME_PATTERN


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """Checked when built; the defaults fit those of wdmoe-export and wdmoe-bs."""

    bundle: Path = Path("bundle")
    bs: str = "tcp://127.0.0.1:5555"
    name: str | None = None  # None: the folder's device-K
    engine: str = "auto"
    threads: int = 1
    enrol: str | None = None  # a token, on the first start
    insecure: bool = False  # do not encrypt although the base station is on the network
    encrypt: bool = False  # encrypt although it is on this machine
    keys: Path = field(default_factory=default_keys_dir)

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not self.bs.startswith(("tcp://", "ipc://")):
            raise ValueError(f"--bs is {self.bs!r}, expected tcp://HOST:PORT")
        if self.threads < 1:
            raise ValueError(f"--threads is {self.threads}, expected at least 1")
        if self.name is not None and not re.match(NAME_PATTERN, self.name):
            raise ValueError(f"--name is {self.name!r}, expected 1 to 64 letters, digits, dots, dashes, underscores")
        if self.insecure and (self.encrypt or self.enrol is not None):
            raise ValueError("--insecure contradicts --encrypt and --enrol")
        if self.enrol is not None:
            decode_token(self.enrol)

    @property
    def encrypted(self) -> bool:
        """Whether the link is encrypted: always, but on this machine alone or at the user's word."""
        return self.encrypt or self.enrol is not None or not (self.insecure or is_loopback(self.bs))
