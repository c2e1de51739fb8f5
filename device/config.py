"""What a device process is told at its start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """Checked when built; the defaults fit those of wdmoe-export and wdmoe-bs."""

    bundle: Path = Path("bundle")
    bs: str = "tcp://127.0.0.1:5555"
    name: str | None = None  # None: the folder's device-K
    engine: str = "auto"
    threads: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not self.bs.startswith(("tcp://", "ipc://")):
            raise ValueError(f"--bs is {self.bs!r}, expected tcp://HOST:PORT")
        if self.threads < 1:
            raise ValueError(f"--threads is {self.threads}, expected at least 1")
        if self.name is not None and not 0 < len(self.name) <= 128:
            raise ValueError("--name needs 1 to 128 characters")
