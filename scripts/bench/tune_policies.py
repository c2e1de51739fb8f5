"""Which options each policy should have on the testbed, found on training text alone: never on valid or test rows.

    python scripts/bench/tune_policies.py --data-dir DIR --model PATH --json FILE

What blocks lose is measured first (as wdmoe-bs calibrate does) and kept in `testbed_sensitivity.json`, which testbed.py puts
beside its bundle. Then each family of options has one number to find: the largest at which KL on the text is at most 0.015 nats
and the perplexity ratio at most 1.015, by bisection, on one arm of the testbed; and it is read once more on every arm that
counts, for latency and quality there. Text comes in pieces as long as a question. Times are modelled. Every reading is kept in
FILE, so that the same command goes on where it stopped. Prints the TOML lines to paste into testbed.toml.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
from processes import exit_on_sigterm

from scripts.bench._environment import environment, progress, write_json
from scripts.bench.testbed import CONFIG, COUNTED, SENSITIVITY, Testbed, place_sensitivity, placed_bundle, read_testbed
from wdmoe.bs.calibrating import measure_sensitivity
from wdmoe.bs.config import StationConfig
from wdmoe.bs.experiment import load_tokenizer
from wdmoe.bs.microbatch import Result, pack_questions
from wdmoe.bs.policies import Exact, Policy, parse_policy
from wdmoe.bs.quality import kl_divergence
from wdmoe.bs.questions import Choice, Question
from wdmoe.bs.sensitivity import write_sensitivity
from wdmoe.bs.station import Station
from wdmoe.bs.virtual import in_this_process, open_virtual_station

MARGIN_KL, MARGIN_RATIO = 0.015, 1.015
SEARCHED = ("5:5:5", "shared")  # where a row saves least
WINDOW, EVERY = 64, 2  # tokens of a piece; of two rows one is compared
# Of each family: how it is written, and the numbers between which it is searched; more leaves out more.
FAMILIES: tuple[tuple[str, float, float], ...] = (
    ("wlr:gamma=1,alpha={x:.3g}", 0.3, 1.0),
    ("wlr:alpha=1,loss={x:.3g}", 1e-3, 0.1),
    ("ser:t={x:.3g}", 0.01, 1.0),
    ("ser:t=1,loss={x:.3g}", 1e-3, 0.1),
    ("top-cut:pairs=true,loss={x:.3g}", 1e-3, 0.1),
    ("capacity:factor=0.6,loss={x:.3g}", 1e-3, 0.1),
    ("bottleneck:budget={x:.3g}", 0.005, 0.3),
    ("bottleneck:loss={x:.3g}", 1e-3, 0.1),
    ("bottleneck:loss={x:.3g},renormalise=false", 1e-3, 0.1),
    ("bottleneck:loss={x:.3g},protect=false", 1e-3, 0.1),
)


@dataclass(frozen=True)
class Exactly:
    """Pieces of text, and what the model says to them exactly."""

    questions: Sequence[Question]
    logits: Sequence[np.ndarray]
    latency_ms: float  # mean of a piece


def read(station: Station, question: Question, policy: Policy) -> tuple[Result, float]:
    """Read one piece; its result with the logits that are compared, and its latency."""
    whole = pack_questions([question], station.manifest.model.sliding_window)
    none = np.empty(0, np.int64)
    part = replace(whole, head_rows=whole.head_rows[::EVERY], target_rows=none, target_ids=none, want_logits=True)
    ((_, result, record),) = station.pipeline.run([part], policy)
    return result, record.latency_ms


def exactly(station: Station, questions: Sequence[Question]) -> Exactly:
    """Read all pieces exactly."""
    found = [read(station, question, Exact()) for question in questions]
    logits = [result.logits for result, _ in found if result.logits is not None]
    return Exactly(questions, logits, float(np.mean([ms for _, ms in found])))


def compare(station: Station, exact: Exactly, policy: Policy) -> dict[str, float]:
    """Read all pieces under a policy: KL, perplexity ratio, latency gained."""
    divergence, gap, latency_ms = [], [], []
    for question, theirs in zip(exact.questions, exact.logits, strict=True):
        result, ms = read(station, question, policy)
        assert result.logits is not None
        latency_ms.append(ms)
        divergence.append(kl_divergence(theirs, result.logits))
        targets = np.array(question.choices[0].continuation)[::EVERY]
        gap.append(_likelihoods(theirs, targets) - _likelihoods(result.logits, targets))
    return {
        "divergence": float(np.concatenate(divergence).mean()),
        "perplexity_ratio": math.exp(float(np.concatenate(gap).mean())),
        "gain": 1.0 - float(np.mean(latency_ms)) / exact.latency_ms,
    }


def reaches(found: dict[str, float]) -> bool:
    """Whether a reading is within the bar less its margin."""
    return found["divergence"] <= MARGIN_KL and found["perplexity_ratio"] <= MARGIN_RATIO


def pieces(tokenizer: Any, texts: Sequence[str], tokens: int, bos: int | None) -> list[Question]:
    """Cut texts into pieces of `WINDOW` tokens, as many of each."""
    first = () if bos is None else (bos,)
    questions = []
    for number, text in enumerate(texts):
        ids = tokenizer.encode(text).ids[: tokens // len(texts)]
        for at in range(0, len(ids) - WINDOW + 1, WINDOW):
            choice = Choice((*first, ids[at]), tuple(ids[at + 1 : at + WINDOW]))
            questions.append(Question(f"text {number}/{at}", (choice,)))
    return questions


def _likelihoods(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    chosen = shifted[np.arange(len(targets)), targets]
    result: np.ndarray = chosen - np.log(np.exp(shifted).sum(axis=1, dtype=np.float64))
    return result


class Readings:
    """What was read already, kept in a file as it grows."""

    def __init__(self, path: Path | None, key: str) -> None:
        self._path, self._key = path, key
        self.found: dict[str, dict[str, float]] = {}
        if path is not None and path.exists():
            kept = json.loads(path.read_text())
            self.found = kept.get("readings", {}) if kept.get("key") == key else {}

    def of(self, station: Station, exact: Exactly, arm: str, text: str) -> dict[str, float]:
        """Return the reading of a policy on an arm; reads only what is not known."""
        name = f"{arm}: {text}"
        if name not in self.found:
            self.found[name] = compare(station, exact, parse_policy(text))
            self.keep({})
            progress(f"{name}: " + ", ".join(f"{k} {v:.4f}" for k, v in self.found[name].items()))
        return self.found[name]

    def keep(self, more: dict[str, Any]) -> dict[str, Any]:
        """Write everything."""
        result = {"key": self._key, "readings": self.found, **more}
        if self._path is not None:
            write_json(str(self._path), result)
        return result


def largest(readings: Readings, station: Station, exact: Exactly, family: tuple[str, float, float], probes: int) -> str:
    """Find the family's largest number that reaches the bar, by bisection of its logarithm; the least if none does."""
    form, low, high = family
    arm = ", ".join(SEARCHED)
    if reaches(readings.of(station, exact, arm, form.format(x=high))):
        return form.format(x=high)
    for _ in range(probes):
        middle = math.sqrt(low * high)
        if reaches(readings.of(station, exact, arm, form.format(x=middle))):
            low = middle
        else:
            high = middle
    return form.format(x=low)


