"""The model that experiments run, the text that it reads, and how it reads it: exactly, and under policies.

The bundle is exported once, calibrated on the text, and kept in the working folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from scripts.bench.testbed import CONFIG, Testbed, place_sensitivity, read_testbed
from scripts.experiments._frame import (
    ROOT,
    TINY,
    Interval,
    Settings,
    Values,
    bootstrap,
    one_at_a_time,
    progress,
    ratio_of_sums,
    write_whole,
)
from wdmoe.bs.airtime import LatencyModel, latency_model
from wdmoe.bs.calibrating import WINDOW, measure_sensitivity
from wdmoe.bs.config import StationConfig, VirtualConfig
from wdmoe.bs.experiment import load_tokenizer
from wdmoe.bs.latency import DeviceLatency
from wdmoe.bs.microbatch import pack_questions
from wdmoe.bs.policies import Exact, Policy, parse_policy
from wdmoe.bs.quality import kl_divergence
from wdmoe.bs.questions import Choice, Question
from wdmoe.bs.records import Record, Summary, summarise
from wdmoe.bs.sensitivity import write_sensitivity
from wdmoe.bs.station import Station
from wdmoe.bs.trace import Recorder, Trace, read_trace, trace_info, write_trace
from wdmoe.bs.virtual import in_this_process, open_virtual_station
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.export.calibration import calibrate_bundle
from wdmoe.export.models import find_checkpoint
from wdmoe.profiles.link_profile import modelled_link
from wdmoe.profiles.modelled import modelled_profile
from wdmoe.runtime.errors import DataError

TESTBED = read_testbed(CONFIG)
SAMPLE = ROOT / "bs" / "data" / "piqa-sample.jsonl"
CONTEXT_TOKENS, SCORED_TOKENS = 16, 48  # of a window of text: about as long as a question of PIQA
_CHARACTERS = 8 * (CONTEXT_TOKENS + SCORED_TOKENS)  # that are tokenised for a window
_CALIBRATION_TOKENS = 4096
_SENSITIVITY_TOKENS = 1024  # which are read once for each block


def texts(settings: Settings) -> dict[str, str]:
    """Return the text to read, by name: training and calibration text, never a row of an evaluation."""
    if settings.data_dir is not None:
        files = sorted((settings.data_dir / "corpus").glob("*.txt"))
        if not files:
            raise DataError(f"{settings.data_dir} has no corpus/*.txt; leave --data-dir out for the bundled questions")
        return {path.name: path.read_text(encoding="utf-8", errors="replace") for path in files}
    rows = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    return {"piqa-sample": "\n\n".join(f"Question: {row['goal']}\nAnswer: {row['sol1']}" for row in rows)}


def bundle(settings: Settings, experts_per_device: int = TESTBED.experts_per_device) -> Path:
    """Return a bundle of the model, exported and calibrated on the text where there is none yet.

    What its blocks mind is the testbed's where the testbed's model is asked for, else it is measured on the text.
    """
    with one_at_a_time(settings.work, "bundle"):
        return _bundle(settings, experts_per_device)


def _bundle(settings: Settings, experts_per_device: int) -> Path:
    if settings.model == TINY:
        import tiny

        checkpoint = settings.work / "tiny-checkpoint"
        if not checkpoint.exists():
            tiny.tiny_checkpoint(checkpoint, "qwen2_moe", max_position_embeddings=512)
    else:
        checkpoint, _ = find_checkpoint(settings.model, progress)
    text = texts(settings)
    target = settings.work / f"bundle-{checkpoint.name}-{'-'.join(map(str, (experts_per_device, len(text))))}"
    if not target.exists():
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        progress(f"exporting {settings.model}, {experts_per_device} experts of each block on a device")
        config = ExportConfig(partial, experts_per_device=experts_per_device)
        export_bundle(plan_export(checkpoint, settings.model, config), config)
        files = [settings.work / f"{target.name}-{name}.txt" for name in text]
        for file, content in zip(files, text.values(), strict=True):
            write_whole(file, content[: 16 * _CALIBRATION_TOKENS].encode())
        calibrate_bundle(partial, files, _CALIBRATION_TOKENS // (8 if settings.short else 1))
        for file in files:
            file.unlink()
        if not place_sensitivity(partial / "bs"):
            _measure_sensitivity(settings, partial, text)
        partial.replace(target)
    return target


def _measure_sensitivity(settings: Settings, folder: Path, text: dict[str, str]) -> None:
    progress("measuring what leaving experts out costs in each block")
    tokens = WINDOW if settings.short else _SENSITIVITY_TOKENS
    of_file = -(-tokens // len(text))
    with open_virtual_station(_config(folder), in_this_process(folder), lambda line: None) as station:
        tokenizer = load_tokenizer(station)
        ids: list[int] = []
        for content in text.values():
            begin = content[: of_file * _CHARACTERS // (CONTEXT_TOKENS + SCORED_TOKENS)]
            ids += tokenizer.encode(begin, add_special_tokens=False).ids[:of_file]
        write_sensitivity(station.folder, measure_sensitivity(station.pipeline, station.manifest, ids[:tokens]))


def _config(folder: Path) -> StationConfig:
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    return StationConfig(folder, wire=TESTBED.wire, threads=threads)


def open_arm(
    settings: Settings, arm: VirtualConfig | None = None, experts_per_device: int = TESTBED.experts_per_device
) -> AbstractContextManager[Station]:
    """Open the bundle in virtual time.

    Args:
        settings: of the experiment.
        arm: devices, links and medium, as `Testbed.arm` gives them; None: only the answers matter.
        experts_per_device: of each block.
    """
    folder = bundle(settings, experts_per_device)
    return open_virtual_station(_config(folder), in_this_process(folder) if arm is None else arm, lambda line: None)


def windows(settings: Settings, station: Station, count: int) -> list[Question]:
    """Cut windows out of the text, evenly spread over its files and over each of them, the same ones every time."""
    tokenizer = load_tokenizer(station)
    content = list(texts(settings).items())
    found: list[Question] = []
    for number in range(count):
        name, text = content[number % len(content)]
        of_file = range(number % len(content), count, len(content))
        start = (number // len(content)) * max(1, len(text) - _CHARACTERS) // len(of_file)
        start = max(0, text.find(" ", start))  # between two words
        ids = tokenizer.encode(text[start : start + _CHARACTERS], add_special_tokens=False).ids
        ids = ids[: CONTEXT_TOKENS + SCORED_TOKENS]
        choice = Choice(tuple(ids[:CONTEXT_TOKENS]), tuple(ids[CONTEXT_TOKENS:]))
        found.append(Question(f"{name}/{start}", (choice,)))
    return found


@dataclass(slots=True)
class Reading:
    """How the windows were read under one policy; lists hold one value for each window."""

    nats: list[float] = field(default_factory=list)  # -log-probability of its scored tokens
    divergence: list[float] = field(default_factory=list)  # mean KL from exact over its scored tokens
    records: list[Record] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)  # tokens

    @property
    def latency_ms(self) -> list[float]:
        """Of each window, in virtual time."""
        return [record.latency_ms for record in self.records]

    @property
    def summary(self) -> Summary:
        """Of all windows."""
        return summarise(self.records)

    def perplexity_ratio(self, exact: Reading) -> Interval:
        """Return this perplexity over the exact one, with its paired interval over windows."""
        more = np.array(self.nats) - np.array(exact.nats)
        tokens = np.array(self.scored)
        return bootstrap(lambda drawn: float(np.exp(more[drawn].sum() / tokens[drawn].sum())), len(more))

    def mean_divergence(self) -> Interval:
        """Return the mean KL from exact a token, in nats."""
        tokens = np.array(self.scored, float)
        return ratio_of_sums((np.array(self.divergence) * tokens).tolist(), tokens.tolist())


def read(station: Station, policies: Sequence[Policy | str], text: Sequence[Question]) -> dict[str, Reading]:
    """Read windows exactly and under each policy, one after another: `exact` and each policy's description."""
    chosen = [parse_policy(policy) if isinstance(policy, str) else policy for policy in policies]
    everyone = {policy.describe(): policy for policy in (Exact(), *chosen)}
    readings = {name: Reading() for name in everyone}
    for number, window in enumerate(text):
        packed = replace(pack_questions([window], station.manifest.model.sliding_window), want_logits=True)
        exact_logits: npt.NDArray[np.float32] | None = None
        for name, policy in everyone.items():
            ((_, result, record),) = station.pipeline.run([packed], policy)
            assert result.logits is not None
            exact_logits = result.logits if exact_logits is None else exact_logits
            reading = readings[name]
            reading.nats.append(-float(result.logprobs.sum(dtype=np.float64)))
            reading.divergence.append(float(kl_divergence(exact_logits, result.logits).mean()))
            reading.records.append(record)
            reading.scored.append(len(result.logprobs))
        if (number + 1) % 16 == 0:
            progress(f"  {number + 1} of {len(text)} windows under {len(everyone)} policies")
    return readings


