"""A base station and its devices in network namespaces of this machine, joined by links of limited rate.

    wdmoe-testbed-bs    link0 10.77.0.1 ---- 10.77.0.2 uplink    wdmoe-testbed-device-0
                        link1 10.77.1.1 ---- 10.77.1.2 uplink    wdmoe-testbed-device-1    ...

Each end sends through an htb class of the rate of its direction, frame by frame: with segmentation left to the receiver a
whole message would pass as one packet before any of its time was waited for. Both ends of a link lie in namespaces, so that removing
those removes all: nothing of the machine's own network is touched. What is done to build it is a list of plain commands.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

PREFIX = "wdmoe-testbed-"
STATION = f"{PREFIX}bs"
PROBE = f"{PREFIX}probe"
FRAME_BYTES, PAYLOAD_BYTES = 1514, 1448  # of a full Ethernet frame, and of TCP in it: a rate is one of payload
BURST_BYTES = 2 * FRAME_BYTES  # that may pass at once: 0.9 ms at 28 Mbit/s
TRANSFER = Path(__file__).with_name("_transfer.py")
COMMAND_WAIT_S = 20.0
STOP_WAIT_S = 10.0


class NotPermitted(Exception):
    """This machine, or this user, cannot have a testbed; the text says what to do."""


@dataclass(frozen=True, slots=True)
class LimitedLink:
    """One device's way to the base station and back."""

    device: int
    down_mbps: float  # to the device, 10^6 bit/s of payload
    up_mbps: float

    @property
    def namespace(self) -> str:
        """Of the device."""
        return f"{PREFIX}device-{self.device}"

    @property
    def station_ip(self) -> str:
        """Address of the base station on this link."""
        return f"10.77.{self.device}.1"

    @property
    def device_ip(self) -> str:
        """Address of the device."""
        return f"10.77.{self.device}.2"


@dataclass(frozen=True, slots=True)
class Rate:
    """What a transfer over a link gave, beside what was asked for."""

    nominal_mbps: float
    measured_mbps: float  # of payload

    @property
    def error(self) -> float:
        """Relative."""
        return self.measured_mbps / self.nominal_mbps - 1


def build_commands(links: Sequence[LimitedLink]) -> list[list[str]]:
    """Return what builds namespaces and links, in order."""
    lines = [f"ip netns add {STATION}", f"ip -n {STATION} link set lo up"]
    for link in links:
        here, there = f"link{link.device}", "uplink"
        lines += [
            f"ip netns add {link.namespace}",
            f"ip -n {link.namespace} link set lo up",
            f"ip -n {STATION} link add {here} type veth peer name {there} netns {link.namespace}",
        ]
        ends = (
            (STATION, here, link.station_ip, link.down_mbps),
            (link.namespace, there, link.device_ip, link.up_mbps),
        )
        for namespace, name, address, mbps in ends:
            rate = f"{round(mbps * 1e6 * FRAME_BYTES / PAYLOAD_BYTES)}bit"
            shape = f"rate {rate} ceil {rate} burst {BURST_BYTES} cburst {BURST_BYTES} quantum {FRAME_BYTES}"
            lines += [
                f"ip -n {namespace} address add {address}/30 dev {name}",
                f"ip -n {namespace} link set dev {name} gso_max_segs 1",
                f"ip -n {namespace} link set dev {name} gso_max_size {FRAME_BYTES}",
                f"ip -n {namespace} link set dev {name} up",
                f"tc -n {namespace} qdisc add dev {name} root handle 1: htb default 1",
                f"tc -n {namespace} class add dev {name} parent 1: classid 1:1 htb {shape}",
            ]
    return [line.split() for line in lines]


def inside(namespace: str, line: Sequence[str]) -> list[str]:
    """Return the command that runs another one in a namespace; it keeps its process id."""
    return ["ip", "netns", "exec", namespace, *line]


def check_permitted() -> None:
    """Try on a small scale what `built` will do.

    Raises:
        NotPermitted: it fails; says why.
    """
    if os.geteuid() != 0:
        raise NotPermitted("network namespaces need root; run it with sudo")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise NotPermitted(f"`{tool}` is not there; install iproute2 (apt-get install iproute2)")
    try:
        for line in (
            f"ip netns add {PROBE}",
            f"ip -n {PROBE} link add probe0 type veth peer name probe1",
            f"ip -n {PROBE} link set dev probe0 gso_max_segs 1",
            f"tc -n {PROBE} qdisc add dev probe0 root handle 1: htb default 1",
            f"tc -n {PROBE} class add dev probe0 parent 1: classid 1:1 htb rate 10mbit quantum 1514",
        ):
            do(line.split())
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        raise NotPermitted(f"this kernel or container does not let us: {error}") from error
    finally:
        remove([PROBE])