def tune(testbed: Testbed, bundle: Path, questions: Sequence[Question], readings: Readings, probes: int) -> list[Any]:
    """Find the options of each family, then read them on every arm that counts."""

    def arm_of(efficiency: str, medium: str) -> Any:
        return open_virtual_station(
            StationConfig(bundle, wire=testbed.wire), testbed.arm(efficiency, medium), lambda text: None
        )

    with arm_of(*SEARCHED) as station:
        exact = exactly(station, questions)
        texts = [largest(readings, station, exact, family, probes) for family in FAMILIES]
    reached: dict[str, list[dict[str, float]]] = {text: [] for text in texts}
    for efficiency in testbed.efficiencies:
        for medium in COUNTED:
            with arm_of(efficiency, medium) as station:
                exact = exactly(station, questions)
                for text, arms in reached.items():
                    arms.append(readings.of(station, exact, f"{efficiency}, {medium}", text))
    rows = [
        {
            "policy": text,
            "least_gain": min(arm["gain"] for arm in arms),
            "worst_divergence": max(arm["divergence"] for arm in arms),
            "worst_perplexity_ratio": max(arm["perplexity_ratio"] for arm in arms),
            "within_margin": all(map(reaches, arms)),
        }
        for text, arms in reached.items()
    ]
    return sorted(rows, key=lambda row: (not row["within_margin"], -float(str(row["least_gain"]))))


