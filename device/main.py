"""From a config to a serving device; or to one process for each device of a whole bundle."""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType

from wdmoe.device.config import DeviceConfig
from wdmoe.device.enrolment import enrol, enrolled_keys, keys_to_enrol
from wdmoe.device.loading import choose_engine, engine_names, kept_profile, quick_profile, say_to_stderr
from wdmoe.device.loopback import LoopbackMeter
from wdmoe.device.service import DeviceService
from wdmoe.device.serving import serve
from wdmoe.profiles.device_profile import DeviceProfile
from wdmoe.runtime.channels import SharedChannel
from wdmoe.runtime.clock import RealClock
from wdmoe.runtime.emulation import Air, check_memory, emulated_profile, make_air, warn_if_slower
from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.keys import decode_token
from wdmoe.runtime.links import dial, is_loopback
from wdmoe.runtime.manifest import MANIFEST_NAME, DeviceManifest, read_manifest, verify_files
from wdmoe.runtime.messages import MAX_ROWS, Message
from wdmoe.runtime.stopping import StopFlag
from wdmoe.runtime.worker import ThreadWorker

_STOP_WAIT_S = 10.0
_LOOK_EVERY_S = 0.1


def run(config: DeviceConfig) -> int:
    """Serve what the bundle holds until interrupted; returns the exit code.

    Raises:
        WdmoeError: the bundle, the engine or the base station refuses.
    """
    folders = device_folders(config.bundle)
    if folders == [config.bundle]:
        return serve_folder(config)
    if given := [name for name in ("name", "enrol", "profile") if getattr(config, name) is not None]:
        option = f"--{given[0]}"
        raise ValueError(f"{option} is for one device, {config.bundle} holds {len(folders)}; give one device-K folder")
    with tempfile.TemporaryDirectory(prefix="wdmoe-channel-") as scratch:
        if config.link is not None and config.channel is None:
            # Devices of one bundle are in one place: on a radio they share its channel.
            config = replace(config, channel=Path(scratch) / "channel")
        return _serve_each(config, folders)


def device_folders(bundle: Path) -> list[Path]:
    """Return the device folders that a path stands for: itself, or those of a whole bundle."""
    if (bundle / MANIFEST_NAME).exists():
        return [bundle]
    folders = sorted(
        (path for path in bundle.glob("device-*") if (path / MANIFEST_NAME).exists()),
        key=lambda path: int(path.name.removeprefix("device-")) if path.name[7:].isdigit() else -1,
    )
    if not folders:
        raise BundleError(
            f"{bundle}: no {MANIFEST_NAME} and no device-K folders in it; expected a folder made by wdmoe-export "
            "(give it with --bundle)"
        )
    return folders


def serve_folder(config: DeviceConfig) -> int:
    """Verify, check, measure and serve one slice."""
    stop = StopFlag()
    manifest = read_manifest(config.bundle, DeviceManifest)
    name = config.name or f"device-{manifest.device}"
    say_to_stderr(
        f"{name}: {config.bundle}, {len(manifest.experts)} experts of {manifest.model.name} "
        f"({manifest.precision}), base station {config.bs}"
    )
    # What the user can mend at once is refused before minutes go into reading files and building engines.
    if config.emulation is not None:
        check_memory(config.emulation, manifest)
    token = decode_token(config.enrol) if config.enrol is not None else None
    own = bs_public = None
    if config.encrypted:
        known = keys_to_enrol(config.keys, name, token) if token else enrolled_keys(config.keys, name)
        own, bs_public = known.own, known.bs_public
    verify_files(config.bundle, manifest)
    engine = choose_engine(
        config.bundle, manifest, engine_names(config.engine), config.threads, lambda t: say_to_stderr(f"{name}: {t}")
    )
    if config.profile is None:
        profile = quick_profile(engine, manifest)
    else:
        profile = kept_profile(config.profile, engine, manifest)
    curve = ", ".join(f"{point.tokens}: {point.p50_ms:.2f}" for point in profile.points)
    say_to_stderr(f"{name}: measured ms per expert call by tokens: {curve}")
    air = meter = None
    if config.emulation is not None:
        measured, profile = (
            profile,
            emulated_profile(config.emulation, manifest, f"on {profile.device}", profile.software, profile.engine),
        )
        warn_if_slower(measured, profile, lambda t: say_to_stderr(f"{name}: {t}"))
        air, meter = _start_emulation(config, profile, name)
    clock = RealClock()
    link = dial(config.bs, MAX_ROWS * manifest.model.d_model * 4, own, bs_public)
    worker: ThreadWorker[Message] = ThreadWorker("engine", link.wake)
    service = DeviceService(name, secrets.token_hex(8), manifest, engine, profile, clock)

    def stop_serving(signum: int, frame: FrameType | None) -> None:
        stop.set()
        link.wake()

    try:
        if token is not None:
            enrol(link, clock, config.keys, name, token, say_to_stderr, manifest.model.d_model)
        signal.signal(signal.SIGINT, stop_serving)
        signal.signal(signal.SIGTERM, stop_serving)
        serve(service, link, worker, stop, say_to_stderr, air)
    finally:
        if meter is not None:
            meter.close()
        worker.close()
        link.close()
    say_to_stderr(f"{name}: stopped after {service.requests} requests")
    return 0


