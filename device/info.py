"""What `wdmoe-device info` says: what this machine is, what can run experts on it, and what is missing."""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wdmoe.device.machine import Machine, hardware_name
from wdmoe.runtime.cuda_driver import CudaDevice, find_device
from wdmoe.runtime.engines import ENGINES
from wdmoe.runtime.errors import EngineError

_JETPACK_6 = "JetPack 6 (Ubuntu 22.04, Python 3.10)"
_JETPACK_7 = "JetPack 7 (Ubuntu 24.04, Python 3.12)"
# library -> (what it is for, how to install it by JetPack's major version; "" is any other machine)
_LIBRARIES: dict[str, tuple[str, dict[str, str]]] = {
    "onnxruntime": (
        "engine onnxruntime, on the CPU; of onnxruntime-gpu also engine onnxruntime-cuda, on a GPU other than a Jetson's",
        {
            "6": f"{_JETPACK_6}: pip install 'wdmoe[cpu]' (1.23 is the last for Python 3.10)",
            "7": f"{_JETPACK_7}: pip install 'wdmoe[cpu]' (not onnxruntime-gpu: its aarch64 wheel has no code for Orin)",
            "": "pip install 'wdmoe[cpu]'",
        },
    ),
    "tensorrt": (
        "engine tensorrt, on the GPU of a Jetson",
        {
            "6": f"{_JETPACK_6}: sudo apt install python3-libnvinfer (TensorRT 10.3), "
            "and make the venv with --system-site-packages",
            "7": f"{_JETPACK_7}: sudo apt install python3-libnvinfer (TensorRT 10.16; 11.4 from 7.2.2), "
            "and make the venv with --system-site-packages",
            "": "comes with JetPack on a Jetson, and is not needed elsewhere",
        },
    ),
}


@dataclass(frozen=True, slots=True)
class Library:
    """Something that runs experts, there or not."""

    name: str
    purpose: str
    version: str | None  # None: it cannot be imported
    problem: str  # why not
    install: tuple[str, ...]  # on this machine; where it is no Jetson, on all


def describe_machine(
    machine: Machine,
    load: Callable[[str], Any] = importlib.import_module,
    prefix: Path = Path(sys.prefix),
    find_gpu: Callable[[], CudaDevice] = find_device,
) -> tuple[dict[str, Any], list[Library]]:
    """Look at a machine.

    Args:
        machine: which.
        load: imports a library by name.
        prefix: of the Python environment.
        find_gpu: asks the CUDA driver.

    Returns:
        What was found, as plain JSON values; and the libraries that engines need.
    """
    state = machine.state()
    found = {
        "hardware": hardware_name(machine),
        "board": machine.board,
        "processor": machine.processor,
        "cpus": machine.cpus,
        "gpu": _gpu(find_gpu),
        "onnxruntime_cuda": _has_cuda(load),
        "memory_bytes": machine.memory_bytes,
        "available_bytes": machine.available_bytes,
        "l4t": machine.l4t,
        "jetpack": machine.jetpack,
        "python": platform.python_version(),
        "system_packages": _sees_system_packages(prefix / "pyvenv.cfg"),
        "power_mode": state.power_mode,
        "jetson_clocks": state.jetson_clocks,
        "clocks_mhz": state.clocks_mhz,
        "throttled": [f"{name} holds clocks down (state {step})" for name, step in state.cooling.items()],
        "engines": list(ENGINES),
    }
    libraries = [_library("numpy", "engine numpy, the reference: slow, always there", {}, machine, load)]
    libraries += [_library(name, *what, machine, load) for name, what in _LIBRARIES.items()]
    return found, libraries


def advice(found: dict[str, Any]) -> list[str]:
    """Say what would make a machine work, go faster, or give steadier timings."""
    if found["l4t"] is None:
        if found["gpu"] is not None and not found["onnxruntime_cuda"]:
            return [
                "the GPU is not used: ONNX Runtime here has no CUDA provider; pip uninstall onnxruntime, then pip install 'wdmoe[cuda]'"
            ]
        return []
    lines: list[str] = []
    if found["jetpack"] not in ("6", "7"):
        lines.append(
            f"L4T {found['l4t']} is not of JetPack 6 or 7, the ones that wdmoe is made for: install one of them"
        )
    if not found["system_packages"]:
        lines.append(
            "this Python environment does not see what apt installs, TensorRT for one: make it anew with "
            "`python3 -m venv --system-site-packages`"
        )
    if found["power_mode"] is None:
        lines.append(
            "power mode unknown: `sudo nvpmodel -q` asks for it, /etc/nvpmodel.conf lists all, `-m N` chooses one"
        )
    elif not found["power_mode"].startswith("MAXN"):
        lines.append(
            f"power mode {found['power_mode']}: /etc/nvpmodel.conf lists the others, `sudo nvpmodel -m N` chooses"
        )
    if found["jetson_clocks"] is False:
        lines.append("clocks follow the load: `sudo jetson_clocks` holds them at their top")
    return lines


def _gpu(find_gpu: Callable[[], CudaDevice]) -> dict[str, Any] | None:
    try:
        return asdict(find_gpu())
    except EngineError:  # no driver, or no GPU
        return None


def _has_cuda(load: Callable[[str], Any]) -> bool | None:
    """Say whether ONNX Runtime has a CUDA provider; None: it cannot be imported."""
    try:
        return "CUDAExecutionProvider" in load("onnxruntime").get_available_providers()
    except (ImportError, AttributeError, OSError):
        return None


def _sees_system_packages(config: Path) -> bool:
    """Say whether this Python sees packages of the system: every one does but that of a venv which is kept apart."""
    try:
        lines = config.read_text().splitlines()
    except OSError:  # no venv
        return True
    settings = dict(line.replace(" ", "").lower().partition("=")[::2] for line in lines)
    return settings.get("include-system-site-packages") != "false"


def _library(name: str, purpose: str, install: dict[str, str], machine: Machine, load: Callable[[str], Any]) -> Library:
    version, problem = None, ""
    try:
        version = str(load(name).__version__)
    except (ImportError, AttributeError, OSError) as error:  # OSError: a shared library of it is missing
        problem = f"{type(error).__name__}: {error}"
    if machine.jetpack in ("6", "7"):
        lines = tuple(text for key, text in install.items() if key == machine.jetpack)
    else:
        lines = tuple(install.values())
    return Library(name, purpose, version, problem, lines if version is None else ())
