"""What does a layer cost beside its stage and its experts? Against a bare echo of the same frames to the same processes.

    python scripts/bench/overhead.py --json -

The real base station and device processes over loopback, encrypted; a random model of 16 blocks, hidden size 2048, 16
experts of which each token takes 8. The devices' engine returns its rows, so a layer is everything else: routing, one
request a device, the wire there and back, weighing, summing, combining. `layer` is the time from the end of one
stage's graph to the start of the next. `echo` sends the frames of one layer's requests to the same processes by pyzmq alone
(ROUTER and DEALER, CURVE) and waits for all of them to come back. Microbatches and echoes alternate in the same run, so
that others on the machine meet both. `layer_over_echo` is the ratio of the medians; the bar is on the worst: <= 1.5.
Echoes follow each other at once, a layer follows a stage that has emptied the caches and let the devices fall asleep:
`echo_in_place` is the same echo right after each stage, and its ratio tells how much of the difference is ours.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import zmq

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
import tiny
from processes import exit_on_sigterm, stop

from scripts.bench._environment import CpuUse, environment, progress, write_json
from wdmoe.bs.hub import Hub
from wdmoe.bs.microbatch import KvCache, Microbatch, Result, pack_sequence
from wdmoe.bs.pipeline import Pipeline
from wdmoe.bs.policies import Exact
from wdmoe.bs.roster import FileRoster
from wdmoe.bs.routing import Floats
from wdmoe.bs.stages import Attended, Stages, new_cache
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.runtime.clock import RealClock
from wdmoe.runtime.keys import KeyPair, make_key
from wdmoe.runtime.links import Link, Parcel, listen
from wdmoe.runtime.manifest import BsManifest, read_manifest
from wdmoe.runtime.messages import MAX_ROWS, Frame
from wdmoe.runtime.worker import ThreadWorker

BLOCKS, EXPERTS, TOP_K, D_MODEL = 16, 16, 8, 2048
BAR = 1.5
READY_S = 60.0
WARM_UP_ROUNDS = 5


class TimedStages(Stages):
    """Stages that note when each of their graphs began and ended."""

    def __init__(self, folder: Path, manifest: BsManifest, threads: int) -> None:
        super().__init__(folder, manifest, threads)
        self.began_s: list[float] = []
        self.ended_s: list[float] = []
        self.after_stage: Callable[[int], None] | None = None  # told the block

    def attend(
        self,
        block: int,
        microbatch: Microbatch,
        angles: tuple[Floats, Floats],
        residual: Floats | None,
        moe_out: Floats | None,
    ) -> Attended:
        """Run a stage; see `Stages`."""
        self.began_s.append(time.perf_counter())
        attended = super().attend(block, microbatch, angles, residual, moe_out)
        if self.after_stage is not None:
            self.after_stage(block)
        self.ended_s.append(time.perf_counter())
        return attended

    def finish(self, microbatch: Microbatch, residual: Floats, moe_out: Floats) -> Result:
        """Run the last stage; see `Stages`."""
        self.began_s.append(time.perf_counter())
        return super().finish(microbatch, residual, moe_out)


@dataclass(slots=True)
class FrameKeeper:
    """A link that keeps the rows and headers of what goes out, for the echo to send."""

    link: Link
    keeping: bool = False
    kept: list[list[Frame]] = field(default_factory=list)

    def exchange(self, outgoing: Iterable[Parcel], timeout_s: float) -> list[Parcel]:
        """Send and receive; see `Link`."""
        if self.keeping:
            outgoing = list(outgoing)
            self.kept += [[bytes(frame) for frame in p.frames] for p in outgoing if len(p.frames) == 2]
        return self.link.exchange(outgoing, timeout_s)

    def wake(self) -> None:
        """See `Link`."""
        self.link.wake()

    def redial(self) -> None:
        """See `Link`."""
        self.link.redial()

    def close(self) -> None:
        """See `Link`."""
        self.link.close()


@dataclass(frozen=True, slots=True)
class System:
    """A base station with its devices connected, and the echo's own socket to the same processes."""

    manifest: BsManifest
    pipeline: Pipeline
    stages: TimedStages
    keeper: FrameKeeper
    echo: zmq.Socket[bytes]
    peers: list[bytes]  # of the echo, in the order of the devices' names
    pids: list[int]