def do(line: Sequence[str]) -> str:
    """Run a command; return what it prints.

    Raises:
        RuntimeError: it failed; with the command and what it said.
    """
    done = subprocess.run(line, capture_output=True, text=True, timeout=COMMAND_WAIT_S, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"`{' '.join(line)}`: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def ours() -> list[str]:
    """Return the namespaces of a testbed that are there."""
    return [name for line in do(["ip", "netns", "list"]).splitlines() if (name := line.split()[0]).startswith(PREFIX)]


def processes_in(namespace: str) -> list[int]:
    """Return the processes that run in a namespace; none where it is gone."""
    try:
        return [int(pid) for pid in do(["ip", "netns", "pids", namespace]).split()]
    except RuntimeError:
        return []


def remove(namespaces: Sequence[str]) -> list[str]:
    """End what runs in namespaces and remove them, those that are there; may be repeated.

    Returns:
        Those that were removed.

    Raises:
        RuntimeError: one cannot be removed; the others are.
    """
    failures: list[str] = []
    removed: list[str] = []
    there = set(ours())
    for namespace in namespaces:
        if namespace not in there:
            continue
        _end(namespace)
        try:
            do(["ip", "netns", "delete", namespace])
            removed.append(namespace)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            failures.append(str(error))
    if failures:
        raise RuntimeError("; ".join(failures))
    return removed


def _end(namespace: str) -> None:
    deadline_s = time.monotonic() + STOP_WAIT_S
    number = signal.SIGTERM
    while (pids := processes_in(namespace)) and time.monotonic() < deadline_s + STOP_WAIT_S:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(0.1)
        if time.monotonic() > deadline_s:
            number = signal.SIGKILL


@contextmanager
def built(links: Sequence[LimitedLink]) -> Iterator[None]:
    """Build the testbed, and remove it at the end, whatever happens.

    What an earlier one left behind, killed before it could clean up, is removed first.

    Raises:
        NotPermitted: it cannot be built here, or another one runs.
    """
    check_permitted()
    for namespace in ours():
        if pids := processes_in(namespace):
            raise NotPermitted(
                f"a testbed runs already (process {pids[0]} in {namespace}); end it, or remove it with "
                "scripts/testbed --clean"
            )
    remove(ours())
    try:
        for line in build_commands(links):
            do(line)
        yield
    finally:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second Ctrl-C must not leave half of it
        try:
            remove([STATION, *(link.namespace for link in links)])
        finally:
            signal.signal(signal.SIGINT, before)


def measured_rates(link: LimitedLink, seconds: float) -> tuple[Rate, Rate]:
    """Send bytes down a link and then up, for about so long at its nominal rate; return what arrived per second."""
    down = _transfer(STATION, link.namespace, link.device_ip, link.down_mbps, seconds)
    up = _transfer(link.namespace, STATION, link.station_ip, link.up_mbps, seconds)
    return Rate(link.down_mbps, down), Rate(link.up_mbps, up)


def _transfer(sender: str, receiver: str, address: str, mbps: float, seconds: float) -> float:
    size = str(max(100_000, round(mbps * 1e6 / 8 * seconds)))
    wait_s = 10.0 + 5 * seconds
    take = inside(receiver, [sys.executable, str(TRANSFER), "receive", address, size, str(wait_s)])
    give = inside(sender, [sys.executable, str(TRANSFER), "send", address, size, str(wait_s)])
    with subprocess.Popen(take, stdout=subprocess.PIPE, text=True) as receiving:
        try:
            subprocess.run(give, check=True, timeout=wait_s + COMMAND_WAIT_S)
            answer, _ = receiving.communicate(timeout=wait_s)
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"a transfer from {sender} to {address} did not end: {error}") from error
        finally:
            if receiving.poll() is None:
                receiving.kill()
    found = msgspec.json.decode(answer, type=dict[str, float])
    return found["bytes"] * 8e-6 / found["seconds"]
