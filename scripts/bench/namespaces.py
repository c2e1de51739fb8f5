"""The pinned testbed with links that really are limited: network namespaces, htb, device processes, `wdmoe-bs run`.

    sudo scripts/testbed --json result.json

Devices, efficiencies and cost shape are those of testbed.toml; each device has its uniform share of the band as a link of
its own, both directions at its rate. With --bandwidth each link carries what the device makes of the whole band, and base
station and devices divide it: they pace what they send (`wdmoe-bs run --bandwidth`). The rows of the model stand for wider ones, so rates are divided by as much as the
cost shape is wider. Computing is emulated by the device processes, and so are delay and jitter, which htb has none of.
Wall time: others on the machine disturb it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import msgspec

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
from processes import command, exit_on_sigterm, stop

from scripts.bench._environment import environment, progress, write_json
from scripts.bench._namespaces import (
    STATION,
    LimitedLink,
    NotPermitted,
    Rate,
    build_commands,
    built,
    inside,
    measured_rates,
    ours,
    remove,
)
from scripts.bench.testbed import CONFIG, Testbed, placed_bundle, read_testbed
from wdmoe.runtime.manifest import BsManifest, read_manifest

PORT = 5555
RATE_BAR = 0.05  # of a measured transfer against the nominal rate
NO_BYTES_MHZ = 1e9  # of the emulated link that adds the delay: its bytes take no time
ROW_WIDTH = {"tiny": 32, "smollm2-moe": 576}  # of the models that --plan knows without exporting them


def limited_links(testbed: Testbed, efficiency: str, row_width: int, whole: bool = False) -> list[LimitedLink]:
    """Return each device's uniform share of the band, scaled so that a row of the model takes as long as a charged one.

    Args:
        testbed: has the band.
        efficiency: which of its efficiencies.
        row_width: of the model.
        whole: give each device what it would make of the whole band instead.
    """
    scale = row_width / testbed.shape.d_model / (1 if whole else len(testbed.devices))
    rates = [testbed.bandwidth_mhz * e * scale for e in testbed.efficiencies[efficiency]]
    return [LimitedLink(number, rate, rate) for number, rate in enumerate(rates)]


def device_line(testbed: Testbed, bundle: Path, link: LimitedLink, jitter_ms: float) -> list[str]:
    """Return the command of one device process; its emulated link adds delay and jitter, and nothing for bytes."""
    delay = f"radio:mhz={NO_BYTES_MHZ:.0f}:efficiency=1:rtt_ms={testbed.round_trip_ms:g}:jitter_ms={jitter_ms:g}"
    options = ["--bundle", bundle / f"device-{link.device}", "--bs", f"tcp://{link.station_ip}:{PORT}", "--insecure"]
    options += ["--emulate", testbed.devices[link.device], "--link", delay]
    options += ["--cost-shape", testbed.cost_shape, "--cost-precision", testbed.cost_precision]
    return inside(link.namespace, command("wdmoe-device", *options))


def station_line(
    testbed: Testbed,
    bundle: Path,
    where: tuple[str, Path | None],
    rows: int,
    policies: Sequence[str],
    out: Path,
    band: Sequence[str] = (),
) -> list[str]:
    """Return the command of the base station; `band`: see `band_options`."""
    dataset, data_dir = where
    options = ["--bundle", bundle / "bs", "--listen", f"tcp://0.0.0.0:{PORT}", "--insecure", "--wire", testbed.wire]
    options += ["--dataset", dataset, "--limit", rows, "--json", out, *band]
    options += ["--data-dir", data_dir] if data_dir is not None else []
    for policy in policies:
        options += ["--policy", policy]
    return inside(STATION, command("wdmoe-bs", "run", *options))


def band_options(testbed: Testbed, efficiency: str, bandwidth: str | None, links: Sequence[LimitedLink]) -> list[str]:
    """Return what the base station is told of its links, and how it divides their band, unless they are divided already."""
    rates = ["--link", ",".join(f"radio:mhz={link.down_mbps:.6g}:efficiency=1" for link in links)]
    if bandwidth is None:
        return rates
    return [
        *rates,
        "--bandwidth",
        ",".join(map(str, testbed.static_shares[efficiency])) if bandwidth == "static" else bandwidth,
    ]


def run(
    testbed: Testbed,
    bundle: Path,
    links: Sequence[LimitedLink],
    where: tuple[str, Path | None],
    rows: int,
    policies: Sequence[str],
    jitter_ms: float,
    band: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the devices and the base station over links that are built; return the result of `wdmoe-bs run`."""
    devices: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="wdmoe-namespaces-") as scratch:
        logs = [Path(scratch) / f"device-{link.device}.log" for link in links]
        try:
            for link, log in zip(links, logs, strict=True):
                with log.open("wb") as out:
                    line = device_line(testbed, bundle, link, jitter_ms)
                    devices.append(subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=out, stderr=out))
            result = Path(scratch) / "result.json"
            line = station_line(testbed, bundle, where, rows, policies, result, band)
            done = subprocess.run(line, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False)
            if done.returncode != 0:
                ends = [f"{log.stem}: {log.read_text()[-300:].strip()}" for log in logs]
                raise click.ClickException(
                    f"wdmoe-bs run ended with {done.returncode}; devices said: {'; '.join(ends)}"
                )
            return dict(msgspec.json.decode(result.read_bytes()))
        finally:
            stop(devices)


