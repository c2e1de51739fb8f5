"""A whole system as a user runs it: the installed commands as processes of their own, over loopback."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_STOP_WAIT_S = 10.0


def free_address() -> str:
    """Return a loopback address that nobody listens on; devices may dial it before the base station is there."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{sock.getsockname()[1]}"


def command(name: str, *options: object) -> list[str]:
    """Return the command line of an installed command of wdmoe, of the Python that is running."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise FileNotFoundError(f"{path}: not there; install wdmoe into the environment of {sys.executable}")
    return [str(path), *map(str, options)]


@contextmanager
def device_processes(
    bundle: Path, address: str, options: Sequence[object] = (), count: int = 4, kind: str = "device"
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run one `wdmoe-device` for each device folder of a bundle; stop them at the end, whatever happened.

    Args:
        bundle: made by wdmoe-export.
        address: of the base station.
        options: more options of wdmoe-device.
        count: how many folders the bundle must have.
        kind: the device that serves folder K is called KIND-K: another word gives replicas.

    Raises:
        RuntimeError: a device had ended by itself with another exit code than 0; says what it wrote last.
    """
    folders = sorted(bundle.glob("device-*"))
    if len(folders) != count:
        raise ValueError(f"{bundle} holds {len(folders)} device folders, expected {count}")
    with tempfile.TemporaryDirectory(prefix="wdmoe-devices-") as scratch:
        logs = [Path(scratch) / f"{folder.name}.log" for folder in folders]
        running: list[subprocess.Popen[bytes]] = []
        try:
            for folder, log in zip(folders, logs, strict=True):
                name = folder.name.replace("device", kind)
                line = command("wdmoe-device", "--bundle", folder, "--bs", address, "--name", name, *options)
                with log.open("wb") as out:
                    running.append(subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=out, stderr=out))
            yield running
        finally:
            failed = [
                f"{folder.name} ended with exit code {process.returncode}: {log.read_text()[-500:].strip()}"
                for folder, log, process in zip(folders, logs, running, strict=False)
                if process.poll() not in (None, 0, -signal.SIGKILL)  # a test may have killed it
            ]
            stop(running)
            if failed:  # also in place of what the base station made of it
                raise RuntimeError("; ".join(failed))


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask processes to stop, wait for them, and kill what is left."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _STOP_WAIT_S
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def exit_on_sigterm() -> None:
    """Let SIGTERM unwind a script as Ctrl-C does, so that it stops what it started."""

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, leave)