def compared(readings: dict[str, Reading]) -> dict[str, Values]:
    """Return each reading beside the exact one, as plain values: latency, quality, and what was left out."""
    exact = readings["exact"]
    found: dict[str, Values] = {}
    for name, reading in readings.items():
        summary = reading.summary
        found[name] = {
            "latency_ratio": ratio_of_sums(reading.latency_ms, exact.latency_ms),
            "perplexity_ratio": reading.perplexity_ratio(exact),
            "divergence": reading.mean_divergence(),
            "latency_ms": summary.latency_mean_ms,
            "dropped_share": summary.dropped_share,
            "pairs_per_token": (summary.pairs - summary.dropped) / summary.tokens / len(reading.records[0].blocks),
            "gate_mass_dropped": summary.gate_mass_dropped,
            "theta": summary.theta_mean,
        }
    return found


def reaches_bar(values: Values) -> bool:
    """Say whether a policy reaches the testbed's bar of quality, by its perplexity ratio and its divergence."""
    bars = TESTBED.bars
    reached = values["perplexity_ratio"][0] <= bars.perplexity_ratio and values["divergence"][0] <= bars.divergence
    return bool(reached)


def trace(settings: Settings, count: int) -> Trace:
    """Return what the routers say to `count` windows; recorded once and kept."""
    path = bundle(settings).with_name(f"{bundle(settings).name}-trace-{count}.npz")
    with one_at_a_time(settings.work, path.stem):
        if not path.exists():
            progress(f"recording what routers say to {count} windows of text")
            _record(settings, count, path)
    return read_trace(path)


