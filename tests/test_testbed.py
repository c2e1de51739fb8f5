"""The short form of the pinned testbed, and how its verdict is drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))
pytest.importorskip("tomllib")
pytest.importorskip("lm_eval", reason="needs the extra `eval`")

from scripts.bench._kept import Kept
from scripts.bench.testbed import CONFIG, judge_pools, placed_bundle, read_testbed, verdict

BENCH = ROOT / "scripts" / "bench" / "testbed.py"


def arms(latencies: dict[str, dict[str, float]], quality: dict[str, tuple[float | None, float]]) -> dict[str, Any]:
    """Both efficiencies alike: latency by medium and policy, perplexity ratio and divergence by policy."""
    return {
        f"{efficiency}, {medium}": {
            name: {
                "latency_mean_ms": ms,
                "perplexity_ratio": quality.get(name, (1.0, 0.0))[0],
                "divergence": quality.get(name, (1.0, 0.0))[1],
            }
            for name, ms in by_policy.items()
        }
        for efficiency in ("6:4:2", "5:5:5")
        for medium, by_policy in latencies.items()
    }


LATENCIES = {
    "shared": {"exact": 100.0, "wlr": 70.0, "bottleneck": 80.0, "ser": 90.0},
    "uniform": {"exact": 200.0, "wlr": 150.0, "bottleneck": 140.0, "ser": 190.0},
    "per-block": {"exact": 120.0, "wlr": 84.0, "bottleneck": 90.0, "ser": 110.0},
}


def test_the_best_policy_is_one_that_reaches_the_quality_bar() -> None:
    testbed = msgspec.structs.replace(read_testbed(CONFIG), policies=("wlr", "bottleneck", "ser"))
    quality: dict[str, tuple[float | None, float]] = {"wlr": (1.3, 0.3), "bottleneck": (1.015, 0.01)}
    found = verdict(testbed, arms(LATENCIES, quality))
    assert found["best_policy"] == "bottleneck" and found["at_quality_bar"] == ["bottleneck", "ser"]
    assert found["policy_gain_shared"] == pytest.approx(0.2)
    assert found["policy_gain_perblock"] == pytest.approx(0.25)
    assert found["total_vs_uniform"] == pytest.approx(0.55)
    assert found["wlr_policy_gain_shared"] == pytest.approx(0.3)  # beside, whatever its quality
    assert found["bandwidth_alone_vs_uniform"]["5:5:5"] == pytest.approx(0.4)
    assert found["passed"]


def test_the_lesser_gain_counts_and_without_quality_nothing_does() -> None:
    testbed = msgspec.structs.replace(read_testbed(CONFIG), policies=("bottleneck",))
    alone = arms(LATENCIES, {})
    alone["5:5:5, shared"]["bottleneck"]["latency_mean_ms"] = 88.0
    found = verdict(testbed, alone)
    assert found["policy_gain_shared"] == pytest.approx(0.12) and not found["passed"]
    assert found["missed"] == ["policy_gain_shared of bottleneck is 0.120, expected at least 0.15"]
    assert found["wlr_policy_gain_shared"] is None
    for unfit in ((None, 0.0), (1.021, 0.0), (1.0, 0.021), (1.0, float("nan"))):
        found = verdict(testbed, arms(LATENCIES, {"bottleneck": unfit}))
        assert (found["best_policy"], found["policy_gain_shared"], found["passed"]) == (None, None, False)


def test_a_policy_whose_pooled_accuracy_is_below_the_bar_gives_way_to_the_next() -> None:
    testbed = msgspec.structs.replace(read_testbed(CONFIG), policies=("bottleneck", "ser"))
    alone = arms(LATENCIES, {})
    for reached, best in ((False, "ser"), (None, "bottleneck"), (True, "bottleneck")):  # None: too few rows to judge
        found = verdict(testbed, alone, {"bottleneck": {"reached": reached}})
        assert found["best_policy"] == best
        assert ("bottleneck" in found["at_quality_bar"]) == (reached is not False)


def test_accuracy_is_pooled_until_a_policy_reaches_the_bar_and_what_is_done_is_kept(tmp_path: Path) -> None:
    testbed = read_testbed(CONFIG)
    bars = msgspec.structs.replace(testbed.bars, pooled_points=200.0, pooled_rows=3)  # which nothing can reach
    testbed = msgspec.structs.replace(
        testbed, policies=("bottleneck", "ser"), pool_sets=("piqa-sample",), pool_rows=3, bars=bars
    )
    kept = Kept(str(tmp_path / "t.json"), "key")
    with placed_bundle("tiny", testbed) as bundle:
        pools = judge_pools(testbed, bundle, arms(LATENCIES, {}), None, 1, kept)
    assert list(pools) == ["bottleneck", "ser"]  # the better first, then what is left
    for pool in pools.values():
        assert pool["rows"] == 3 and pool["judged"] and pool["reached"] is False
        assert set(pool["accuracy"]["piqa-sample"]) == {"rows", "exact", "policy"}
    assert len(Kept(str(tmp_path / "t.json"), "key").parts) == 2 and not Kept(str(tmp_path / "t.json"), "other").parts


def test_the_testbed_is_what_it_is_said_to_be() -> None:
    testbed = read_testbed(CONFIG)
    assert testbed.devices == ("agx-orin-64gb", "orin-nx-16gb", "orin-nano-8gb") and testbed.experts_per_device == 3
    assert (testbed.cost_shape, testbed.cost_precision, testbed.wire) == ("4096x14336", "int4", "fp16")
    assert sorted(testbed.efficiencies.values()) == [(5, 5, 5), (6, 4, 2)] and testbed.rows >= 300
    for efficiency in testbed.efficiencies:
        for medium in testbed.media:
            testbed.arm(efficiency, medium)  # raises where it cannot be


@pytest.mark.timeout(300)
def test_every_arm_runs_and_runs_the_same_twice(tmp_path: Path) -> None:
    target = tmp_path / "t.json"
    line = [sys.executable, str(BENCH), "--model", "tiny", "--dataset", "piqa-sample", "--rows", "2"]
    line += ["--saturated-rows", "2", "--text-tokens", "0", "--policy", "bottleneck", "--json", str(target)]

    def run() -> tuple[dict[str, Any], str]:
        done = subprocess.run(line, capture_output=True, text=True, timeout=250, check=False)
        assert done.returncode == 1, done.stderr  # without a perplexity nothing reaches the bar
        result: dict[str, Any] = json.loads(target.read_bytes())
        return result, done.stderr

    first, _ = run()
    assert first["best_policy"] is None and first["origin"].startswith("emulated")
    assert len(first["one_at_a_time"]) == len(first["saturated"]) == 8
    for arm in first["one_at_a_time"].values():
        assert set(arm) == {"exact", "bottleneck"} and arm["exact"]["divergence"] == pytest.approx(0, abs=1e-6)
    for arm in first["saturated"].values():
        assert arm["exact"]["questions_per_s"] > 0
    second, _ = run()  # to the bit
    keys = ("one_at_a_time", "saturated", "gains", "bandwidth_alone_vs_uniform")
    assert {key: first[key] for key in keys} == {key: second[key] for key in keys}
    assert not list(tmp_path.glob("*.unfinished"))
