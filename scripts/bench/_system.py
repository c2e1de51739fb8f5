"""Real devices for benchmarks that break them: processes that can be killed, frozen and started again, and questions."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
import tiny
from processes import command, stop

from scripts.bench._environment import progress
from wdmoe.bs.experiment import load_tokenizer
from wdmoe.bs.questions import Choice, Question
from wdmoe.bs.station import Station
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.export.models import SMALL_MODEL, find_checkpoint
from wdmoe.runtime.errors import WdmoeError

TINY = "tiny"
MODELS = (TINY, SMALL_MODEL)
N_DEVICES = 4
READY_S = 60.0


@contextmanager
def exported(model: str | None) -> Iterator[tuple[str, Path]]:
    """Export a model for four devices; None takes the small real one, or the tiny one where that cannot be had."""
    with tempfile.TemporaryDirectory(prefix="wdmoe-bench-") as scratch:
        name, checkpoint = model or SMALL_MODEL, Path(scratch) / "checkpoint"
        if name != TINY:
            try:
                checkpoint, _ = find_checkpoint(name, progress)
            except WdmoeError as error:
                if model is not None:
                    raise
                progress(f"{error}; taking a tiny random model")
                name = TINY
        if name == TINY:
            tiny.tiny_checkpoint(checkpoint, "qwen2_moe", max_position_embeddings=512)
        config = ExportConfig(Path(scratch) / "bundle", devices=N_DEVICES)
        export_bundle(plan_export(checkpoint, name, config), config)
        yield name, config.out


@dataclass(slots=True)
class DeviceProcess:
    """One `wdmoe-device`, started again whenever it has ended: as a service manager would."""

    name: str
    line: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    frozen: bool = False
    starts: int = 0

    def keep(self) -> None:
        """Start it if it does not run."""
        if self.process is None or self.process.poll() is not None:
            with self.log.open("ab") as out:
                self.process = subprocess.Popen(self.line, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
            self.starts += 1

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        """SIGSTOP."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        self.frozen = True

    def thaw(self) -> None:
        """SIGCONT."""
        assert self.process is not None
        if self.frozen:
            self.process.send_signal(signal.SIGCONT)
            self.frozen = False

    @property
    def pid(self) -> int:
        """Of the process that runs now."""
        assert self.process is not None
        return self.process.pid


@dataclass(slots=True)
class Devices:
    """All device processes of one system, by name."""

    by_name: dict[str, DeviceProcess] = field(default_factory=dict)

    def keep(self) -> None:
        """Start what has ended."""
        for device in self.by_name.values():
            device.keep()

    def thaw(self) -> None:
        """Let go on what is frozen."""
        for device in self.by_name.values():
            device.thaw()

    def said(self, text: str) -> int:
        """How often the devices said something."""
        return sum(device.log.read_text().count(text) for device in self.by_name.values())


@contextmanager
def running_devices(bundle: Path, address: str, replicas: bool = False) -> Iterator[Devices]:
    """Run the four devices of a bundle, and with `replicas` a second process for each folder; stop them at the end."""
    devices = Devices()
    with tempfile.TemporaryDirectory(prefix="wdmoe-devices-") as scratch:
        for number in range(N_DEVICES):
            for kind in ("device", "replica") if replicas else ("device",):
                name = f"{kind}-{number}"
                options = ["--bundle", bundle / f"device-{number}", "--bs", address, "--name", name]
                line = command("wdmoe-device", *options)
                devices.by_name[name] = DeviceProcess(name, line, Path(scratch) / f"{name}.log")
        try:
            devices.keep()
            yield devices
        finally:
            devices.thaw()
            stop([device.process for device in devices.by_name.values() if device.process is not None])


def wait_for_names(station: Station, names: Sequence[str]) -> None:
    """Turn the loop until devices of these names are connected and may be given work.

    Raises:
        TimeoutError: they are not there after a minute; says which.
    """
    deadline_s = time.monotonic() + READY_S
    fleet = station.pipeline.requests.fleet
    while missing := [name for name in names if name not in station.hub.devices or not fleet.usable(name)]:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{', '.join(missing)} did not come (back) in {READY_S:g} s")
        station.pipeline.idle(0.05)


def piqa_questions(station: Station, limit: int | None = None) -> list[Question]:
    """Return the bundled PIQA sample as lm-eval words it, in tokens."""
    from wdmoe.bs.rows import read_rows

    tokenizer = load_tokenizer(station)
    questions: list[Question] = []
    for number, row in enumerate(list(read_rows("piqa-sample", None))[:limit]):
        context = f"Question: {row['goal']}\nAnswer:"
        head = tuple(tokenizer.encode(context).ids)
        choices = [
            Choice(head, tuple(tokenizer.encode(f"{context} {row[key]}").ids[len(head) :])) for key in ("sol1", "sol2")
        ]
        questions.append(Question(f"piqa-sample/{number}", tuple(choices)))
    return questions


def rss_mib(pid: int) -> float:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(pid)