def _record(settings: Settings, count: int, path: Path) -> None:
    with open_arm(settings) as station:
        model = station.manifest.model
        recorder = Recorder(model.n_blocks, model.top_k)
        station.pipeline.on_router = recorder.on_router
        for window in windows(settings, station, count):
            list(station.pipeline.run([pack_questions([window], model.sliding_window)], Exact()))
        placement = np.array([[holders[0] for holders in block] for block in station.manifest.placement])
        info = trace_info(station, {"text": count}, {})
        write_trace(path, recorder.trace(info, placement))


def devices(
    hardware: Sequence[str], efficiency: Sequence[float], testbed: Testbed = TESTBED, up_to: int = 1024
) -> LatencyModel:
    """Return the latency model of devices on a radio, each with the whole band, charged as the testbed charges.

    Args:
        hardware: names of modules.
        efficiency: bit/s/Hz of each, both ways.
        testbed: says shape, precision, band and round trip.
        up_to: the most tokens of a call.
    """
    curves = [modelled_profile(name, testbed.cost_precision, testbed.shape).curve() for name in hardware]
    model = latency_model([DeviceLatency(curve, testbed.round_trip_ms) for curve in curves], up_to)
    form = "radio:mhz={:g}:efficiency={:g}:rtt_ms={:g}"
    links = [modelled_link(form.format(testbed.bandwidth_mhz, e, testbed.round_trip_ms)) for e in efficiency]
    row_bytes = 2.0 * testbed.shape.d_model
    down, up = (np.array([getattr(link, way)(row_bytes) for link in links]) for way in ("down_ms", "up_ms"))
    return model.with_rates(down, up)
