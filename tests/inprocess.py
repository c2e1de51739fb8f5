"""A whole system in one process: the real base station and device code over the link's twin in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wdmoe.bs.held import HeldExperts
from wdmoe.bs.hub import Hub
from wdmoe.bs.kept import keep_measured
from wdmoe.bs.microbatch import pack_sequence
from wdmoe.bs.pipeline import Pipeline
from wdmoe.bs.policies import Exact, Policy
from wdmoe.bs.routing import Floats
from wdmoe.bs.stages import Stages, StationStages, new_cache
from wdmoe.bs.tracing import Trace
from wdmoe.device.loading import quick_profile
from wdmoe.device.service import DeviceService
from wdmoe.runtime.clock import VirtualClock
from wdmoe.runtime.engines import load_engine
from wdmoe.runtime.links import MemoryLink
from wdmoe.runtime.manifest import BsManifest, DeviceManifest, read_manifest
from wdmoe.runtime.messages import Frame, Message, Wire, decode, encode
from wdmoe.runtime.worker import InlineWorker

Handler = Callable[[Sequence[Frame]], Iterable[Sequence[Frame]]]


@dataclass
class System:
    """What a test may look at and break."""

    manifest: BsManifest
    link: MemoryLink
    clock: VirtualClock
    hub: Hub
    pipeline: Pipeline
    services: dict[str, DeviceService]


def make_service(folder: Path, clock: VirtualClock, engine: str = "numpy") -> DeviceService:
    """Bring up one device folder."""
    manifest = read_manifest(folder, DeviceManifest)
    loaded = load_engine(engine, folder, manifest.experts, 1)
    profile = quick_profile(loaded, manifest)
    return DeviceService(folder.name, f"session-{folder.name}", manifest, loaded, profile, clock)


def answer_with(service: DeviceService) -> Handler:
    """Turn a service into a peer of the memory link: jobs run at once."""

    def handle(frames: Sequence[Frame]) -> Iterable[Sequence[Frame]]:
        answers, job = service.on_message(decode(frames, service.manifest.model.d_model))
        return [encode(message) for message in (*answers, *([job.run()] if job is not None else []))]

    return handle


@contextmanager
def open_system(
    bundle: Path,
    wire: Wire = "fp32",
    engine: str = "numpy",
    replicas: Sequence[int] = (),
    holds: int | None = None,
    skip_lost: bool = False,
    trace: Trace | None = None,
    clock: VirtualClock | None = None,
    keeps: str | None = None,
    make_stages: Callable[[Path, BsManifest], StationStages] = lambda folder, manifest: Stages(folder, manifest, 1),
) -> Iterator[System]:
    """Connect every device folder of a bundle to a base station; time is virtual.

    Args:
        bundle: made by wdmoe-export.
        wire: precision of the rows.
        engine: of every device.
        replicas: device folders that a second device, "replica-K", serves as well.
        holds: experts that the base station may keep in memory itself.
        skip_lost: whether what is lost may be left out.
        trace: collects a timeline.
        clock: None makes one that only waiting moves.
        keeps: experts that the base station runs itself, as for --bs-experts.
        make_stages: loads the base station's part.
    """
    clock = clock or VirtualClock()
    manifest = read_manifest(bundle / "bs", BsManifest)
    services = {path.name: make_service(path, clock, engine) for path in sorted(bundle.glob("device-*"))}
    for k in replicas:
        service = make_service(bundle / f"device-{k}", clock, engine)
        service.name = service.session = f"replica-{k}"
        services[service.name] = service
    link = MemoryLink({name.encode(): answer_with(service) for name, service in services.items()}, clock)
    hub = Hub(link, manifest, clock)
    for name, service in services.items():
        for message in service.on_tick():
            link.deliver(name.encode(), encode(message))
    hub.turn(0.0)
    hub.turn(0.0)
    kept = keep_measured(keeps, bundle / "bs", manifest, 1, None) if keeps is not None else None
    held = HeldExperts(bundle / "bs", manifest, holds or 0, kept) if (holds, kept) != (None, None) else None
    stages = make_stages(bundle / "bs", manifest)
    pipeline = Pipeline(hub, stages, manifest, InlineWorker, wire, held, skip_lost, trace)
    yield System(manifest, link, clock, hub, pipeline, services)
    pipeline.close()
    link.close()


def run_sequence(system: System, token_ids: Sequence[int], policy: Policy | None = None) -> Floats:
    """Run one prompt; return the logits of every token: [n, vocab]."""
    cache = new_cache(system.manifest, len(token_ids))
    microbatch = pack_sequence("prompt", token_ids, cache, system.manifest.model.sliding_window, all_logits=True)
    ((_, result, _),) = system.pipeline.run([microbatch], policy or Exact())
    assert result.logits is not None
    return result.logits


def greedy(system: System, prompt: Sequence[int], tokens: int) -> tuple[list[int], Floats]:
    """Continue a prompt greedily; return the tokens and the logits each was chosen from: [tokens, vocab]."""
    cache = new_cache(system.manifest, len(prompt) + tokens)
    window = system.manifest.model.sliding_window
    ids, chosen, logits = list(prompt), [], []
    for _ in range(tokens):
        microbatch = pack_sequence("generate", ids, cache, window)
        ((_, result, _),) = system.pipeline.run([microbatch], Exact())
        assert result.logits is not None
        logits.append(result.logits[-1])
        ids = [int(result.logits[-1].argmax())]
        chosen += ids
    return chosen, np.stack(logits)


def edited(message_handler: Handler, d_model: int, edit: Callable[[Message], Message | None]) -> Handler:
    """Let a peer lie: change what it answers, or swallow it (None)."""

    def handle(frames: Sequence[Frame]) -> Iterable[Sequence[Frame]]:
        for answer in message_handler(frames):
            changed = edit(decode(answer, d_model))
            if changed is not None:
                yield encode(changed)

    return handle
