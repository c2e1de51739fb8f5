"""scripts/check_aarch64: what it needs it asks for by name; and, where all of that is there, a device works on aarch64."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_checkpoint

from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export

SCRIPT = Path(__file__).parents[1] / "scripts" / "check_aarch64"
UNAVAILABLE = ("cannot be listed from", "cannot be fetched from", "not all wheels are there", "wdmoe cannot be built")


def run(
    *options: object, path: str | None = None, timeout_s: float = 30, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [shutil.which("bash") or "bash", str(SCRIPT), *map(str, options)],
        capture_output=True, text=True, timeout=timeout_s, check=False,
        env=os.environ | {"PYTHON": sys.executable} | environment | ({"PATH": path} if path is not None else {}),
    )  # fmt: skip


def path_with(folder: Path, *tools: str) -> str:
    """Make a folder of commands: the one that the script needs before it looks for tools, and empty ones."""
    folder.mkdir()
    (folder / "dirname").symlink_to(shutil.which("dirname") or "dirname")
    for tool in tools:
        (folder / tool).write_text("#!/bin/sh\n")
        (folder / tool).chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ((), "sudo apt-get install qemu-user-static"),
        (("qemu-aarch64-static",), "no apt-get on the path"),
        (("qemu-aarch64", "apt-get"), "no dpkg-deb on the path"),
    ],
)
def test_what_is_missing_is_named(tools: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = run(path=path_with(tmp_path / "bin", *tools))
    assert done.returncode == 1 and words in done.stderr


def test_missing_keys_and_a_folder_that_is_none_are_named(tmp_path: Path) -> None:
    path = path_with(tmp_path / "bin", "qemu-aarch64", "apt-get", "dpkg-deb")
    done = run(path=path, DEBIAN_KEYRING=str(tmp_path / "none.gpg"))
    assert done.returncode == 1 and "sudo apt-get install debian-archive-keyring" in done.stderr
    keys = tmp_path / "keys.gpg"
    keys.touch()
    done = run("--bundle", tmp_path, path=path, DEBIAN_KEYRING=str(keys))
    assert done.returncode == 1 and "no manifest.json" in done.stderr


def test_a_users_mistake_gets_exit_code_2() -> None:
    for options in (["--bundle"], ["--fast"]):
        done = run(*options)
        assert done.returncode == 2 and "--help" in done.stderr
    assert run("--help").stdout.startswith("Usage: scripts/check_aarch64")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_device_works_on_aarch64(tmp_path: Path) -> None:
    if not (shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")) or not shutil.which("apt-get"):
        pytest.skip("no qemu-aarch64, or no Debian")
    # int4: ONNX Runtime has a kernel of its own for it on ARM, which must not run.
    config = ExportConfig(tmp_path / "bundle", precision="int4")
    export_bundle(plan_export(tiny_checkpoint(tmp_path / "checkpoint", "mixtral"), "tiny", config), config)
    done = run("--bundle", config.out / "device-0", timeout_s=880, TMPDIR=str(tmp_path))
    if done.returncode and any(words in done.stderr for words in (*UNAVAILABLE, "is not there; install it")):
        pytest.skip(done.stderr[-300:])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "onnxruntime" in done.stdout and "wdmoe works on aarch64" in done.stderr
    assert not list(tmp_path.glob("wdmoe-aarch64-*"))