def rate_entry(link: LimitedLink, rates: tuple[Rate, Rate]) -> dict[str, Any]:
    """Describe a link and what was measured on it."""
    down, up = (asdict(rate) | {"relative_error": rate.error} for rate in rates)
    return {"device": link.device, "down": down, "up": up}


@click.command(
    epilog="\b\nExamples:\n  sudo scripts/testbed --json result.json\n  sudo scripts/testbed --bandwidth per-block --json per-block.json\n  scripts/testbed --plan\n  sudo scripts/testbed --clean"
)
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, allow_dash=True), help="Keep the result; - prints it."
)
@click.option("--data-dir", type=click.Path(path_type=Path, exists=True, resolve_path=True), help="With piqa.")
@click.option("--dataset", default="piqa-sample", show_default=True)
@click.option("--rows", type=click.IntRange(min=1), default=20, show_default=True)
@click.option(
    "--policy", "policies", multiple=True, default=("exact", "bottleneck"), show_default=True, help="Several times."
)
@click.option("--model", help="Instead of the testbed's; tiny: a random one.")
@click.option("--efficiency", default="6:4:2", show_default=True, help="Of the testbed's.")
@click.option(
    "--bandwidth",
    type=click.Choice(["uniform", "static", "per-block"]),
    help="Divide the band between links that each carry all of it.  [default: links that carry their uniform share]",
)
@click.option("--jitter-ms", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Mean, emulated.")
@click.option("--seconds", type=float, default=2.0, show_default=True, help="Of each transfer that checks a rate.")
@click.option("--only-links", is_flag=True, help="Build the links, measure their rates, remove them.")
@click.option("--plan", is_flag=True, help="Only print the commands that would build it; needs no root.")
@click.option("--clean", is_flag=True, help="Only remove what an earlier testbed left behind, with what runs in it.")
def main(
    target: str | None,
    data_dir: Path | None,
    dataset: str,
    rows: int,
    policies: Sequence[str],
    model: str | None,
    efficiency: str,
    bandwidth: str | None,
    jitter_ms: float,
    seconds: float,
    only_links: bool,
    plan: bool,
    clean: bool,
) -> None:
    """Run the pinned testbed over network namespaces with rate-limited links, and remove them at the end.

    Exit code 1 if it cannot be built, or if a measured rate differs by more than 5 % from what was asked for.
    """
    exit_on_sigterm()
    testbed = read_testbed(CONFIG)
    name = model or testbed.model
    if efficiency not in testbed.efficiencies:
        raise click.BadParameter(f"expected one of {', '.join(testbed.efficiencies)}", param_hint="--efficiency")
    if plan:
        if name not in ROW_WIDTH:
            raise click.BadParameter(f"expected {' or '.join(ROW_WIDTH)} with --plan", param_hint="--model")
        for line in build_commands(limited_links(testbed, efficiency, ROW_WIDTH[name], bandwidth is not None)):
            click.echo(" ".join(line))
        return
    try:
        if clean:
            removed = remove(ours())
            progress(f"removed {', '.join(removed)}" if removed else "nothing is left of a testbed")
            return
        result = measured(
            testbed, name, efficiency, bandwidth, (dataset, data_dir), rows, policies, jitter_ms, seconds, only_links
        )
    except FileNotFoundError as error:
        raise click.ClickException(f"{error.filename or error}: not there; ip and tc come with iproute2") from error
    except (NotPermitted, RuntimeError) as error:
        raise click.ClickException(
            f"{error}. Without namespaces, scripts/bench/testbed.py compares policies in virtual time"
        ) from error
    if target is not None:
        write_json(target, result)
    sys.exit(0 if result["passed"] else 1)


def measured(
    testbed: Testbed,
    model: str,
    efficiency: str,
    bandwidth: str | None,
    where: tuple[str, Path | None],
    rows: int,
    policies: Sequence[str],
    jitter_ms: float,
    seconds: float,
    only_links: bool,
) -> dict[str, Any]:
    """Build the links, check their rates, run over them, and describe it all."""
    with placed_bundle(model, testbed) as bundle:
        width = read_manifest(bundle / "bs", BsManifest).model.d_model
        links = limited_links(testbed, efficiency, width, bandwidth is not None)
        band = band_options(testbed, efficiency, bandwidth, links)
        with built(links):
            rates = [measured_rates(link, seconds) for link in links]
            for link, (down, up) in zip(links, rates, strict=True):
                progress(
                    f"device-{link.device}: {down.nominal_mbps:.2f} Mbit/s asked for, "
                    f"{down.measured_mbps:.2f} down and {up.measured_mbps:.2f} up measured"
                )
            answered = None if only_links else run(testbed, bundle, links, where, rows, policies, jitter_ms, band)
    worst = max(abs(rate.error) for pair in rates for rate in pair)
    return {
        "max_rate_error": worst,
        "rate_bar": RATE_BAR,
        "passed": worst <= RATE_BAR,
        "origin": "links of limited rate between network namespaces, real sockets, wall time; computing, delay and jitter "
        "are emulated",
        "efficiency": efficiency,
        "bandwidth": bandwidth,
        "row_scale": testbed.shape.d_model / width,
        "links": [rate_entry(link, pair) for link, pair in zip(links, rates, strict=True)],
        "run": answered,
        "testbed": msgspec.to_builtins(testbed),
        **environment(("numpy", "onnxruntime", "pyzmq")),
    }


if __name__ == "__main__":
    main()