@click.command()
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, allow_dash=True), help="Keep the result; - prints it."
)
@click.option("--devices", "counts", type=int, multiple=True, default=(1, 2, 4), show_default=True, help="Processes.")
@click.option("--rows", "sizes", type=int, multiple=True, default=(1, 64), show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=40, show_default=True, help="Microbatches of each point.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Of the stages.")
@click.option("--d-model", type=int, default=D_MODEL, show_default=True)
def main(
    target: str | None, counts: Sequence[int], sizes: Sequence[int], rounds: int, threads: int, d_model: int
) -> None:
    """Measure; exit code 1 if a layer takes longer than the bar allows."""
    exit_on_sigterm()
    points: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="wdmoe-overhead-") as scratch:
        checkpoint = tiny.tiny_checkpoint(
            Path(scratch) / "checkpoint", "qwen3_moe", dtype="bfloat16", hidden_size=d_model, head_dim=64,
            num_hidden_layers=BLOCKS, num_experts=EXPERTS, num_experts_per_tok=TOP_K, moe_intermediate_size=8,
        )  # fmt: skip
        for devices in counts:
            config = ExportConfig(Path(scratch) / f"bundle-{devices}", devices=devices)
            export_bundle(plan_export(checkpoint, "overhead", config), config)
            with open_system(config.out, Path(scratch) / f"keys-{devices}", devices, threads) as system:
                for rows in sizes:
                    points.append({"devices": devices, "rows": rows, **measure(system, rows, rounds)})
                    progress(_line(points[-1]))
    worst = max(point["layer_over_echo"] for point in points)
    result = {
        "layer_over_echo": worst,
        "bar": BAR,
        "passed": worst <= BAR,
        "points": points,
        "model": {"d_model": d_model, "blocks": BLOCKS, "experts": EXPERTS, "top_k": TOP_K, "engine": "identity"},
        "link": "loopback, CURVE, fp16 rows",
        "threads": threads,
        **environment(("numpy", "onnxruntime", "pyzmq")),
    }
    progress(f"worst layer over echo {worst:.2f}, bar {BAR}")
    if target is not None:
        write_json(target, result)
    sys.exit(0 if result["passed"] else 1)


def measure(system: System, rows: int, rounds: int) -> dict[str, Any]:
    """Let microbatches and echoes of their frames take turns."""
    cache = new_cache(system.manifest, rows)
    ids = np.random.default_rng(rows).integers(0, 256, rows).tolist()
    layers_ms: list[float] = []
    stages_ms: list[float] = []
    echoes_ms: list[float] = []
    in_place_ms: list[float] = []
    layers: list[list[tuple[bytes, list[Frame]]]] = []  # the frames of each block's requests, with their peers

    def echo_after(block: int) -> None:
        in_place_ms.append(echo_ms(system.echo, layers[block]))

    system.keeper.keeping = True
    for number in range(WARM_UP_ROUNDS + rounds):
        if number == WARM_UP_ROUNDS:
            use = CpuUse(system.pids)
        run_once(system, ids, cache)
        if system.keeper.keeping:
            system.keeper.keeping = False
            layers, system.keeper.kept = grouped(system.keeper.kept, system.peers), []
        began_s, ended_s = list(system.stages.began_s), list(system.stages.ended_s)
        took_ms = [echo_ms(system.echo, layer) for layer in layers]
        if number >= WARM_UP_ROUNDS:
            layers_ms += [(after - before) * 1e3 for before, after in zip(ended_s, began_s[1:], strict=True)]
            stages_ms += [(after - before) * 1e3 for before, after in zip(began_s[:-1], ended_s, strict=True)]
            echoes_ms += took_ms
            system.stages.after_stage = echo_after
            run_once(system, ids, cache)
            system.stages.after_stage = None
    p50, p95 = np.percentile(layers_ms, (50, 95))
    echo_p50, echo_p95 = np.percentile(echoes_ms, (50, 95))
    return {
        "layer_over_echo": float(p50 / echo_p50),
        "layer_p50_ms": float(p50),
        "layer_p95_ms": float(p95),
        "echo_p50_ms": float(echo_p50),
        "echo_p95_ms": float(echo_p95),
        "layer_over_echo_in_place": float(p50 / np.median(in_place_ms)),
        "echo_in_place_p50_ms": float(np.median(in_place_ms)),
        "stage_p50_ms": float(np.median(stages_ms)),
        "layers": len(layers_ms),
        "bytes_down": sum(len(frame) for _, frames in layers[0] for frame in frames),
        "cpu": use.since(),
    }


