"""What a policy gains on the pinned testbed (testbed.toml): real answers, three unequal emulated devices, virtual time.

    python scripts/bench/testbed.py --data-dir DIR --json -

Arms: exact and every policy, on a work-conserving shared channel and on bandwidth divided uniformly, statically and for
each block, at two sets of spectral efficiencies; one question at a time, and, apart from it, under saturated load. The
same rows, tries and number in flight in every arm. The best policy is the one with the largest lesser gain among those
that reach the quality bar in every arm that counts: perplexity and KL there, and, in the arm where its KL is worst, accuracy
over the rows of five sets together (judged where there are 5,000 of them). `policy_gain_shared` and `policy_gain_perblock` are its gains over
exact on the same medium, the lesser of both sets of efficiencies; `total_vs_uniform` is it with bandwidth for each block
over exact with uniform bandwidth (the paper's 0.4575 is of that kind). The same three stand beside for wlr. All times are
modelled: this compares policies, and validates the code and not the radio. With a FILE, finished arms are kept in
FILE.unfinished, and the same command goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
import msgspec
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
import tiny
from processes import exit_on_sigterm

from scripts.bench._environment import environment, progress, write_json
from scripts.bench._kept import Kept
from scripts.bench._pool import pooled_accuracy, sets_at_hand
from wdmoe.bs.airtime import latency_model
from wdmoe.bs.config import StationConfig, VirtualConfig
from wdmoe.bs.evaluation import LoadedTask, evaluate, load_task, paired_difference
from wdmoe.bs.experiment import load_tokenizer, max_length
from wdmoe.bs.latency import DeviceLatency
from wdmoe.bs.microbatch import pack_sequence
from wdmoe.bs.policies import Exact, Policy, parse_policy
from wdmoe.bs.quality import ComparingScorer, RecordedScorer, text_windows
from wdmoe.bs.questions import Question
from wdmoe.bs.records import Record, summarise
from wdmoe.bs.scoring import DistributedScorer
from wdmoe.bs.simulation import Site, block_loads, holders_of, static_shares
from wdmoe.bs.stages import new_cache
from wdmoe.bs.station import Station
from wdmoe.bs.trace import Recorder, trace_info
from wdmoe.bs.virtual import in_this_process, open_virtual_station
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.export.models import find_checkpoint
from wdmoe.profiles.modelled import ExpertShape, modelled_profile
from wdmoe.runtime.manifest import SENSITIVITY_NAME, BsManifest, read_manifest
from wdmoe.runtime.messages import Wire

CONFIG = Path(__file__).with_suffix(".toml")
SENSITIVITY = CONFIG.with_name("testbed_sensitivity.json")  # scripts/bench/tune_policies.py made it of training text
TINY = "tiny"
COUNTED = ("shared", "per-block")  # media whose gains have a bar: quality is judged there
FIT_TOKENS, FIT_WINDOWS = 48, 40


class Bars(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is to be reached."""

    policy_gain_shared: float
    policy_gain_perblock: float
    perplexity_ratio: float
    divergence: float
    pooled_points: float
    pooled_rows: int


class Testbed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """testbed.toml."""

    model: str
    experts_per_device: int
    devices: tuple[str, ...]
    cost_shape: str
    cost_precision: str
    wire: Wire
    bandwidth_mhz: float
    round_trip_ms: float
    stage_ms: float
    in_flight: int
    rows: int
    saturated_rows: int
    text_tokens: int
    pool_sets: tuple[str, ...]
    pool_rows: int
    policies: tuple[str, ...]
    media: tuple[str, ...]
    efficiencies: dict[str, tuple[float, ...]]
    static_shares: dict[str, tuple[float, ...]]
    bars: Bars

    @property
    def shape(self) -> ExpertShape:
        """What is charged for."""
        d_model, d_ff = map(int, self.cost_shape.split("x"))
        return ExpertShape(d_model, d_ff)

    def links(self, efficiency: str) -> tuple[str, ...]:
        """Return each device's link with the whole band."""
        form = "radio:mhz={:g}:efficiency={:g}:rtt_ms={:g}"
        return tuple(form.format(self.bandwidth_mhz, e, self.round_trip_ms) for e in self.efficiencies[efficiency])

    def arm(self, efficiency: str, medium: str) -> VirtualConfig:
        """Return devices and medium of an arm."""
        shares = ",".join(map(str, self.static_shares[efficiency]))
        return VirtualConfig(
            self.devices,
            self.links(efficiency),
            "shared" if medium == "shared" else "orthogonal",
            {"shared": None, "static": shares}.get(medium, medium),
            self.shape,
            self.cost_precision,
            self.stage_ms,
        )


