"""Losses in place of budgets: what they bound, how they are split among blocks, and how they are measured."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from devices import random_model
from inprocess import open_system

from wdmoe.bs.airtime import Medium, load_of, makespan
from wdmoe.bs.calibrating import WINDOW, equal_price, measure_sensitivity, n_steps
from wdmoe.bs.cli import main
from wdmoe.bs.policies import Context, Sensitivity, parse_policy, select
from wdmoe.bs.routing import route
from wdmoe.bs.sensitivity import read_sensitivity, write_sensitivity
from wdmoe.runtime.errors import BundleError, DataError
from wdmoe.runtime.manifest import SENSITIVITY_NAME

BOUNDED = ("wlr:alpha=1", "ser:t=1", "top-cut", "top-cut:pairs=true", "capacity:factor=0.3", "bottleneck")
IDS = [int(n) for n in np.random.default_rng(0).integers(0, 256, 2 * WINDOW)]


@pytest.mark.parametrize("text", BOUNDED)
@pytest.mark.parametrize("tokens", [1, 40])
def test_no_policy_leaves_out_more_than_the_loss_allows(text: str, tokens: int) -> None:
    left_out = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        routing = route(2 * rng.standard_normal((tokens, 8)).astype(np.float32), 2, normalise=True)
        owner, model = np.arange(8) // 2, random_model(rng, 4, "own", up_to=tokens)
        context = Context(model=model, sensitivity={"weight": Sensitivity(nats=0.5, share=0.25)})
        policy = parse_policy(f"{text}{',' if ':' in text else ':'}loss=0.04")
        plan = select(routing, owner, np.ones(4), policy, context)
        lost = 0.5 * (routing.weights[~plan.keep].astype(np.float64) ** 2).sum()
        assert lost <= 0.04 * 0.25 * tokens * (1 + 1e-6)
        left_out += int((~plan.keep).sum())
    assert left_out > 0 or (tokens == 1 and text.startswith("capacity"))  # no cap is less than one row


def times_of_a_case(seed: int, medium: Medium) -> tuple[float, float, float]:
    """Block time with everything, with the best of all plans within the loss, and with what `bottleneck` chose."""
    rng = np.random.default_rng(seed)
    tokens = int(rng.integers(2, 7))
    routing = route(1.5 * rng.standard_normal((tokens, 6)).astype(np.float32), 2, normalise=True)
    owner, model = np.arange(6) // 2, random_model(rng, 3, medium, up_to=tokens)
    device = owner[routing.experts]
    squares = routing.weights[:, 1].astype(np.float64) ** 2

    def block_ms(out: tuple[int, ...]) -> float:
        keep = np.ones((tokens, 2), np.bool_)
        keep[list(out), 1] = False
        return makespan(load_of(routing.experts, keep, device, 6, 3), model).total_ms

    may = [t for t in range(tokens) if device[t, 0] != device[t, 1]]
    plans = [
        out for n in range(len(may) + 1) for out in combinations(may, n) if squares[list(out)].sum() <= 0.05 * tokens
    ]
    context = Context(model=model, sensitivity={"weight": Sensitivity(1.0, 1.0)})
    plan = select(routing, owner, np.ones(3), parse_policy("bottleneck:loss=0.05"), context)
    chosen = tuple(np.flatnonzero(~plan.keep[:, 1]).tolist())
    return block_ms(()), min(map(block_ms, plans)), block_ms(chosen)


@pytest.mark.parametrize("medium", ["own", "shared", "pooled"])
def test_bottleneck_with_a_loss_is_near_the_best_of_all_plans(medium: Medium) -> None:
    found = np.array([times_of_a_case(seed, medium) for seed in range(30)])  # [30, 3]: all, best and found
    ratios = found[:, 2] / found[:, 1]
    could_gain = int((found[:, 1] < 0.98 * found[:, 0]).sum())
    assert min(ratios) > 1 - 1e-9 and np.mean(ratios) < 1.05
    assert could_gain > 10


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("owner", [np.arange(4), np.zeros(4, np.int64)])
@pytest.mark.parametrize("name", ["bottleneck", "wlr", "ser", "top-cut"])
def test_a_loss_needs_a_calibration(name: str, owner: np.ndarray, tokens: int) -> None:
    routing = route(np.zeros((tokens, 4), np.float32), 2, normalise=True)
    with pytest.raises(
        ValueError, match=rf"{name}:loss=0\.01: this bundle was not calibrated .* run wdmoe-bs calibrate"
    ):
        select(routing, owner, np.ones(4), parse_policy(f"{name}:loss=0.01"))
    with pytest.raises(ValueError, match="2 budgets, but there is a block 5"):
        select(routing, owner, np.ones(4), parse_policy(f"{name}:budget=0.1/0.2"), Context(5))


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_loss_needs_a_calibration_of_its_importance_and_sense(tokens: int) -> None:
    routing = route(np.zeros((tokens, 4), np.float32), 2, normalise=True)
    with pytest.raises(ValueError, match="importance=norm"):
        known = Context(norms=np.ones(4, np.float32), sensitivity={"weight": Sensitivity(1.0, 1.0)})
        select(routing, np.arange(4), np.ones(4), parse_policy("ser:loss=0.01,importance=norm"), known)
    with pytest.raises(ValueError, match="loss is -1"):
        parse_policy("ser:loss=-1")


def test_a_split_at_one_price_leaves_out_more_than_any_other() -> None:
    rng = np.random.default_rng(1)
    nats = [0.1, 1.0, 10.0]
    squares = [np.sort(rng.uniform(0, 0.25, 400)) for _ in nats]
    costs = [(cost, np.concatenate(([0.0], np.cumsum(cost))) / 400) for cost in squares]

    def left_out(shares: np.ndarray) -> int:
        allowed = [0.05 * share / s for share, s in zip(shares, nats, strict=True)]
        return sum(int(np.searchsorted(along, a, "right")) - 1 for a, (_, along) in zip(allowed, costs, strict=True))

    found = np.array(equal_price(nats, costs, 0.05))
    assert found.sum() == pytest.approx(1)
    most = left_out(found)
    assert most > 1.05 * left_out(np.full(3, 1 / 3))
    for _ in range(200):
        assert left_out(rng.dirichlet(np.ones(3))) <= most + 3  # whole pairs: a few may fall between


def test_measuring_ranks_blocks_and_the_file_survives(bundle: Path, tmp_path: Path) -> None:
    steps = []
    with open_system(bundle) as system:
        manifest = system.manifest
        found = measure_sensitivity(system.pipeline, manifest, IDS, lambda: steps.append(1))
        with pytest.raises(DataError, match="has 5 tokens"):
            measure_sensitivity(system.pipeline, manifest, IDS[:5])
    blocks = found.by_importance["weight"]
    assert len(steps) == n_steps(manifest) and len(blocks) == manifest.model.n_blocks
    assert all(block.nats > 0 and block.share > 0 for block in blocks)
    assert sum(block.share for block in blocks) == pytest.approx(1)
    path = write_sensitivity(tmp_path, found)
    assert path.name == SENSITIVITY_NAME and read_sensitivity(tmp_path, manifest) == found
    for damaged, message in (
        (path.read_bytes()[:40], "make it again"),
        (path.read_bytes().replace(manifest.bundle_id.encode(), b"0" * 64), "is of bundle 000000000000"),
        (path.read_bytes().replace(b'"version": 1', b'"version": 9'), "version 9, expected"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(BundleError, match=message):
            read_sensitivity(tmp_path, manifest)
    path.unlink()
    assert read_sensitivity(tmp_path, manifest) is None


def test_a_text_too_short_is_told_without_a_traceback(bundle: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("bread")
    done = CliRunner().invoke(main, ["calibrate", "--bundle", str(bundle), "--text", str(text), "--threads", "1"])
    assert done.exit_code == 1 and "expected at least 128" in done.output
    assert not (bundle / "bs" / SENSITIVITY_NAME).exists()