def run_once(system: System, ids: Sequence[int], cache: KvCache) -> None:
    """Let one microbatch pass, noting when its stages ran."""
    cache.truncate(0)
    system.stages.began_s.clear()
    system.stages.ended_s.clear()
    for _ in system.pipeline.run([pack_sequence("overhead", ids, cache, None)], Exact()):
        pass


def grouped(kept: Sequence[list[Frame]], peers: Sequence[bytes]) -> list[list[tuple[bytes, list[Frame]]]]:
    """Divide what was sent among the blocks: one request each for every process, or for as many as were asked."""
    per_block = len(kept) // BLOCKS
    blocks = [kept[start : start + per_block] for start in range(0, per_block * BLOCKS, per_block)]
    return [list(zip(peers, block, strict=False)) for block in blocks]


def echo_ms(sock: zmq.Socket[bytes], layer: Sequence[tuple[bytes, list[Frame]]]) -> float:
    """Send frames to their processes and wait until all are back."""
    before_s = time.perf_counter()
    for peer, frames in layer:
        sock.send_multipart([peer, *frames])
    for _ in layer:
        sock.recv_multipart()
    return (time.perf_counter() - before_s) * 1e3


@contextmanager
def open_system(bundle: Path, keys: Path, devices: int, threads: int) -> Iterator[System]:
    """Start devices and connect them; stop everything at the end."""
    manifest = read_manifest(bundle / "bs", BsManifest)
    own = make_key(keys / "bs.key")
    roster = FileRoster(keys / "devices.json")
    link = listen("tcp://127.0.0.1:0", MAX_ROWS * manifest.model.d_model * 4, own)
    keeper = FrameKeeper(link)
    hub = Hub(keeper, manifest, RealClock(), roster)
    running: list[subprocess.Popen[bytes]] = []
    try:
        with echo_socket(own) as (sock, address):
            for k in range(devices):
                token = roster.invite(f"device-{k}", own.public).encode()
                line = [sys.executable, str(Path(__file__).with_name("_identity_device.py"))]
                line += ["--bundle", str(bundle / f"device-{k}"), "--bs", link.address, "--keys", str(keys)]
                line += ["--token", token, "--echo", address]
                running.append(subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=sys.stderr))
            hub.wait_for_devices(READY_S)
            peers = {name: peer for peer, name in (sock.recv_multipart() for _ in running)}
            stages = TimedStages(bundle / "bs", manifest, threads)
            pipeline = Pipeline(hub, stages, manifest, lambda wake: ThreadWorker("stages", wake))
            ordered = [peers[f"device-{k}".encode()] for k in range(devices)]
            yield System(manifest, pipeline, stages, keeper, sock, ordered, [device.pid for device in running])
            pipeline.close()
            hub.close("measured")
    finally:
        stop(running)
        link.close()


@contextmanager
def echo_socket(keys: KeyPair) -> Iterator[tuple[zmq.Socket[bytes], str]]:
    """Open the echo's side of the base station, in a context of its own."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sock = context.socket(zmq.ROUTER)
    sock.curve_secretkey, sock.curve_publickey = keys.secret.encode(), keys.public.encode()
    sock.curve_server = True
    sock.setsockopt(zmq.RCVTIMEO, int(READY_S * 1000))
    port = sock.bind_to_random_port("tcp://127.0.0.1")
    try:
        yield sock, f"tcp://127.0.0.1:{port}"
    finally:
        sock.close(linger=0)
        context.term()


def _line(point: dict[str, Any]) -> str:
    others = point["cpu"]["others_cpu_share"]
    busy = "" if others is None else f", others {others:.0%} of the processors"
    return (
        f"{point['devices']} devices, {point['rows']} rows: layer {point['layer_p50_ms']:.2f} ms, "
        f"echo {point['echo_p50_ms']:.2f} ms, ratio {point['layer_over_echo']:.2f}; "
        f"echo in place {point['echo_in_place_p50_ms']:.2f} ms, ratio {point['layer_over_echo_in_place']:.2f}{busy}"
    )


if __name__ == "__main__":
    main()
