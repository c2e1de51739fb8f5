"""A Jetson made of files."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from wdmoe.device.benching import loaded_bytes
from wdmoe.device.info import advice, describe_machine
from wdmoe.device.machine import Machine, hardware_name, throttling
from wdmoe.device.profile_tables import machine_table
from wdmoe.runtime.cuda_driver import CudaDevice
from wdmoe.runtime.errors import EngineError

ORIN = {
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "proc/cpuinfo": "".join(f"processor\t: {n}\nBogoMIPS\t: 62.50\n\n" for n in range(12)),
    "proc/meminfo": "MemTotal:       64349012 kB\nMemFree:        1000 kB\nMemAvailable:   60000000 kB\n",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.7, GCID: 42132812, BOARD: generic, EABI: aarch64\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=2 NAME=MODE_30W >\n",
    "var/lib/nvpmodel/status": "pmode:0002 fmode:fanNull\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "729600\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_min_freq": "115200\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": "2201600\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "2201600\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_min_freq": "115200\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_max_freq": "2201600\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "612000000\n",
    "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "1300500000\n",
    "sys/class/devfreq/15340000.vic/cur_freq": "115200000\n",
    "sys/kernel/debug/bpmp/debug/clk/emc/rate": "3199000000\n",
    "sys/class/hwmon/hwmon1/oc1_event_cnt": "2\n",
    "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
    "sys/class/thermal/cooling_device0/cur_state": "3\n",
    "sys/class/thermal/cooling_device1/type": "cpufreq-cpu0\n",
    "sys/class/thermal/cooling_device1/cur_state": "0\n",
}


def machine(root: Path, **changes: str) -> Machine:
    """Write a Jetson; `changes` go by the end of a path, with __ for /."""
    for path, text in ORIN.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        changed = [new for key, new in changes.items() if path.endswith(key.replace("__", "/"))]
        (root / path).write_text(changed[0] if changed else text)
    return Machine(root)


def test_a_jetson_is_read_from_its_files(tmp_path: Path) -> None:
    orin = machine(tmp_path)
    assert hardware_name(orin) == "NVIDIA Jetson AGX Orin Developer Kit"
    assert (orin.cpus, orin.memory_bytes, orin.available_bytes) == (12, 64349012 * 1024, 60_000_000 * 1024)
    assert (orin.l4t, orin.jetpack) == ("36.4.7", "6")
    state = orin.state()
    assert state.power_mode == "MODE_30W" and state.jetson_clocks is False
    assert state.clocks_mhz == {"cpu": 2201.6, "gpu": 612.0, "emc": 3199.0}
    assert state.events == {"over-current oc1": 2} and state.cooling == {}


def test_clocks_are_held_when_lowest_equals_highest_everywhere(tmp_path: Path) -> None:
    held = machine(tmp_path, scaling_min_freq="2201600", gpu__min_freq="1300500000")
    assert held.state().jetson_clocks is True
    assert machine(tmp_path, scaling_min_freq="2201600").state().jetson_clocks is False


def test_throttling_is_noticed_by_events_that_happened_and_coolers_that_hold_a_clock(tmp_path: Path) -> None:
    before = machine(tmp_path).state()
    assert throttling(before, before) == ()
    after = machine(tmp_path, oc1_event_cnt="5", cooling_device1__cur_state="2").state()
    assert throttling(before, after) == ("over-current oc1: 3 events", "cpufreq-cpu0 holds clocks down (state 2)")


def test_a_machine_that_says_nothing_is_not_guessed_at(tmp_path: Path) -> None:
    mute = Machine(tmp_path)
    state = mute.state()
    assert (mute.board, mute.processor, mute.cpus, mute.memory_bytes, mute.l4t, mute.jetpack) == (None,) * 6
    assert (state.power_mode, state.jetson_clocks, state.clocks_mhz) == (None, None, {})
    assert hardware_name(mute).endswith("? CPUs")


def test_a_power_mode_without_a_name_keeps_its_number(tmp_path: Path) -> None:
    assert machine(tmp_path, status="pmode:0007").state().power_mode == "mode 7"


def load_numpy_alone(name: str) -> Any:
    if name == "numpy":
        return SimpleNamespace(__version__="2.0")
    if name == "tensorrt":
        raise OSError("libnvinfer.so.10: cannot open shared object file")
    raise ImportError(f"No module named {name!r}")


def no_gpu() -> CudaDevice:
    raise EngineError("no CUDA driver")


@pytest.mark.parametrize(
    ("release", "jetpack", "words"),
    [
        ("R36 (release), REVISION: 4.7", "6", "1.23 is the last"),
        ("R39 (release), REVISION: 2.0", "7", "TensorRT 10.16"),
    ],
)
def test_what_is_missing_comes_with_how_to_install_it_on_this_jetpack(
    tmp_path: Path, release: str, jetpack: str, words: str
) -> None:
    jetson = machine(tmp_path, nv_tegra_release=f"# {release}, GCID: 1")
    found, libraries = describe_machine(jetson, load_numpy_alone, tmp_path, no_gpu)
    assert found["jetpack"] == jetpack and found["power_mode"] == "MODE_30W"
    assert [library.version for library in libraries] == ["2.0", None, None]
    assert "libnvinfer" in libraries[2].problem
    told = [line for library in libraries for line in library.install]
    assert len(told) == 2 and all(f"JetPack {jetpack}" in line for line in told) and words in " ".join(told)
    lines = advice(found)
    assert "power mode MODE_30W" in lines[0] and "sudo jetson_clocks" in lines[1]


def test_a_jetpack_that_is_too_old_and_a_venv_kept_apart_come_with_advice(tmp_path: Path) -> None:
    old = machine(tmp_path, nv_tegra_release="# R35 (release), REVISION: 4.1, GCID: 1", status="")
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    found, libraries = describe_machine(old, load_numpy_alone, tmp_path, no_gpu)
    assert found["jetpack"] == "5" and not found["system_packages"]
    lines = advice(found)
    assert "L4T 35.4.1 is not of JetPack 6 or 7" in lines[0]
    assert "--system-site-packages" in lines[1] and "power mode unknown" in lines[2]
    assert {"JetPack 6", "JetPack 7"} <= {line[:9] for line in libraries[2].install}
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = true\n")
    assert describe_machine(old, load_numpy_alone, tmp_path, no_gpu)[0]["system_packages"]


def test_off_a_jetson_both_jetpacks_are_told_and_no_advice_is_given(tmp_path: Path) -> None:
    found, libraries = describe_machine(Machine(tmp_path), load_numpy_alone, find_gpu=no_gpu)
    assert {"JetPack 6", "JetPack 7"} <= {line[:9] for line in libraries[2].install} and advice(found) == []


@pytest.mark.parametrize("providers", [["CPUExecutionProvider"], ["CUDAExecutionProvider", "CPUExecutionProvider"]])
def test_off_a_jetson_a_gpu_is_named_with_whether_onnxruntime_can_use_it(tmp_path: Path, providers: list[str]) -> None:
    def load(name: str) -> Any:
        if name == "onnxruntime":
            return SimpleNamespace(__version__="1.27.0", get_available_providers=lambda: providers)
        return load_numpy_alone(name)

    gpu = CudaDevice("NVIDIA H200", "9.0", 132, 150 * 10**9, False, "12.8")
    found, libraries = describe_machine(Machine(tmp_path), load, tmp_path, lambda: gpu)
    assert found["gpu"]["name"] == "NVIDIA H200" and found["onnxruntime_cuda"] == (len(providers) == 2)
    assert [line for line in advice(found) if "wdmoe[cuda]" in line] == advice(found)
    assert len(advice(found)) == 2 - len(providers)
    out = io.StringIO()
    Console(width=80, file=out).print(machine_table(found, libraries))
    assert "NVIDIA H200, compute capability 9.0" in out.getvalue()


def test_weights_that_only_the_gpu_of_a_tegra_holds_are_seen_in_the_available_memory(tmp_path: Path) -> None:
    grown = loaded_bytes(machine(tmp_path))
    meminfo = "MemTotal: 64349012 kB\nMemAvailable:   10000000 kB\n"
    machine(tmp_path, meminfo=meminfo)
    assert grown() == 50_000_000 * 1024
    elsewhere = tmp_path / "no-tegra"
    (elsewhere / "proc").mkdir(parents=True)
    (elsewhere / "proc/meminfo").write_text("MemAvailable:   60000000 kB\n")
    grown = loaded_bytes(Machine(elsewhere))
    (elsewhere / "proc/meminfo").write_text(meminfo)
    assert 0 <= (grown() or 0) < 10**9
