"""What an installed wdmoe is made of, and that a device stays light."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {path.parent.name for path in ROOT.glob("*/__init__.py")}
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "lm_eval", "datasets", "tokenizers")
LAYERS = {  # folder -> folders of ours that it may import
    "profiles": set(),
    "runtime": {"profiles"},
    "bs": {"runtime", "profiles"},
    "device": {"runtime", "profiles"},
    "export": {"runtime", "profiles"},
}


def declared() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return project


def test_every_package_is_declared() -> None:
    found = [path.parent for name in FOLDERS for path in (ROOT / name).rglob("__init__.py")]
    packages = declared()["tool"]["setuptools"]["packages"]
    assert set(packages) == {".".join(("wdmoe", *path.relative_to(ROOT).parts)) for path in found}


def test_type_checkers_see_every_package() -> None:
    links = {path.name: path.resolve() for path in (ROOT / "typings/wdmoe").iterdir()}
    assert links == {name: (ROOT / name).resolve() for name in FOLDERS}


def test_no_module_is_loaded_under_two_names() -> None:
    assert not FOLDERS & set(sys.modules)


@pytest.mark.parametrize("folder", sorted(LAYERS))
def test_dependencies_point_one_way(folder: str) -> None:
    assert set(LAYERS) == FOLDERS
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            ours = {name.split(".")[1] for name in names if name.startswith("wdmoe.")}
            assert ours <= LAYERS[folder] | {folder}, f"{path} imports {ours}"


@pytest.mark.parametrize("module", ["wdmoe.bs.cli", "wdmoe.device.cli", "wdmoe.export.cli"])
def test_a_command_imports_nothing_heavy_before_it_is_told_what_to_do(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & sys.modules.keys()))".replace(
        repr(HEAVY), f"set({HEAVY!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""


def test_the_device_extra_asks_for_no_torch_and_no_engine() -> None:
    lines = importlib.metadata.requires("wdmoe") or []
    device = [line for line in lines if "extra ==" not in line or 'extra == "device"' in line]
    assert device and not [line for line in device if line.startswith(HEAVY)]


def python_3_10() -> str | None:
    """Find an interpreter that works; pyenv puts a `python3.10` on the path that may only print an error."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for candidate in (shutil.which("python3.10"), *sorted(pyenv.glob("versions/3.10*/bin/python3.10"))):
        if candidate and subprocess.run([candidate, "--version"], capture_output=True, check=False).returncode == 0:
            return str(candidate)
    return None


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_device_installs_on_python_3_10_without_torch_and_answers_help_at_once(bundle: Path, tmp_path: Path) -> None:
    python = python_3_10()
    if python is None:
        pytest.skip("no python3.10 on this machine")
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True, timeout=60)
    pip = [str(tmp_path / "venv/bin/python"), "-m", "pip", "--disable-pip-version-check"]
    # From a copy: building leaves files behind, and others may be building too.
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "*.egg-info", "build", "typings", "tests"))
    done = subprocess.run(
        [*pip, "install", "--quiet", f"{source}[device]"], capture_output=True, text=True, timeout=200, check=False
    )
    if "No matching distribution" in done.stderr or "Failed to establish" in done.stderr:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    freeze = subprocess.run([*pip, "list", "--format=freeze"], capture_output=True, text=True, check=True, timeout=60)
    installed = {line.partition("==")[0].lower() for line in freeze.stdout.split()}
    assert "wdmoe" in installed and not installed & set(HEAVY)
    command = [str(tmp_path / "venv/bin/wdmoe-device"), "--help"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)  # compiles
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.5
    # And it can do its work there: load a slice, check it, measure it.
    code = """
import sys
from pathlib import Path
from wdmoe.device.loading import choose_engine, quick_profile
from wdmoe.runtime.manifest import DeviceManifest, read_manifest, verify_files
folder = Path(sys.argv[1])
manifest = read_manifest(folder, DeviceManifest)
verify_files(folder, manifest)
engine = choose_engine(folder, manifest, ("onnxruntime", "numpy"), 1, print)
print(quick_profile(engine, manifest).engine)
"""
    command = [str(tmp_path / "venv/bin/python"), "-c", code, str(bundle / "device-0")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "passed over engine onnxruntime: No module named 'onnxruntime'" in done.stdout
    assert done.stdout.splitlines()[-1] == "numpy"