def chosen(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Take the best of each policy, in the order they come."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        best.setdefault(row["policy"].partition(":")[0], row)
    return list(best.values())


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path, exists=True), required=True, help="With `corpus`.")
@click.option("--model", help="Instead of the testbed's; tiny: a random one.")
@click.option(
    "--tokens", type=int, default=2048, show_default=True, help="Of the text that is read for each candidate."
)
@click.option("--calibration-tokens", type=int, default=1024, show_default=True, help="Read once for each block.")
@click.option("--probes", type=int, default=4, show_default=True, help="Bisection steps of each family.")
@click.option("--sensitivity", type=click.Path(path_type=Path), default=SENSITIVITY, show_default=True)
@click.option("--only-calibrate", is_flag=True, help="Measure what blocks lose, and search nothing.")
@click.option("--json", "target", type=click.Path(path_type=Path, dir_okay=False), help="Keep readings and result.")
def main(
    data_dir: Path,
    model: str | None,
    tokens: int,
    calibration_tokens: int,
    probes: int,
    sensitivity: Path,
    only_calibrate: bool,
    target: Path | None,
) -> None:
    """Search the options of every policy on corpus text."""
    exit_on_sigterm()
    started_s = time.perf_counter()
    testbed = read_testbed(CONFIG)
    corpus = [(data_dir / "corpus" / name).read_text()[: 20 * tokens] for name in ("qa_train.txt", "classic_books.txt")]
    calibration = (data_dir / "corpus" / "qa_train.txt").read_text()[-20 * calibration_tokens :]
    with placed_bundle(model or testbed.model, testbed) as bundle:
        place_sensitivity(bundle / "bs", sensitivity)
        with open_virtual_station(StationConfig(bundle), in_this_process(bundle), lambda text: None) as station:
            spec, tokenizer = station.manifest, load_tokenizer(station)
            questions = pieces(tokenizer, corpus, tokens, spec.model.bos_token_id)
            asked = [spec.bundle_id, tokens, calibration_tokens, corpus, msgspec.to_builtins(testbed.efficiencies)]
            key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
            readings = Readings(target, key)
            if only_calibrate or not readings.found or station.pipeline.sensitivity is None:
                ids = tokenizer.encode(calibration).ids[:calibration_tokens]
                found = measure_sensitivity(station.pipeline, spec, ids)
                write_sensitivity(station.folder, found)
                sensitivity.write_bytes((station.folder / "sensitivity.json").read_bytes())
                readings.found.clear()
                progress(f"calibrated in {time.perf_counter() - started_s:.0f} s; wrote {sensitivity}")
        if only_calibrate:
            return
        rows = tune(testbed, bundle, questions, readings, probes)
    for row in rows:
        progress(", ".join(f"{k} {v:.4f}" if isinstance(v, float) else str(v) for k, v in row.items()))
    lines = [
        f'    "{row["policy"]}",  # gain >= {row["least_gain"]:.3f}, KL <= {row["worst_divergence"]:.4f}, '
        f"perplexity ratio <= {row['worst_perplexity_ratio']:.4f}{'' if row['within_margin'] else ': misses the margin'}"
        for row in chosen(rows)
    ]
    click.echo("\n".join(["policies = [", *lines, "]"]))
    readings.keep(
        {"policies": rows, "took_s": time.perf_counter() - started_s, **environment(("numpy", "onnxruntime"))}
    )


if __name__ == "__main__":
    main()