def read_testbed(path: Path) -> Testbed:
    """Read testbed.toml; says which field is wrong."""
    try:
        return msgspec.toml.decode(path.read_bytes(), type=Testbed)
    except msgspec.MsgspecError as error:
        raise click.ClickException(f"{path}: {error}") from error


@contextmanager
def placed_bundle(model: str, testbed: Testbed) -> Iterator[Path]:
    """Export the model for the testbed's devices."""
    with tempfile.TemporaryDirectory(prefix="wdmoe-testbed-") as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        if model == TINY:
            tiny.tiny_checkpoint(checkpoint, "qwen2_moe", max_position_embeddings=512)
        else:
            checkpoint, _ = find_checkpoint(model, progress)
        config = ExportConfig(Path(scratch) / "bundle", experts_per_device=testbed.experts_per_device)
        export_bundle(plan_export(checkpoint, model, config), config)
        if not place_sensitivity(config.out / "bs"):
            progress(f"no {SENSITIVITY.name} of this bundle; policies with loss= need scripts/bench/tune_policies.py")
        yield config.out


def place_sensitivity(folder: Path, source: Path = SENSITIVITY) -> bool:
    """Put what was calibrated for the pinned model beside its manifest; of another model it is worth nothing."""
    if not source.exists():
        return False
    if json.loads(source.read_text())["bundle_id"] != read_manifest(folder, BsManifest).bundle_id:
        return False
    (folder / SENSITIVITY_NAME).write_bytes(source.read_bytes())
    return True


def one_at_a_time(
    station: Station, policies: Sequence[Policy], task: LoadedTask, rows: int, text: Sequence[Question]
) -> dict[str, Any]:
    """Answer rows and read text under exact and each policy; latency, accuracy and distance from exact of each."""
    model, tokenizer = station.manifest.model, load_tokenizer(station)
    everyone = [Exact(), *policies]
    comparing = ComparingScorer(station.pipeline, everyone, model.sliding_window)

    def judged(scorer: Any) -> Any:
        return evaluate(
            task, scorer, tokenizer, max_length=max_length(station), limit=rows, prefix_token_id=model.bos_token_id
        )

    exact = judged(comparing)
    likelihoods = {policy.describe(): _likelihood(station, policy, text) for policy in everyone}
    tokens = sum(len(question.choices[0].continuation) for question in text)
    found: dict[str, Any] = {}
    for policy in everyone:
        name = policy.describe()
        compared = comparing.part.policies[name]
        evaluation = judged(RecordedScorer(compared.answers))
        difference = paired_difference(evaluation, exact)
        found[name] = {
            **_times(compared.records),
            "accuracy": evaluation.metrics["acc"],
            "accuracy_minus_exact_points": difference.mean_points,
            "interval_points": [end if math.isfinite(end) else None for end in difference.interval_points],
            "divergence": compared.divergence.mean,
            "perplexity_ratio": math.exp((likelihoods["exact"] - likelihoods[name]) / tokens) if tokens else None,
        }
    return found


def saturated(station: Station, policies: Sequence[Policy], task: LoadedTask, rows: int) -> dict[str, Any]:
    """Answer rows with several in flight under exact and each policy."""
    model, tokenizer = station.manifest.model, load_tokenizer(station)
    found: dict[str, Any] = {}
    for policy in (Exact(), *policies):
        scorer = DistributedScorer(station.pipeline, policy, station.config.in_flight, model.sliding_window)
        started_s = station.hub.clock.now_s()
        evaluation = evaluate(
            task, scorer, tokenizer, max_length=max_length(station), limit=rows, prefix_token_id=model.bos_token_id
        )
        took_s = station.hub.clock.now_s() - started_s
        found[policy.describe()] = {
            **_times(scorer.records),
            "questions_per_s": len(scorer.records) / took_s,
            "accuracy": evaluation.metrics["acc"],
        }
    return found


