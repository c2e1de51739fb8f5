"""The short form of every experiment; that findings follow the numbers; and how a run keeps, repeats and reports."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from short_experiments import short_result

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))
pytest.importorskip("tomllib")
for needed in ("onnxruntime", "matplotlib", "lm_eval"):
    pytest.importorskip(needed, reason="needs the extras `eval` and `cpu`")

from scripts.experiments._frame import bootstrap, ratio_of_sums, spell
from scripts.experiments._run import FINDINGS, WALL_TIMES, modules, wall_times, with_findings

RUN = ROOT / "scripts" / "experiments" / "_run.py"
PNG = b"\x89PNG\r\n\x1a\n"
Results = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def result(experiments_work: Path) -> Results:
    """Run an experiment in its short form, once; return its result."""
    return lambda name: short_result(name, experiments_work)


@pytest.mark.parametrize("name", modules())
def test_the_short_form_makes_a_result_and_a_plot(name: str, result: Results, experiments_work: Path) -> None:
    found = result(name)
    assert found["origin"].startswith("emulated") and found["short"] and found["experiment"] == name
    plot = (experiments_work / f"{name}.png").read_bytes()
    assert plot.startswith(PNG) and len(plot) < 80_000
    assert not list(experiments_work.glob("*.partial*"))
    # What is said comes from the values that are kept, and from nothing else.
    module = importlib.import_module(f"scripts.experiments.{name}")
    assert module.finding(found["values"]) == found["finding"]


@pytest.mark.parametrize("name", modules())
def test_every_experiment_has_its_place_on_the_page(name: str) -> None:
    page = FINDINGS.read_text()
    assert f"<!-- finding: {name} -->" in page and f"(plots/{name}.png)" in page and f"{name}.py" in page


def change(values: dict[str, Any], *path: str | int, to: Any) -> dict[str, Any]:
    """Return the values with one of them replaced."""
    changed = copy.deepcopy(values)
    inner: Any = changed
    for key in path[:-1]:
        inner = inner[key]
    assert inner[path[-1]] != to
    inner[path[-1]] = to
    return changed


@pytest.mark.parametrize(
    ("name", "path", "to", "said"),
    [
        ("e01_one_layer", ("fleets", "two devices", "round_robin_over_exact"), [1.5, 1.4, 1.6], "1.50 [1.40, 1.60]"),
        ("e02_wlr", ("by_alpha", 0, "divergence"), [0.5, 0.4, 0.6], "0.500 [0.400, 0.600] nats"),
        ("e03_bandwidth", ("places", "3 devices, 5:5:5 bit/s/Hz", "ratios", "per-block, exact"), [0.25, 0.2, 0.3], "0.250 [0.200, 0.300]"),
        ("e07_experts_per_token", ("rules", "ser", "ser:t=0.2", "divergence"), [0.5, 0.4, 0.6], "no setting reaches the bar of quality. top-cut"),
        ("e10_break_conditions", ("media", "shared", "wlr", 1, "latency_ratio"), [0.25, 0.2, 0.3], "0.25 [0.20, 0.30]"),
        ("pareto", ("media", "shared", "bottleneck:budget=0.1", "perplexity_ratio"), [1.5, 1.4, 1.6], "shared: 1 of 2 settings"),
    ],
)  # fmt: skip
def test_a_finding_follows_the_numbers(
    name: str, path: tuple[str | int, ...], to: Any, said: str, result: Results
) -> None:
    module, values = importlib.import_module(f"scripts.experiments.{name}"), result(name)["values"]
    assert said not in module.finding(values)
    assert said in module.finding(change(values, *path, to=to))


def test_wlr_is_said_to_fail_where_no_setting_is_both_good_and_fast(result: Results) -> None:
    from scripts.experiments import e02_wlr

    values = result("e02_wlr")["values"]
    for arms in (values["by_alpha"], values["by_gamma"]):
        for arm in arms:
            arm["perplexity_ratio"] = [1.3, 1.2, 1.4]
    assert "none of the 2 settings is both" in e02_wlr.finding(values)


def test_round_robin_evens_out_rows(result: Results) -> None:
    fleet = result("e01_one_layer")["values"]["fleets"]["three alike"]
    spreads = [max(fleet[arm]["air_ms"]) - min(fleet[arm]["air_ms"]) for arm in ("exact", "round-robin")]
    assert spreads[1] < spreads[0]
    assert sum(fleet["round-robin"]["compute_ms"]) > sum(fleet["exact"]["compute_ms"])  # more weights are read


def test_a_division_for_each_block_is_never_worse_than_a_fixed_one(result: Results) -> None:
    for place in result("e03_bandwidth")["values"]["places"].values():
        assert place["perblock_over_static"][2] < 1
        assert place["ratios"]["uniform, exact"] == [1, 1, 1]


def test_an_expert_that_is_left_out_changes_what_follows(result: Results) -> None:
    drops = result("e10_break_conditions")["values"]["drops"]
    assert min(drops["kl"]) > 0 and min(drops["answer"]) > 0 and len(set(drops["window"])) == 2


def test_ranks_do_not_see_scale_and_share_ties() -> None:
    from scripts.experiments.e10_break_conditions import spearman

    x = np.array([0.1, 0.5, 0.2, 0.9, 0.7])
    assert spearman(x, np.exp(9 * x)) == pytest.approx(1) and spearman(x, -x) == pytest.approx(-1)
    assert spearman(x, np.ones(5)) == 0
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, (2, 50)).astype(float)
    assert spearman(a, b) == pytest.approx(scipy_stats.spearmanr(a, b).statistic)


def test_intervals_hold_their_value_and_shrink_with_more() -> None:
    rng = np.random.default_rng(1)
    base = rng.uniform(1, 2, 400)
    value, low, high = ratio_of_sums((0.8 * base).tolist(), base.tolist())
    assert (value, low, high) == pytest.approx((0.8, 0.8, 0.8))  # paired: what varies in both is no doubt
    noisy = rng.normal(0, 1, 400)
    few, many = (bootstrap(lambda drawn, n=n: float(noisy[:n][drawn].mean()), n) for n in (25, 400))  # type: ignore[misc]
    assert few[1] < few[0] < few[2] and many[2] - many[1] < (few[2] - few[1]) / 2
    assert spell((0.8, 0.75, 0.85), ".2f") == "0.80 [0.75, 0.85]"


def test_findings_go_between_their_markers_and_nowhere_else() -> None:
    page = (
        "a\n<!-- finding: x -->\nold\n<!-- end of finding -->\nb\n<!-- finding: y -->\nkept\n<!-- end of finding -->\n"
    )
    changed = with_findings(page, {"x": "new \\1"})
    assert changed == page.replace("old", "new \\1")
    with pytest.raises(ValueError, match="no place for z"):
        with_findings(page, {"z": "new"})


def test_wall_times_stand_with_their_machines() -> None:
    one = {"wall_s": 90.0, "hardware": "a board, 2 CPUs"}
    assert f"<!-- finding: {WALL_TIMES} -->" in FINDINGS.read_text()
    said, rows = wall_times({"x": one, "y": one, "kept before it was recorded": {}}, 120.0).split("\n\n")
    assert said == "Measured on a board, 2 CPUs." and rows.splitlines()[2:] == [
        "| x | 1.5 |",
        "| y | 1.5 |",
        "| all | 2.0 |",
    ]
    said, rows = wall_times({"x": one, "y": one | {"at_a_time": 2}}).split("\n\n")
    assert said == "Measured on 1: a board, 2 CPUs; 2: a board, 2 CPUs, 2 experiments at a time."
    assert "| y | 1.5 | 2 |" in rows and "| all" not in rows


def run(*options: object, timeout_s: float = 280) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(RUN), *map(str, options)]
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout_s, check=False)


def test_what_is_finished_is_kept_until_its_settings_change(tmp_path: Path) -> None:
    options = ["--only", "e01_one_layer", "--model", "tiny", "--work", tmp_path / "work", "--out", tmp_path / "out"]
    first = run(*options, "--short")
    assert first.returncode == 0, first.stderr
    written = (tmp_path / "out" / "e01_one_layer.json").read_bytes()
    assert json.loads(written)["finding"] in (tmp_path / "out" / "findings.md").read_text()
    assert json.loads(written)["wall_s"] > 0 and "| e01_one_layer | 0." in first.stderr
    second = run(*options, "--short")
    assert second.returncode == 0 and "e01_one_layer: kept" in second.stderr
    assert (tmp_path / "out" / "e01_one_layer.json").read_bytes() == written
    (tmp_path / "out" / "e01_one_layer.png").unlink()
    third = run(*options, "--short")
    assert (
        third.returncode == 0
        and "e01_one_layer: kept" not in third.stderr
        and (tmp_path / "out" / "e01_one_layer.png").exists()
    )


def test_wrong_use_is_refused_in_words() -> None:
    for options, said in (
        ((), "give --all, or --only NAME"),
        (("--all", "--only", "pareto"), "give --all, or --only NAME"),
        (("--all", "--short"), "give --out DIR"),
        (("--only", "nothing"), "nothing"),
    ):
        done = run(*options)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_a_failed_experiment_is_named_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()  # without a corpus
    where = ["--work", tmp_path / "work", "--out", tmp_path / "out", "--data-dir", tmp_path / "data"]
    done = run("--only", "e01_one_layer", "--model", "tiny", "--short", *where)
    assert done.returncode == 1 and "failed: e01_one_layer" in done.stderr
    assert "has no corpus/*.txt" in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("e01*"))


def test_experiments_beside_each_other_share_what_they_make(tmp_path: Path) -> None:
    where = ["--work", tmp_path / "work", "--out", tmp_path / "out", "--jobs", 2]
    done = run("--only", "e01_one_layer", "--only", "e03_bandwidth", "--model", "tiny", "--short", *where)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("exporting tiny") == 1 and done.stderr.count("recording what routers say") <= 2
    assert {path.stem for path in (tmp_path / "out").glob("*.json")} == {"e01_one_layer", "e03_bandwidth"}
    assert not list((tmp_path / "work").glob("*.partial*"))


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_experiment_too(stop: signal.Signals, tmp_path: Path) -> None:
    line = [sys.executable, str(RUN), "--all", "--model", "tiny", "--short"]
    line += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        assert re.match(r"\[\d+/", process.stderr.readline())
        time.sleep(0.5)
        if stop == signal.SIGINT:
            os.killpg(process.pid, stop)  # as a terminal does
        else:
            process.send_signal(stop)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 128 + stop and ("interrupted" in said or stop == signal.SIGTERM), said
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
