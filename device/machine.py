"""What this machine is and how its clocks stand, read from files: on a Jetson the device tree, sysfs and nvpmodel's own.

Everything lies under one root, so that a test can be a Jetson. What a machine does not say is None, never a guess.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, field
from pathlib import Path

_JETPACK = {"35": "5", "36": "6", "38": "7", "39": "7"}  # by the major number of L4T
_GPU = re.compile(r"gpu|ga10b|gv11b")
_HOLDS_CLOCKS = re.compile(r"throttle|cpufreq|devfreq|hot-surface|^Processor$")  # cooling devices; fans do not
_EMC = ("sys/kernel/debug/bpmp/debug/clk/emc/rate", "sys/kernel/debug/clk/emc/clk_rate")  # only root may read either


@dataclass(frozen=True, slots=True)
class MachineState:
    """What may change from one moment to the next."""

    power_mode: str | None  # of nvpmodel
    jetson_clocks: bool | None  # whether clocks are held: lowest equals highest; None off a Jetson
    clocks_mhz: dict[str, float]  # cpu (the fastest core), gpu, emc
    events: dict[str, int] = field(default_factory=dict)  # counters that only grow when something is throttled
    cooling: dict[str, int] = field(default_factory=dict)  # cooling devices that hold a clock down now, and how far


def throttling(before: MachineState, after: MachineState) -> tuple[str, ...]:
    """Say what held clocks down between two moments."""
    grown = {name: count - before.events.get(name, 0) for name, count in after.events.items()}
    return (
        *(f"{name}: {count} events" for name, count in sorted(grown.items()) if count > 0),
        *(f"{name} holds clocks down (state {state})" for name, state in sorted(after.cooling.items())),
    )


@dataclass(frozen=True, slots=True)
class Machine:
    """Reads one machine."""

    root: Path = Path("/")

    @property
    def board(self) -> str | None:
        """Name of the board in its device tree, for example "NVIDIA Jetson AGX Orin Developer Kit"."""
        return self._text("proc/device-tree/model") or None

    @property
    def processor(self) -> str | None:
        """Name of the CPU, where /proc/cpuinfo has one."""
        found = re.search(r"^model name\s*:\s*(.+)$", self._text("proc/cpuinfo"), re.MULTILINE)
        return found[1].strip() if found else None

    @property
    def cpus(self) -> int | None:
        """How many are online."""
        return len(re.findall(r"^processor\s*:", self._text("proc/cpuinfo"), re.MULTILINE)) or None

    @property
    def memory_bytes(self) -> int | None:
        """All of it; on a Jetson GPU and CPU share it."""
        return self._meminfo("MemTotal")

    @property
    def available_bytes(self) -> int | None:
        """Return what can be allocated without swapping."""
        return self._meminfo("MemAvailable")

    @property
    def l4t(self) -> str | None:
        """Version of Linux for Tegra, for example "36.4.7"."""
        found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", self._text("etc/nv_tegra_release"))
        return f"{found[1]}.{found[2]}" if found else None

    @property
    def jetpack(self) -> str | None:
        """Major version of JetPack, which follows from that of L4T."""
        l4t = self.l4t
        return _JETPACK.get(l4t.partition(".")[0]) if l4t is not None else None

    def state(self) -> MachineState:
        """Read what may change."""
        return MachineState(self._power_mode(), self._clocks_held(), self._clocks(), self._events(), self._cooling())

    def _power_mode(self) -> str | None:
        number = re.search(r"pmode:0*(\d+)", self._text("var/lib/nvpmodel/status"))
        if number is None:
            return None
        modes = re.finditer(r"POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)", self._text("etc/nvpmodel.conf"))
        names: dict[str, str] = {mode[1]: mode[2] for mode in modes}
        return names.get(number[1], f"mode {number[1]}")

    def _clocks_held(self) -> bool | None:
        gpus = self._gpus()
        if not gpus:
            return None
        ranges = [(self._number(gpu / "min_freq"), self._number(gpu / "max_freq")) for gpu in gpus]
        ranges += [
            (self._number(cpu / "scaling_min_freq"), self._number(cpu / "scaling_max_freq")) for cpu in self._cpufreq()
        ]
        return all(low is not None and low == high for low, high in ranges)

    def _clocks(self) -> dict[str, float]:
        khz = [value for cpu in self._cpufreq() if (value := self._number(cpu / "scaling_cur_freq")) is not None]
        clocks = {"cpu": max(khz) / 1e3} if khz else {}
        for gpu in self._gpus():
            if (hz := self._number(gpu / "cur_freq")) is not None:
                clocks["gpu"] = hz / 1e6
        for path in _EMC:
            if (hz := self._number(self.root / path)) is not None:
                clocks["emc"] = hz / 1e6
                break
        return clocks

    def _events(self) -> dict[str, int]:
        events: dict[str, int] = {}
        for path in self._glob("sys/class/hwmon/hwmon*/oc*_event_cnt"):
            events[f"over-current {path.name.partition('_')[0]}"] = self._number(path) or 0
        for path in self._glob("sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count"):
            events[f"thermal {path.parent.parent.name}"] = self._number(path) or 0
        return events

    def _cooling(self) -> dict[str, int]:
        states = {
            self._read(path / "type"): self._number(path / "cur_state") or 0
            for path in self._glob("sys/class/thermal/cooling_device*")
        }
        return {name: state for name, state in states.items() if state > 0 and _HOLDS_CLOCKS.search(name)}

    def _cpufreq(self) -> list[Path]:
        return self._glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq")

    def _gpus(self) -> list[Path]:
        return [path for path in self._glob("sys/class/devfreq/*") if _GPU.search(path.name)]

    def _meminfo(self, key: str) -> int | None:
        found = re.search(rf"^{key}:\s*(\d+) kB$", self._text("proc/meminfo"), re.MULTILINE)
        return int(found[1]) * 1024 if found else None

    def _glob(self, pattern: str) -> list[Path]:
        return sorted(self.root.glob(pattern))

    def _text(self, path: str) -> str:
        return self._read(self.root / path)

    def _number(self, path: Path) -> int | None:
        text = self._read(path)
        return int(text) if text.lstrip("-").isdecimal() else None

    @staticmethod
    def _read(path: Path) -> str:
        try:
            return path.read_text(errors="replace").rstrip("\0").strip()
        except OSError:  # not there, or only root may read it
            return ""


def hardware_name(machine: Machine | None = None) -> str:
    """Name a machine: the module of a Jetson, else the processor."""
    machine = machine or Machine()
    processor = machine.processor or platform.processor() or platform.machine()
    return machine.board or f"{processor}, {machine.cpus or '?'} CPUs"