def verdict(
    testbed: Testbed,
    alone: dict[str, dict[str, dict[str, Any]]],
    pools: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Draw the gains and the best policy out of the arms.

    Args:
        testbed: with its bars.
        alone: by "efficiency, medium", by policy: `one_at_a_time`.
        pools: pooled accuracy of those policies that it was measured for.
    """
    names = [parse_policy(policy).describe() for policy in testbed.policies]

    def gain(name: str, efficiency: str, medium: str, against: str) -> float:
        theirs = alone[f"{efficiency}, {against}"]["exact"]["latency_mean_ms"]
        return 1.0 - float(alone[f"{efficiency}, {medium}"][name]["latency_mean_ms"]) / float(theirs)

    def gains(name: str) -> dict[str, dict[str, float]]:
        return {
            efficiency: {
                "shared": gain(name, efficiency, "shared", "shared"),
                "perblock": gain(name, efficiency, "per-block", "per-block"),
                "total_vs_uniform": gain(name, efficiency, "per-block", "uniform"),
            }
            for efficiency in testbed.efficiencies
        }

    def lesser(name: str, kind: str) -> float:
        return min(by_kind[kind] for by_kind in gains(name).values())

    # Only `wlr` by its first entry stands beside; the others compete.
    wlr = next((name for name in names if name.partition(":")[0] == "wlr"), None)

    def reaches(name: str) -> bool:
        arms = [alone[f"{efficiency}, {medium}"][name] for efficiency in testbed.efficiencies for medium in COUNTED]
        return all(
            arm["perplexity_ratio"] is not None
            and arm["perplexity_ratio"] <= testbed.bars.perplexity_ratio
            and arm["divergence"] <= testbed.bars.divergence
            for arm in arms
        )

    at_bar = [name for name in names if reaches(name) and pools.get(name, {}).get("reached") is not False]
    ranked = sorted(at_bar, key=lambda name: -min(lesser(name, "shared"), lesser(name, "perblock")))
    best = ranked[0] if ranked else None
    result: dict[str, Any] = {"best_policy": best, "at_quality_bar": at_bar, "pooled_accuracy": dict(pools)}
    for prefix, name in (("", best), ("wlr_", wlr)):
        for key, kind in (
            ("policy_gain_shared", "shared"),
            ("policy_gain_perblock", "perblock"),
            ("total_vs_uniform", "total_vs_uniform"),
        ):
            result[prefix + key] = None if name is None else lesser(name, kind)
    result["gains"] = {name: gains(name) for name in names}
    result["bandwidth_alone_vs_uniform"] = {e: gain("exact", e, "per-block", "uniform") for e in testbed.efficiencies}
    result["paper_total_vs_uniform"] = 0.4575
    result["bars"] = msgspec.to_builtins(testbed.bars)
    result["missed"] = ["no policy reaches the quality bar"] if best is None else []
    for key in ("policy_gain_shared", "policy_gain_perblock"):
        if best is not None and result[key] < (bar := getattr(testbed.bars, key)):
            result["missed"].append(f"{key} of {best} is {result[key]:.3f}, expected at least {bar:g}")
    result["passed"] = not result["missed"]
    return result


def judge_pools(
    testbed: Testbed,
    bundle: Path,
    alone: dict[str, dict[str, dict[str, Any]]],
    data_dir: Path | None,
    jobs: int,
    kept: Kept,
) -> dict[str, dict[str, Any]]:
    """Measure the pooled accuracy of the best policy; of the next one if it misses the bar, and so on."""
    pools: dict[str, dict[str, Any]] = {}
    if not (testbed.pool_rows and (tasks := sets_at_hand(testbed.pool_sets, data_dir))):
        return pools
    spelt = {parse_policy(policy).describe(): policy for policy in testbed.policies}
    counted = [(efficiency, medium) for efficiency in testbed.efficiencies for medium in COUNTED]
    config = StationConfig(bundle, wire=testbed.wire, threads=1)
    while (best := verdict(testbed, alone, pools)["best_policy"]) is not None and best not in pools:
        name = best
        worst = max(counted, key=lambda arm: float(alone[f"{arm[0]}, {arm[1]}"][name]["divergence"]))
        found = pooled_accuracy(
            config, testbed.arm(*worst), spelt[best], tasks, data_dir, testbed.pool_rows, jobs, kept.parts, kept.add
        )
        judged = found["rows"] >= testbed.bars.pooled_rows
        reached = found["interval_points"][0] >= testbed.bars.pooled_points
        pools[best] = {"arm": ", ".join(worst), **found, "judged": judged, "reached": reached if judged else None}
        low, high = found["interval_points"]
        progress(
            f"{best}: {found['points']:+.2f} points ({low:+.2f} to {high:+.2f}) over {found['rows']} rows of "
            f"{len(tasks)} sets" + ("" if judged else f"; not judged under {testbed.bars.pooled_rows} rows")
        )
    return pools


def fitted_shares(bundle: Path, testbed: Testbed, text: str) -> dict[str, list[float]]:
    """Fit the static shares to what exact asks for on training text, by efficiency."""
    with open_virtual_station(StationConfig(bundle), in_this_process(bundle), progress) as station:
        model = station.manifest.model
        ids = load_tokenizer(station).encode(text).ids
        recorder = Recorder(model.n_blocks, model.top_k)
        station.pipeline.on_router = recorder.on_router
        for start in range(0, min(len(ids), FIT_TOKENS * FIT_WINDOWS) - FIT_TOKENS + 1, FIT_TOKENS):
            cache = new_cache(station.manifest, FIT_TOKENS)
            part = pack_sequence("fit", ids[start : start + FIT_TOKENS], cache, model.sliding_window)
            list(station.pipeline.run([part], Exact()))
        placement = np.array([[holders[0] for holders in block] for block in station.manifest.placement])
        trace = recorder.trace(trace_info(station, {}, {}), placement)
    shares: dict[str, list[float]] = {}
    for efficiency in testbed.efficiencies:
        links = testbed.arm(efficiency, "shared").profiles
        curves = [modelled_profile(name, testbed.cost_precision, testbed.shape).curve() for name in testbed.devices]
        devices = latency_model([DeviceLatency(curve, testbed.round_trip_ms) for curve in curves], FIT_TOKENS)
        row_bytes = 2.0 * testbed.shape.d_model
        down, up = (
            np.array([way(row_bytes) for way in ways])
            for ways in zip(*((k.down_ms, k.up_ms) for k in links), strict=True)
        )
        site = Site(devices.with_rates(down, up), holders_of(placement))
        found = static_shares(*block_loads(trace, site, range(trace.n_questions)))
        shares[efficiency] = [round(float(share), 3) for share in found / found.sum()]
    return shares


def _likelihood(station: Station, policy: Policy, text: Sequence[Question]) -> float:
    scorer = DistributedScorer(station.pipeline, policy, 1, station.manifest.model.sliding_window)
    return math.fsum(answer.log_likelihoods[0] for answer in scorer.score(text)) if text else 0.0


def _times(records: Sequence[Record]) -> dict[str, float]:
    summary = summarise(records)
    keys = ("questions", "latency_mean_ms", "latency_p50_ms", "latency_p95_ms", "waiting_ms", "dropped_share")
    return {key: getattr(summary, key) for key in (*keys, "gate_mass_dropped", "bytes_down", "bytes_up")}


@click.command()
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, allow_dash=True), help="Keep the result; - prints it."
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, exists=True),
    help="With piqa, wikitext2 and what else is to be pooled; else the hub.",
)
@click.option("--dataset", default="piqa", show_default=True)
@click.option("--rows", type=int, help="Of the data set, one at a time.  [default: the testbed's]")
@click.option("--saturated-rows", type=int, help="The same under saturated load; 0 leaves it out.")
@click.option("--text-tokens", type=int, help="Of the perplexity; 0 leaves it out, and nothing reaches the bar.")
@click.option("--pool-rows", type=int, help="Of each set of the pooled accuracy; 0 leaves it out.")
@click.option("--policy", "policies", multiple=True, help="Instead of the testbed's.")
@click.option("--model", help="Instead of the testbed's; tiny: a random one.")
@click.option("--jobs", type=click.IntRange(min=1), default=2, show_default=True, help="Arms at a time, a thread each.")
@click.option("--fit", type=click.Path(path_type=Path, exists=True), help="Only fit the static shares to this text.")
def main(
    target: str | None,
    data_dir: Path | None,
    dataset: str,
    rows: int | None,
    saturated_rows: int | None,
    text_tokens: int | None,
    pool_rows: int | None,
    policies: Sequence[str],
    model: str | None,
    jobs: int,
    fit: Path | None,
) -> None:
    """Compare policies on the pinned testbed; exit code 1 if the best misses a bar."""
    exit_on_sigterm()
    testbed = read_testbed(CONFIG)
    given = {
        "rows": rows, "saturated_rows": saturated_rows, "text_tokens": text_tokens, "pool_rows": pool_rows, "model": model,
    }  # fmt: skip
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    changed |= {"policies": tuple(policies)} if policies else {}
    testbed = msgspec.structs.replace(testbed, **changed)
    for policy in testbed.policies:
        parse_policy(policy)  # refused before anything is made
    with placed_bundle(testbed.model, testbed) as bundle:
        if fit is not None:
            click.echo(json.dumps(fitted_shares(bundle, testbed, fit.read_text()[: 20 * FIT_TOKENS * FIT_WINDOWS])))
            return
        digest = load_task(dataset, data_dir).digest(testbed.rows)
        key = hashlib.sha256(msgspec.json.encode(testbed) + digest.encode()).hexdigest()
        kept = Kept(target, key)
        left = [arm for arm in arms_of(testbed) if arm.name not in kept.parts]
        for arm, found in run_arms(testbed, bundle, left, dataset, data_dir, jobs):
            kept.add(arm.name, found)
        modes = {
            mode: {n.partition(": ")[2]: arm for n, arm in kept.parts.items() if n.startswith(mode)}
            for mode in ("alone", "saturated")
        }
        pools = judge_pools(testbed, bundle, modes["alone"], data_dir, jobs, kept)
    result = {
        **verdict(testbed, modes["alone"], pools),
        "origin": "emulated devices and links in virtual time; answers are real, times are modelled",
        "changed": changed,
        "dataset": dataset,
        "rows_digest": digest,
        "testbed": msgspec.to_builtins(testbed),
        "one_at_a_time": modes["alone"],
        "saturated": modes["saturated"],
        **environment(("numpy", "onnxruntime", "lm-eval")),
    }
    gains = ", ".join(f"{k} {result[k]}" for k in ("policy_gain_shared", "policy_gain_perblock", "total_vs_uniform"))
    progress(f"best at the quality bar: {result['best_policy']}; {gains}")
    for miss in result["missed"]:
        progress(f"missed: {miss}")
    if target is not None:
        write_json(target, result)
        kept.remove()
    sys.exit(0 if result["passed"] else 1)


@dataclass(frozen=True, slots=True)
class Arm:
    """One efficiency on one medium, one question at a time or several."""

    mode: str  # alone or saturated
    efficiency: str
    medium: str

    @property
    def name(self) -> str:
        """As in the result."""
        return f"{self.mode}: {self.efficiency}, {self.medium}"


def arms_of(testbed: Testbed) -> list[Arm]:
    """List all arms, those that take longest first."""
    modes = ("alone", "saturated") if testbed.saturated_rows else ("alone",)
    arms = [Arm(mode, one, medium) for mode in modes for one in testbed.efficiencies for medium in testbed.media]
    return sorted(arms, key=lambda arm: (arm.mode != "alone", arm.medium not in COUNTED))


def run_arms(
    testbed: Testbed, bundle: Path, arms: Sequence[Arm], dataset: str, data_dir: Path | None, jobs: int
) -> Iterator[tuple[Arm, dict[str, Any]]]:
    """Run exact and the policies in arms, some at a time, each in a process with one thread; yield what is done."""
    run = partial(run_arm, testbed, bundle, dataset, data_dir)
    with multiprocessing.get_context("spawn").Pool(min(jobs, max(1, len(arms)))) as pool:
        yield from pool.imap_unordered(run, arms)


def run_arm(
    testbed: Testbed, bundle: Path, dataset: str, data_dir: Path | None, arm: Arm
) -> tuple[Arm, dict[str, Any]]:
    """Run exact and the policies in one arm."""
    task, policies = load_task(dataset, data_dir), [parse_policy(policy) for policy in testbed.policies]
    started_s = time.perf_counter()
    config = StationConfig(
        bundle, wire=testbed.wire, in_flight=1 if arm.mode == "alone" else testbed.in_flight, threads=1
    )
    with open_virtual_station(config, testbed.arm(arm.efficiency, arm.medium), lambda text: None) as station:
        if arm.mode == "alone":
            text = []
            if arm.medium in COUNTED and testbed.text_tokens:
                text = text_windows(
                    load_task("wikitext2", data_dir),
                    load_tokenizer(station),
                    max_length=max_length(station),
                    tokens=testbed.text_tokens,
                    prefix_token_id=station.manifest.model.bos_token_id,
                )
            found = one_at_a_time(station, policies, task, testbed.rows, text)
        else:
            found = saturated(station, policies, task, testbed.saturated_rows)
    means = ", ".join(f"{policy} {entry['latency_mean_ms']:.0f}" for policy, entry in found.items())
    progress(f"{arm.name}: ms a question: {means} ({time.perf_counter() - started_s:.0f} s)")
    return arm, found


if __name__ == "__main__":
    main()
