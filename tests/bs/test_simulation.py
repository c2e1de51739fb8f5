"""The loop fed from a trace: as a run in virtual time of the same questions, block times by hand, and replicas."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from wdmoe.bs.airtime import LatencyModel, latency_model
from wdmoe.bs.cli import main
from wdmoe.bs.config import StationConfig, VirtualConfig
from wdmoe.bs.latency import DeviceLatency
from wdmoe.bs.policies import Exact, Sensitivity, Wlr, parse_policy
from wdmoe.bs.questions import Choice, Question
from wdmoe.bs.radio import Cell, RadioConfig
from wdmoe.bs.scoring import DistributedScorer
from wdmoe.bs.simulation import (
    Bandwidth,
    Replicas,
    Site,
    block_loads,
    holders_of,
    preferred,
    simulate,
    spread,
    static_shares,
)
from wdmoe.bs.simulation_plots import pareto_front
from wdmoe.bs.trace import Recorder, Trace, TraceInfo, write_trace
from wdmoe.bs.virtual import open_virtual_station
from wdmoe.profiles.link_profile import modelled_link
from wdmoe.profiles.modelled import ExpertShape, modelled_profile

SHAPE = ExpertShape(4096, 14336)
DEVICES = ("agx-orin-64gb", "orin-nx-16gb", "orin-nx-8gb", "orin-nano-8gb")
LINKS = tuple(f"radio:mhz=100:efficiency={e}" for e in (6, 4, 3, 2))


def invented(tokens: tuple[int, ...] = (20, 7), blocks: int = 3, experts: int = 8, seed: int = 0) -> Trace:
    rng = np.random.default_rng(seed)
    recorder = Recorder(blocks, 2)
    for n in tokens:
        for block in range(blocks):
            recorder.on_router(block, 2 * rng.standard_normal((n, experts), np.float32))
    info = TraceInfo("wdmoe-trace", 1, "0", "m", "b" * 64, 2, True, {"invented": len(tokens)}, {})
    return recorder.trace(info, np.tile(np.arange(experts) % 4, (blocks, 1)))


def four(curve: tuple[tuple[int, float], ...] = ((1, 2.0), (64, 2.0))) -> LatencyModel:
    """Four devices of which each next has half the rate."""
    rates = np.array([1.0, 2.0, 4.0, 8.0])
    return latency_model([DeviceLatency(curve, 3.0)] * 4, 64).with_rates(rates / 4, rates / 2)


def site(trace: Trace, bandwidth: Bandwidth = "shared") -> Site:
    return Site(four(), holders_of(trace.placement), bandwidth, stage_ms=0.5)


def test_a_loss_is_kept_to_where_the_bundle_was_calibrated() -> None:
    trace = invented()
    policy = parse_policy("bottleneck:loss=0.01")
    with pytest.raises(ValueError, match=r"not calibrated .* record traces again"):
        simulate(trace, site(trace), policy)
    dropped = []
    for nats in (1e-3, 0.1, 1e3):
        known = {"weight": (Sensitivity(nats, 1 / 3),) * 3}
        told = replace(trace, info=msgspec.structs.replace(trace.info, sensitivity=known))
        dropped.append(simulate(told, site(trace), policy).summary()["dropped_share"])
    assert dropped[0] > dropped[1] > dropped[2] == 0


@pytest.mark.parametrize("bandwidth", ["shared", "uniform", "per-block"])
def test_a_run_in_virtual_time_and_its_trace_take_as_long(bundle: Path, bandwidth: Bandwidth) -> None:
    shared = bandwidth == "shared"
    virtual = VirtualConfig(
        DEVICES, LINKS, "shared" if shared else "orthogonal", None if shared else bandwidth, SHAPE, "int4", 1.5
    )
    texts = ("Q: bread\nA:", "Q: is the ice that floats on water lighter than it?\nA:")
    questions = [Question(t, (Choice(tuple(t.encode()), tuple(b" yes it is")),)) for t in texts]
    with open_virtual_station(StationConfig(bundle, threads=1), virtual, lambda _: None) as station:
        model = station.manifest.model
        recorder = Recorder(model.n_blocks, model.top_k)
        station.pipeline.on_router = recorder.on_router
        scorer = DistributedScorer(station.pipeline, Exact(), 1, None)
        scorer.score(questions)
        info = TraceInfo("wdmoe-trace", 1, "0", "m", "b", model.top_k, model.norm_top_k, {}, {})
        trace = recorder.trace(info, np.array([[h[0] for h in block] for block in station.manifest.placement]))
    links = [modelled_link(link) for link in LINKS]
    rate = np.array([link.down_ms(8192) for link in links])
    curves = [modelled_profile(name, "int4", SHAPE).curve() for name in DEVICES]
    devices = latency_model([DeviceLatency(curve, 2.0) for curve in curves], 64).with_rates(rate, rate)
    simulated = simulate(trace, Site(devices, holders_of(trace.placement), bandwidth, stage_ms=1.5), Exact())
    # Headers are charged in a run, and not in a simulation.
    assert simulated.latency_ms == pytest.approx([record.latency_ms for record in scorer.records], rel=0.03)
    assert simulated.pairs == sum(block.pairs for record in scorer.records for block in record.blocks)


def test_one_token_by_hand() -> None:
    traces = (invented((1,), blocks=1, seed=seed) for seed in range(20))
    trace = next(trace for trace in traces if len({int(e) % 4 for e in trace.routing(0, 0).experts[0]}) == 2)
    first, second = sorted(int(e) % 4 for e in trace.routing(0, 0).experts[0])
    rates = [1.0, 2.0, 4.0, 8.0]
    times = [3.0 + 2.0 + 0.75 * rates[k] for k in (first, second)]
    assert simulate(trace, site(trace, "uniform"), Exact()).waiting_ms == pytest.approx(
        [max(3.0 + 2.0 + 4 * 0.75 * rates[k] for k in (first, second))]
    )
    alone = replace(four(), way_ms=np.zeros(4))
    (got,) = simulate(trace, replace(site(trace, "per-block"), model=alone), Exact()).waiting_ms
    # Both compute for 2 ms and need 0.75 x rate of air: together they end when all the air is used.
    assert got == pytest.approx(2.0 + 0.75 * (rates[first] + rates[second]))
    assert max(times) < simulate(trace, site(trace), Exact()).waiting_ms[0] < sum(times)


def test_stages_and_every_question_count() -> None:
    trace = invented()
    simulated = simulate(trace, site(trace), Exact())
    assert simulated.latency_ms == pytest.approx([w + 4 * 0.5 for w in simulated.waiting_ms])
    assert simulated.tokens == 27 and len(simulated.latency_ms) == 2
    (second,) = simulate(trace, site(trace), Exact(), [1]).latency_ms
    assert second == simulated.latency_ms[1]


def test_wlr_leaves_out_and_is_sooner_done() -> None:
    trace = invented((40,) * 5)
    exact, wlr = (simulate(trace, site(trace), policy).summary() for policy in (Exact(), Wlr()))
    assert wlr["latency_mean_ms"] < exact["latency_mean_ms"]
    assert 0 < wlr["gate_mass_dropped"] < 0.5 and exact["gate_mass_dropped"] == exact["dropped_share"] == 0


def test_round_robin_deals_and_the_others_ask_who_is_preferred() -> None:
    holders = np.array([[True, True, False, True], [False, False, True, False]])
    replicas = Replicas.of(holders)
    dealt = replicas.deal(np.array([[0], [1], [0], [0], [0], [1], [0], [0]]))
    assert replicas.device[dealt].ravel().tolist() == [0, 2, 1, 3, 0, 2, 1, 3]
    assert preferred(spread(1, 8, 4, 3)[0]).tolist() != preferred(spread(1, 8, 4, 1)[0]).tolist()
    assert np.bincount(preferred(spread(1, 8, 4, 3)[0])).tolist() == [2] * 4
    trace = invented((64,))
    for bandwidth in ("shared", "uniform", "per-block"):
        place = replace(site(trace, bandwidth), holders=spread(3, 8, 4, 4))
        exact, dealt_out = (simulate(trace, place, parse_policy(name)) for name in ("exact", "round-robin"))
        assert dealt_out.waiting_ms != exact.waiting_ms and dealt_out.gate_mass == exact.gate_mass
        assert dealt_out.gate_mass_dropped == exact.gate_mass_dropped == 0


def test_norms_of_a_trace_say_what_is_important() -> None:
    trace = invented((40,))
    policy = parse_policy("bottleneck:importance=norm,budget=0.2")
    with pytest.raises(ValueError, match="no norms calibrated on a text"):
        simulate(trace, site(trace), policy)
    plain = simulate(trace, site(trace), parse_policy("bottleneck:budget=0.2"))
    alike = simulate(replace(trace, norms=np.ones((3, 8), np.float32)), site(trace), policy)
    norms = np.random.default_rng(0).uniform(0.1, 3, (3, 8)).astype(np.float32)
    unlike = simulate(replace(trace, norms=norms), site(trace), policy)
    assert alike.latency_ms == plain.latency_ms != unlike.latency_ms


@pytest.mark.parametrize("budgets", ["0.1/0.2", "0.1/0.2/0.3/0.1"])
def test_a_budget_for_each_block_is_one_for_each_block(budgets: str) -> None:
    trace = invented()
    with pytest.raises(ValueError, match=f"{budgets.count('/') + 1} budgets for 3 blocks"):
        simulate(trace, site(trace), parse_policy(f"bottleneck:budget={budgets}"))
    simulate(trace, site(trace), parse_policy("bottleneck:budget=0.1/0.2/0.3"))


@pytest.mark.parametrize(
    "policy", ["ser", "top-cut", "capacity", "capacity:overflow=next", "bottleneck", "round-robin"]
)
@pytest.mark.parametrize("devices", [4, 20])
def test_every_policy_runs_with_and_without_replicas(policy: str, devices: int) -> None:
    trace = invented((40,))
    model = latency_model([DeviceLatency(((1, 2.0), (64, 2.0)), 3.0)] * devices, 64)
    rates = np.array([1.0 + k % 5 for k in range(devices)])
    place = Site(model.with_rates(rates, rates), spread(3, 8, devices), "uniform")
    exact = simulate(trace, place, Exact())
    simulated = simulate(trace, place, parse_policy(policy))
    assert simulated.pairs == exact.pairs
    if policy != "round-robin":
        assert simulated.sent <= exact.sent
    if policy != "round-robin" or devices == 4:
        assert simulated.latency_ms[0] <= exact.latency_ms[0] + 1e-9


@pytest.mark.parametrize(("experts", "devices", "copies"), [(8, 3, 1), (8, 3, 2), (8, 8, 3), (8, 20, 1), (8, 20, 5)])
def test_spreading_gives_each_expert_its_copies_and_each_device_work(experts: int, devices: int, copies: int) -> None:
    holders = spread(2, experts, devices, copies)[1]
    assert (holders.sum(axis=1) >= copies).all() and (holders.sum(axis=0) >= 1).all()
    if copies == 1:
        assert np.ptp(holders.sum(axis=0)) <= 1


def test_static_shares_are_those_under_which_exact_is_done_soonest() -> None:
    pytest.importorskip("scipy")
    trace = invented((30,) * 4)
    shares = static_shares(*block_loads(trace, site(trace), range(4)))

    def took_ms(split: np.ndarray) -> float:
        return sum(simulate(trace, replace(site(trace), bandwidth="static", shares=split), Exact()).waiting_ms)

    best_ms, rng = took_ms(shares), np.random.default_rng(0)
    assert shares.sum() == pytest.approx(1) and best_ms < took_ms(np.full(4, 0.25))
    for size in (1e-3, 1e-2, 0.1):
        other = shares * np.exp(size * rng.standard_normal(4))
        assert took_ms(other / other.sum()) >= best_ms * (1 - 1e-6)


def test_what_does_not_fit_together_is_refused() -> None:
    trace = invented()
    nobody = holders_of(trace.placement).copy()
    nobody[1, 3] = False
    with pytest.raises(ValueError, match="expert 3 of block 1 is on no device"):
        Site(four(), nobody)
    with pytest.raises(ValueError, match="static"):
        Site(four(), holders_of(trace.placement), "static")
    with pytest.raises(ValueError, match="the trace has 3 of 8"):
        simulate(trace, Site(four(), spread(2, 8, 4)), Exact())
    with pytest.raises(ValueError, match="3 replicas on 2 devices"):
        spread(1, 8, 2, 3)


def test_fading_is_the_same_for_the_same_seed() -> None:
    trace = invented()

    def times(seed: int, fading: bool = True) -> list[float]:
        cell = Cell(RadioConfig(fading=fading), 4, seed)
        return simulate(trace, replace(site(trace), cell=cell), Exact()).latency_ms

    assert times(1) == times(1) != times(2)
    assert times(1, fading=False) != times(1)


def test_the_pareto_front_has_no_point_that_another_beats() -> None:
    assert pareto_front([(0, 9), (1, 5), (2, 7), (3, 4), (3, 8)]) == [(0, 9), (1, 5), (3, 4)]


def test_without_matplotlib_a_plot_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_trace(tmp_path / "t.npz", invented())
    options = ["--trace", str(tmp_path / "t.npz"), "--devices", "orin-nano-8gb*4", "--plot", str(tmp_path / "p.png")]
    done = CliRunner().invoke(main, ["simulate", *options])
    assert done.exit_code == 1 and "--plot needs matplotlib" in done.stderr and "wdmoe[plots]" in done.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--policy", "wrl"), "unknown policy 'wrl'"),
        (("--policy", "bottleneck:budget=2"), "budget is 2.0"),
        (("--plot", "p.jpegg"), "the ending decides the format, expected one of"),
    ],
)
def test_options_are_checked_before_the_trace_is_read(options: tuple[str, str], reason: str) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plots`")
    done = CliRunner().invoke(main, ["simulate", "--trace", "none.npz", "--devices", "orin-nano-8gb", *options])
    assert done.exit_code == 2 and reason in " ".join(done.stderr.replace("│", " ").split())


def test_budgets_that_do_not_fit_the_trace_are_a_bad_parameter(tmp_path: Path) -> None:
    write_trace(tmp_path / "t.npz", invented())
    options = ["--trace", str(tmp_path / "t.npz"), "--devices", "orin-nano-8gb*4", "--policy"]
    done = CliRunner().invoke(main, ["simulate", *options, "bottleneck:budget=0.1/0.2"])
    assert done.exit_code == 2 and "2 budgets for 3 blocks" in " ".join(done.stderr.replace("│", " ").split())


def test_the_command_prints_plots_and_writes_json(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plots`")
    write_trace(tmp_path / "t.npz", invented())
    options = ["simulate", "--trace", str(tmp_path / "t.npz"), "--devices", "orin-nano-8gb*10,agx-orin-64gb"]

    def run(*more: str) -> dict[str, object]:
        path = tmp_path / "r.json"
        done = CliRunner().invoke(main, [*options, *more, "--json", str(path), "--plot", str(tmp_path / "p.png")])
        assert done.exit_code == 0, done.output
        assert "11 modelled devices" in done.stdout and "nothing here was measured" in done.stdout
        result: dict[str, object] = json.loads(path.read_bytes())
        return {key: value for key, value in result.items() if key not in ("date", "command")}

    for more in ((), ("--channel", "orthogonal", "--bandwidth", "static"), ("--link", "wifi-6", "--replicas", "2")):
        assert run(*more) == run(*more)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert (
        run()["origin"] == "modelled: devices and links from profiles, routing from a trace; nothing here was measured"
    )
    for wrong, reason in (
        (("--devices", "toaster"), "toaster"),
        (("--devices", "orin-nano-8gb*x"), "not NAME or NAME*N"),
        (("--link", "wifi-6", "--radio", "ghz=2"), "contradict"),
        (("--bandwidth", "static"), "orthogonal"),
        (("--radio", "color=red"), "no option 'color'"),
    ):
        done = CliRunner().invoke(main, [*options, *wrong])
        assert done.exit_code == 2 and reason in done.stderr
