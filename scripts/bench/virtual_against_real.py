"""Does virtual time say what real sockets and wall time say? The same rows through emulated device processes and without.

    python scripts/bench/virtual_against_real.py --json -

Real: three `wdmoe-device --emulate` processes on loopback on one `--medium` (uniform: each on a third of the band), and the
base station's own clock.
Virtual: the same devices, links, rows and policy in one process; a stage is declared to take what the stages of the real
run took on average. The bar: total latency of the rows of each policy within 10 % (`max_relative_error`). It needs a
machine with a core to spare; where others take it (`others_cpu_share`, of each policy's real run and of all), real replies are
late, and a policy that is `disturbed` says nothing about virtual time.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import msgspec

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
from processes import command, exit_on_sigterm, free_address, stop

from scripts.bench._environment import OTHERS_LIMIT, CpuUse, environment, progress, write_json
from scripts.bench._system import DeviceProcess, Devices
from scripts.bench.testbed import CONFIG, Testbed, placed_bundle, read_testbed
from wdmoe.bs.config import StationConfig, VirtualConfig
from wdmoe.bs.evaluation import LoadedTask, evaluate, load_task
from wdmoe.bs.experiment import load_tokenizer, max_length
from wdmoe.bs.policies import parse_policy
from wdmoe.bs.records import Record
from wdmoe.bs.scoring import DistributedScorer
from wdmoe.bs.station import Station, open_station
from wdmoe.bs.virtual import open_virtual_station

BAR = 0.10


@click.command()
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, allow_dash=True), help="Keep the result; - prints it."
)
@click.option("--data-dir", type=click.Path(path_type=Path, exists=True))
@click.option("--dataset", default="piqa-sample", show_default=True)
@click.option("--rows", type=int, default=20, show_default=True)
@click.option("--policy", "policies", multiple=True, help="Instead of exact, round-robin and the testbed's.")
@click.option("--model", help="Instead of the testbed's; tiny: a random one.")
@click.option("--efficiency", default="6:4:2", show_default=True, help="Of the testbed's.")
@click.option("--medium", default="uniform", show_default=True, help="Of the testbed's.")
def main(
    target: str | None,
    data_dir: Path | None,
    dataset: str,
    rows: int,
    policies: Sequence[str],
    model: str | None,
    efficiency: str,
    medium: str,
) -> None:
    """Compare virtual time with wall time; exit code 1 if a policy's total latency differs by more than the bar."""
    exit_on_sigterm()
    testbed = read_testbed(CONFIG)
    names = policies or tuple(dict.fromkeys(("exact", "round-robin", *testbed.policies)))
    task = load_task(dataset, data_dir)
    found: dict[str, Any] = {}
    use = CpuUse()
    with placed_bundle(model or testbed.model, testbed) as bundle:
        arm = testbed.arm(efficiency, medium)
        for name in names:
            meanwhile = CpuUse()
            real = real_records(bundle, testbed, arm, name, task, rows)
            others = meanwhile.since()["others_cpu_share"]
            stages = sum(len(record.blocks) + 1 for record in real)
            stage_ms = sum(record.bs_ms for record in real) / stages
            virtual = virtual_records(bundle, testbed, replace(arm, stage_ms=stage_ms), name, task, rows)
            totals = [sum(record.latency_ms for record in records) for records in (real, virtual)]
            found[name] = {
                "real_total_ms": totals[0],
                "virtual_total_ms": totals[1],
                "relative_error": totals[1] / totals[0] - 1,
                "stage_ms": stage_ms,
                "others_cpu_share": others,  # while it was run for real
                "disturbed": others is not None and others > OTHERS_LIMIT,
                "real_ms": [record.latency_ms for record in real],
                "virtual_ms": [record.latency_ms for record in virtual],
                "dropped": [sum(b.pairs - b.sent for r in records for b in r.blocks) for records in (real, virtual)],
            }
            progress(
                f"{name}: real {totals[0]:.0f} ms, virtual {totals[1]:.0f} ms, {found[name]['relative_error']:+.1%}"
            )
    worst = max(found, key=lambda name: abs(found[name]["relative_error"]))
    error = abs(found[worst]["relative_error"])
    result: dict[str, Any] = {
        "max_relative_error": error,
        "worst": worst,
        "bar": BAR,
        "passed": error <= BAR,
        "origin": "emulated devices; real sockets and wall time against virtual time",
        "rows": rows,
        "medium": medium,
        "dataset": dataset,
        "links": list(arm.links),
        "testbed": msgspec.to_builtins(testbed),
        "policies": found,
        **use.since(),
        **environment(("numpy", "onnxruntime", "pyzmq")),
    }
    if target is not None:
        write_json(target, result)
    sys.exit(0 if result["passed"] else 1)


def start_devices(bundle: Path, testbed: Testbed, arm: VirtualConfig) -> tuple[Devices, str]:
    """Start a process for each device of an arm; return them and the address that they dial."""
    address = free_address()
    devices = Devices()
    for number, (hardware, link) in enumerate(zip(arm.devices, arm.links, strict=True)):
        options = ["--bundle", bundle / f"device-{number}", "--bs", address, "--emulate", hardware, "--link", link]
        options += ["--cost-shape", testbed.cost_shape, "--cost-precision", testbed.cost_precision]
        options += ["--channel", bundle / "channel"] if arm.channel == "shared" else []
        log = bundle / f"device-{number}.log"
        devices.by_name[f"device-{number}"] = DeviceProcess(f"device-{number}", command("wdmoe-device", *options), log)
    return devices, address


def real_records(
    bundle: Path, testbed: Testbed, arm: VirtualConfig, policy: str, task: LoadedTask, rows: int
) -> list[Record]:
    """Answer rows over device processes, on one channel or each on its share of the band."""
    devices, address = start_devices(bundle, testbed, arm)
    try:
        devices.keep()
        config = StationConfig(bundle, address, wire=testbed.wire, bandwidth=arm.bandwidth)
        with open_station(config, lambda text: None) as station:
            return answered(station, policy, task, rows)
    finally:
        stop([device.process for device in devices.by_name.values() if device.process is not None])


def virtual_records(
    bundle: Path, testbed: Testbed, arm: VirtualConfig, policy: str, task: LoadedTask, rows: int
) -> list[Record]:
    """Answer the same rows in virtual time."""
    with open_virtual_station(StationConfig(bundle, wire=testbed.wire), arm, lambda text: None) as station:
        return answered(station, policy, task, rows)


def answered(station: Station, policy: str, task: LoadedTask, rows: int) -> list[Record]:
    """Answer rows, one at a time, and return their records."""
    model = station.manifest.model
    scorer = DistributedScorer(station.pipeline, parse_policy(policy), 1, model.sliding_window)
    evaluate(
        task,
        scorer,
        load_tokenizer(station),
        max_length=max_length(station),
        limit=rows,
        prefix_token_id=model.bos_token_id,
    )
    return scorer.records


if __name__ == "__main__":
    main()