def _start_emulation(config: DeviceConfig, profile: DeviceProfile, name: str) -> tuple[Air, LoopbackMeter | None]:
    """Make what holds replies back; with an emulated link on loopback, also what measures the real one."""
    air = make_air(profile, name, SharedChannel(config.channel) if config.channel is not None else None)
    curve = ", ".join(f"{point.tokens}: {point.p50_ms:.2f}" for point in profile.points)
    say_to_stderr(f"{name}: {profile.emulated}; ms per expert call by tokens: {curve}")
    if config.link is None:
        return air, None
    if not is_loopback(config.bs):
        say_to_stderr(f"{name}: {config.link} is added to the real link to {config.bs}")
        return air, None
    meter = LoopbackMeter()
    air.real_round_trip_ms, air.real_best_ms = (lambda: meter.round_trip_ms), (lambda: meter.best_ms)
    say_to_stderr(f"{name}: {config.link} stands in place of loopback, which takes {meter.round_trip_ms:.2f} ms now")
    return air, meter


def _serve_each(config: DeviceConfig, folders: list[Path]) -> int:
    """Run one process per folder; stop all when interrupted or when one ends."""
    processes = {folder: subprocess.Popen(_command(replace(config, bundle=folder))) for folder in folders}
    stopping = StopFlag()

    def stop_all(signum: int, frame: FrameType | None) -> None:
        stopping.set()

    signal.signal(signal.SIGINT, stop_all)
    signal.signal(signal.SIGTERM, stop_all)
    ended: list[Path] = []
    while not stopping.is_set():
        if ended := [folder for folder, process in processes.items() if process.poll() is not None]:
            break
        time.sleep(_LOOK_EVERY_S)
    for process in processes.values():
        process.terminate()
    deadline = time.monotonic() + _STOP_WAIT_S
    for process in processes.values():
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if ended:
        code = processes[ended[0]].returncode
        say_to_stderr(f"{ended[0]}: its process ended with exit code {code}; stopped the others")
        return code or 1
    return 0


def _command(config: DeviceConfig) -> list[str]:
    entry = "from wdmoe.device.cli import main; main()"
    options = ["--bundle", str(config.bundle), "--bs", config.bs, "--engine", config.engine]
    options += ["--threads", str(config.threads), "--keys", str(config.keys)]
    options += ["--insecure"] * config.insecure + ["--encrypt"] * config.encrypt
    if config.emulate is not None:
        options += ["--emulate", config.emulate, "--seed", str(config.seed)]
        options += ["--link", config.link] if config.link is not None else []
        shape = config.cost_shape
        options += ["--cost-shape", f"{shape.d_model}x{shape.d_ff}"] if shape is not None else []
        options += ["--channel", str(config.channel)] if config.channel is not None else []
        options += ["--cost-precision", config.cost_precision] if config.cost_precision is not None else []
    return [sys.executable, "-c", entry, *options]
