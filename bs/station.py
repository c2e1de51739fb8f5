"""A base station from its config: verified bundle, open link, connected devices, loaded stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wdmoe.bs.airtime import Medium, latency_model
from wdmoe.bs.allocation import USUAL_TOKENS, static_of_use
from wdmoe.bs.config import StationConfig, VirtualConfig
from wdmoe.bs.flights import Outcome
from wdmoe.bs.health import serve_health, snapshot
from wdmoe.bs.held import HeldExperts
from wdmoe.bs.hub import Hub
from wdmoe.bs.kept import Kept, keep_measured, usage
from wdmoe.bs.pipeline import Pipeline
from wdmoe.bs.roster import BS_KEY_NAME, ROSTER_NAME, FileRoster
from wdmoe.bs.sensitivity import read_sensitivity
from wdmoe.bs.stages import open_stages
from wdmoe.bs.tracing import STAGES, Trace
from wdmoe.bs.transmitting import Division, LiveBand
from wdmoe.profiles.link_profile import LinkProfile, modelled_link
from wdmoe.runtime.clock import RealClock
from wdmoe.runtime.departures import SPIN_S
from wdmoe.runtime.errors import BundleError, WdmoeError
from wdmoe.runtime.keys import read_key
from wdmoe.runtime.links import is_loopback, listen
from wdmoe.runtime.manifest import MANIFEST_NAME, BsManifest, read_manifest, verify_files
from wdmoe.runtime.messages import MAX_ROWS, row_bytes
from wdmoe.runtime.worker import ThreadWorker, Worker

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Station:
    """An open base station, ready to run microbatches."""

    config: StationConfig
    folder: Path
    manifest: BsManifest
    hub: Hub
    pipeline: Pipeline
    virtual: VirtualConfig | None = None  # whose devices and links these are; None: they are real, and so is time
    kept: Kept | None = None  # experts that the base station runs itself
    shares: Mapping[str, float] | None = None  # of a band that is divided once, in real time, by device


@contextmanager
def open_hub(config: StationConfig, say: Say) -> Iterator[tuple[Path, BsManifest, Hub]]:
    """Read the bundle and listen for devices; says goodbye to them at the end."""
    folder = bs_folder(config.bundle)
    manifest = read_manifest(folder, BsManifest)
    keys = read_key(config.keys / BS_KEY_NAME) if config.encrypted else None
    roster = FileRoster(config.keys / ROSTER_NAME) if config.encrypted else None
    link = listen(config.listen, MAX_ROWS * manifest.model.d_model * 4, keys)
    hub = Hub(link, manifest, RealClock(), roster, SPIN_S)
    say(f"{manifest.model.name}: listening on {link.address}, {'encrypted' if config.encrypted else 'not encrypted'}")
    try:
        yield folder, manifest, hub
    finally:
        hub.close("the base station is done")
        link.close()


@contextmanager
def open_station(config: StationConfig, say: Say) -> Iterator[Station]:
    """Open everything and wait for the devices the model needs.

    Raises:
        WdmoeError: the bundle is damaged, the address is taken, devices are missing.
    """
    with open_hub(config, say) as (folder, manifest, hub):
        verify_files(folder, manifest)
        stages = open_stages(folder, manifest, config.threads, config.stages_on, say)
        kept = None
        if config.bs_experts != "none":
            kept = keep_measured(config.bs_experts, folder, manifest, config.threads, config.bs_counts)
            say(introduced_kept(kept))
        waiting = ", ".join(f"device-{k}" for k in hub.missing_devices())
        say(f"waiting up to {config.wait_s:g} s for {waiting}")
        hub.wait_for_devices(config.wait_s)
        say(f"connected: {introduced(hub)}")
        band = live_band(config, hub, manifest)
        shares = band.division if isinstance(band.division, Mapping) else None
        if config.bandwidth == "static" and shares is not None:
            counts, told_by = usage(manifest, config.bs_counts)
            said = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
            say(f"static shares of the band: {said}, by {'equal use' if counts is None else told_by}")
        band.admit(hub.devices.values())
        for name in band.rateless(hub.devices.values()):
            say(f"{name}: what its link carries is not known; its share applies once requests tell it, or give --link")

        def make_worker(wake: Callable[[], None]) -> Worker[Outcome]:
            return ThreadWorker(STAGES, wake, config.stage_workers)

        skip_lost = config.when_lost == "skip"
        trace = Trace() if config.trace is not None else None
        held = held_experts(config, folder, manifest, kept)
        pipeline = Pipeline(
            hub,
            stages,
            manifest,
            make_worker,
            config.wire,
            held,
            skip_lost,
            trace,
            live_medium(config),
            stage_workers=config.stage_workers,
            band=band,
            splits=config.split == "auto",
            learns=not is_loopback(config.listen),
        )
        pipeline.sensitivity = read_sensitivity(folder, manifest)
        with ExitStack() as stack:
            if trace is not None and config.trace is not None:
                stack.callback(trace.write, config.trace)  # also of a run that fails
            stack.callback(pipeline.close)
            if config.health is not None:
                url = stack.enter_context(serve_health(config.health, lambda: snapshot(hub, pipeline, manifest)))
                say(f"health at {url}")
            yield Station(config, folder, manifest, hub, pipeline, kept=kept, shares=shares)
            for name in band.rateless(hub.devices.values()):
                say(
                    f"{name}: its share of the band was never applied: no request told what its link carries; give --link"
                )


def live_medium(config: StationConfig) -> Medium | None:
    """Say what the links of devices that dial in are; None: emulated devices know."""
    if config.channel == "shared":
        return "shared"
    if config.bandwidth == "per-block":
        return "pooled"
    return "own" if config.channel or config.bandwidth else None


def live_band(config: StationConfig, hub: Hub, manifest: BsManifest) -> LiveBand:
    """Say what is known of the links of the devices that are connected, and how their band is divided.

    Raises:
        ValueError: links or shares are not as many as devices.
        WdmoeError: an emulated device is on a channel that cannot be divided.
    """
    names = sorted(hub.devices, key=lambda name: (len(name), name))
    profiles = [modelled_link(link) for link in config.links]
    if len(profiles) not in (0, 1, len(names)):
        raise ValueError(
            f"{len(profiles)} links for {len(names)} devices ({', '.join(names)}); give one for all, or one each"
        )
    links = dict(zip(names, profiles * len(names) if len(profiles) == 1 else profiles, strict=False))
    shares = config.fixed_shares
    if shares is not None and len(shares) != len(names):
        raise ValueError(f"--bandwidth has {len(shares)} shares for {len(names)} devices ({', '.join(names)})")
    if config.bandwidth is not None:
        for name in names:
            emulated = hub.devices[name].latency.profile.emulated
            if emulated is not None and emulated.shared:
                raise WdmoeError(
                    f"{name} is emulated on a channel that all share, which --bandwidth cannot divide; start each device "
                    "by itself and without --channel, or leave --bandwidth out"
                )
    division: Division | None = None
    if shares is not None:
        division = dict(zip(names, shares, strict=True))
    elif config.bandwidth == "static":
        division = static_division(hub, manifest, links, config)
    elif config.bandwidth is not None:
        division = "uniform" if config.bandwidth == "uniform" else "per-block"
    return LiveBand(division, links, row_bytes(manifest.model.d_model, config.wire))


def static_division(
    hub: Hub, manifest: BsManifest, links: Mapping[str, LinkProfile], config: StationConfig
) -> dict[str, float]:
    """Divide the band once, by what is known of the devices and links and how often each expert is used.

    Raises:
        WdmoeError: what a link carries is not known, or SciPy is missing.
    """
    names, owner = hub.owners()
    trackers = [hub.devices[name].latency for name in names]
    row = row_bytes(manifest.model.d_model, config.wire)
    air_ms = [
        (links[name].down_ms(row), links[name].up_ms(row)) if name in links else tracker.row_air_ms
        for name, tracker in zip(names, trackers, strict=True)
    ]
    if unknown := [name for name, ways in zip(names, air_ms, strict=True) if not all(ways)]:
        raise WdmoeError(f"--bandwidth static: what the link of {unknown[0]} carries is not known; give --link")
    down_ms, up_ms = map(np.array, zip(*air_ms, strict=True))
    model = latency_model([tracker.model() for tracker in trackers], USUAL_TOKENS).with_rates(down_ms, up_ms)
    counts, _ = usage(manifest, config.bs_counts)
    shares = static_of_use(model, np.array(owner), manifest.model.top_k, counts)
    return dict(zip(names, shares.tolist(), strict=True))


def introduced(hub: Hub) -> str:
    """Name the connected devices, and what those pretend to be that are emulated."""
    emulated = {name: device.latency.profile.emulated for name, device in sorted(hub.devices.items())}
    return ", ".join(name if what is None else f"{name} ({what})" for name, what in emulated.items())


def introduced_kept(kept: Kept | None) -> str:
    """Say what the base station runs itself."""
    if kept is None:
        return "the base station runs no expert itself: none fits into its memory"
    choice, profile = kept.choice, kept.profile
    return (
        f"the base station runs {len(choice.experts)} experts itself ({choice.size_bytes / 1e6:,.0f} MB), most used by "
        f"{choice.chosen_by}; {profile.origin} on {profile.engine if profile.origin == 'measured' else profile.device}: "
        f"{profile.call_ms(1):.2f} ms for one row"
    )


def held_experts(
    config: StationConfig, folder: Path, manifest: BsManifest, kept: Kept | None = None
) -> HeldExperts | None:
    """Return what the base station may run itself, always or when a device is lost, if anything."""
    if config.bs_holds == "none" and kept is None:
        return None
    every = manifest.model.n_blocks * manifest.model.n_experts
    limit = {"none": 0, "all": every}.get(config.bs_holds)
    return HeldExperts(folder, manifest, int(config.bs_holds) if limit is None else limit, kept)


def bs_folder(bundle: Path) -> Path:
    """Accept the folder `bs` or the bundle that holds it."""
    for folder in (bundle, bundle / "bs"):
        if (folder / MANIFEST_NAME).exists():
            return folder
    raise BundleError(
        f"{bundle}: holds no {MANIFEST_NAME}; expected the folder `bs` of a bundle (make one with wdmoe-export, "
        "give it with --bundle)"
    )
