"""Experiment 10: when selection helps and when not, and whether importance tells what a token loses.

    python scripts/experiments/e10_break_conditions.py --data-dir DIR --json FILE --plot FILE.png

Three devices from alike to the slowest being eight times slower than the fastest, on air and in computing alike. And the pairs
themselves: one expert of one token in one block is left out of the real model, and what that does to the tokens that follow
(KL from exact, and their loss) is ranked beside its gate weight, gate weight x calibrated norm, and gate weight x the norm
of the very answer that is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

sys.path.append(str(Path(__file__).parents[2]))
from scripts.experiments._frame import (
    UNMEASURED,
    Interval,
    Settings,
    Values,
    bootstrap,
    colour_of,
    experiment,
    hollow,
    marked_bars,
    progress,
    ratio_of_sums,
    spell,
)
from scripts.experiments._model import bundle, devices, open_arm, trace, windows
from wdmoe.bs.importance import output_norms
from wdmoe.bs.microbatch import pack_sequence
from wdmoe.bs.policies import Exact, parse_policy
from wdmoe.bs.quality import kl_divergence
from wdmoe.bs.routing import Routing, route
from wdmoe.bs.simulation import Bandwidth, Site, holders_of, simulate
from wdmoe.bs.stages import new_cache
from wdmoe.export.forward import FloatArray, Forward, IntArray, bundle_experts
from wdmoe.export.inspection import read_bundle

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats64 = npt.NDArray[np.float64]

FACTORS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
POLICIES = ("wlr", "ser", "capacity", "bottleneck")
MEDIA: tuple[Bandwidth, ...] = ("shared", "uniform", "per-block")
MEASURES = {"weight": "gate weight", "norm": "x calibrated norm", "answer": "x norm of the answer"}
WINDOW_TOKENS, FIRST_TOKEN, FOLLOWING = 40, 8, 8  # of a window; drops fall between the first ones and the last ones
DROPS = 24  # of a window, each in a copy of it
HELPS = 0.97  # latency ratio, below which a policy is said to help


def measure(settings: Settings) -> Values:
    recorded = trace(settings, 8 if settings.short else 160)
    alike = devices(("orin-nx-16gb",) * 3, (4.0,) * 3)
    holders = holders_of(recorded.placement)
    questions = range(min(recorded.n_questions, 4 if settings.short else 60))
    factors = (FACTORS[0], FACTORS[-1]) if settings.short else FACTORS
    media: Values = {}
    for medium in MEDIA:
        media[medium] = {policy: [] for policy in POLICIES}
        for factor in factors:
            # From 1 / sqrt(factor) to sqrt(factor) times as long: the middle device stays what it is.
            slower = factor ** np.array([-0.5, 0.0, 0.5])
            model = replace(alike, slowness=slower, down_ms=alike.down_ms * slower, up_ms=alike.up_ms * slower)
            site = Site(model, holders, medium)
            exact = simulate(recorded, site, parse_policy("exact"), questions)
            for policy in POLICIES:
                found = simulate(recorded, site, parse_policy(policy), questions)
                ratio = ratio_of_sums(found.latency_ms, exact.latency_ms)
                dropped = found.summary()["gate_mass_dropped"]
                media[medium][policy].append({"latency_ratio": ratio, "gate_mass_dropped": dropped})
    progress("heterogeneity is done; leaving out single experts")
    return {"factors": list(factors), "media": media, "questions": len(questions), "drops": single_drops(settings)}


@dataclass(frozen=True, slots=True)
class Drop:
    """One expert of one token in one block that is left out; what else the token is answered stays as it is."""

    token: int
    block: int
    slot: int  # 0: of the token's top expert
    expert: int
    weight: float


def single_drops(settings: Settings) -> Values:
    """Leave out single experts, each in a copy of its window, and measure what the tokens from there on lose."""
    folder, rng, routings = bundle(settings), np.random.default_rng(0), list[Routing]()
    with open_arm(settings) as station:
        texts = [window.choices[0] for window in windows(settings, station, 2 if settings.short else 24)]
        model, norms = station.manifest.model, output_norms(station.manifest)
        ids = [np.array((text.context + text.continuation)[:WINDOW_TOKENS], np.int64) for text in texts]
        station.pipeline.on_router = lambda block, logits: routings.append(route(logits, model.top_k, model.norm_top_k))
        for window in ids:
            cache = new_cache(station.manifest, len(window))
            list(station.pipeline.run([pack_sequence("text", window.tolist(), cache, model.sliding_window)], Exact()))
    found = read_bundle(folder)
    assert found.bs is not None
    experts = bundle_experts(folder, found.devices)
    rows: list[Values] = []
    for number, window in enumerate(ids):
        of_window = routings[number * model.n_blocks : (number + 1) * model.n_blocks]
        drops: list[Drop] = []
        for _ in range(4 if settings.short else DROPS):
            token, block = int(rng.integers(FIRST_TOKEN, len(window) - FOLLOWING)), int(rng.integers(model.n_blocks))
            slot = int(rng.integers(model.top_k))
            of_block = of_window[block]
            chosen = int(of_block.experts[token, slot]), float(of_block.weights[token, slot])
            drops.append(Drop(token, block, slot, *chosen))
        dropping = Dropping(drops, len(window))
        copies = [window] * (len(drops) + 1)  # the last one is whole
        *_, logits = Forward(folder / "bs", found.bs, copies, experts, dropping.on_answers).blocks()
        by_copy = logits.reshape(len(copies), len(window), -1)
        for n, drop in enumerate(drops):
            if n in dropping.norms:  # else it was a near tie, decided otherwise on the wire
                kl, loss = damage(by_copy[-1], by_copy[n], window, drop.token)
                weight = drop.weight
                importance = {"weight": weight, "norm": weight * float(norms[drop.block, drop.expert])}
                row = {"window": number, "block": drop.block, "slot": drop.slot, "kl": kl, "loss": loss, **importance}
                rows.append({**row, "answer": weight * dropping.norms[n]})
        progress(f"  {number + 1} of {len(ids)} windows with {len(drops)} drops each")
    return {name: [row[name] for row in rows] for name in rows[0]}


class Dropping:
    """Takes single answers of experts away while copies of a window run together; remembers how large they were."""

    def __init__(self, drops: Sequence[Drop], window_tokens: int) -> None:
        self._drops, self._tokens = drops, window_tokens
        self.norms: dict[int, float] = {}  # by number of the drop

    def on_answers(self, block: int, expert: int, rows: IntArray, answers: FloatArray) -> None:
        """See `Forward`. NOTE: it adds the answers up after this; what is zero here is left out."""
        for number, drop in enumerate(self._drops):
            if (drop.block, drop.expert) == (block, expert):
                at = np.flatnonzero(rows == number * self._tokens + drop.token)
                if len(at):
                    self.norms[number] = float(np.linalg.norm(answers[at]))
                    answers[at] = 0


def damage(whole: FloatArray, less: FloatArray, window: IntArray, token: int) -> tuple[float, float]:
    """Return KL and the rise of the loss, both in nats and summed over the tokens from `token` on.

    Args:
        whole: [tokens, vocabulary], logits.
        less: the same, after something was left out at `token`.
        window: [tokens], ids.
        token: before it nothing changes.
    """
    seen, targets = slice(token, len(window) - 1), window[token + 1 :]

    def loss(logits: FloatArray) -> float:
        rows = logits[seen].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        return float((np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(targets)), targets]).sum())

    return float(kl_divergence(whole[seen], less[seen]).sum()), loss(less) - loss(whole)


def mean_ranks(values: Floats64) -> Floats64:
    """Return the rank of each; of equals the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats64 = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


def spearman(first: Floats64, second: Floats64) -> float:
    """Return the rank correlation; 0 where one of them does not vary."""
    a, b = mean_ranks(first), mean_ranks(second)
    a, b = a - a.mean(), b - b.mean()
    length = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / length if length else 0.0


def correlations(drops: Values) -> dict[str, Interval]:
    """Return the rank correlation of each measure of importance with the KL, and of the weight with the loss."""
    of_window = np.array(drops["window"])
    members = [np.flatnonzero(of_window == number) for number in np.unique(of_window)]

    def interval(measured: str, by: str) -> Interval:
        x, y = np.array(drops[by], dtype=float), np.array(drops[measured], dtype=float)

        def statistic(drawn: npt.NDArray[np.int64]) -> float:
            at = np.concatenate([members[number] for number in drawn])
            return spearman(x[at], y[at])

        return bootstrap(statistic, len(members), 500)

    found = {by: interval("kl", by) for by in MEASURES}
    return {**found, "weight, loss": interval("loss", "weight"), "answer, loss": interval("loss", "answer")}


def finding(values: Values) -> str:
    factors = values["factors"]
    said = [
        f"{values['questions']} windows. Latency of a policy over exact, from devices alike to {factors[-1]:g} times apart:"
    ]
    for medium, by_policy in values["media"].items():
        parts: list[str] = []
        for policy, arms in by_policy.items():
            ratios = [arm["latency_ratio"] for arm in arms]
            helping = [factor for factor, ratio in zip(factors, ratios, strict=True) if ratio[2] < HELPS]
            where = "nowhere" if not helping else "everywhere" if len(helping) == len(factors) else "at "
            where += ", ".join(f"{factor:g}x" for factor in helping) if where == "at " else ""
            mass = [arm["gate_mass_dropped"] for arm in arms]
            parts.append(
                f"{policy} {spell(ratios[0], '.2f')} to {spell(ratios[-1], '.2f')}, helps {where} "
                f"(gate weight left out: {min(mass):.0%} to {max(mass):.0%})"
            )
        said.append(f"{medium}: {'; '.join(parts)}.")
    found = correlations(values["drops"])
    said.append(
        f"{len(values['drops']['kl'])} single experts left out of the real model: rank correlation with the KL that follows "
        f"is {spell(found['weight'], '.2f')} for the gate weight, {spell(found['norm'], '.2f')} for weight x calibrated norm, "
        f"{spell(found['answer'], '.2f')} for weight x norm of the answer itself, which no policy can know before; with the "
        f"rise of the loss, {spell(found['weight, loss'], '.2f')} for the weight and {spell(found['answer, loss'], '.2f')} for "
        "the answer."
    )
    return " ".join(said)


def draw(values: Values, figure: Figure) -> None:
    figure.set_size_inches(11, 6.4)
    above, below = figure.subplots(2, 3)
    for axes, (medium, by_policy) in zip(above, values["media"].items(), strict=True):
        for policy, arms in by_policy.items():
            ratios = [arm["latency_ratio"] for arm in arms]
            marked_bars(axes, values["factors"], ratios, [False] * len(ratios), colour_of(policy), policy)
        axes.axhline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
        axes.set_title(f"{medium} bandwidth" if medium != "shared" else "one shared channel", fontsize=9)
        axes.set_xlabel("slowest device over fastest, times")
        axes.sharey(above[0])
    above[0].set_ylabel("latency, ratio to exact (modelled)")
    handles = [*above[0].get_legend_handles_labels()[0], hollow(UNMEASURED)]
    above[0].legend(handles=handles, fontsize=7)
    found, drops = correlations(values["drops"]), values["drops"]
    slot = np.array(drops["slot"])
    for axes, (by, label) in zip(below, MEASURES.items(), strict=True):
        for number in np.unique(slot):
            at = slot == number
            style = {"s": 12, "alpha": 0.6, "linewidths": 0, "label": f"expert no. {number + 1} of the token"}
            axes.scatter(np.array(drops[by])[at], np.maximum(1e-9, np.array(drops["kl"])[at]), **style)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_minor_formatter("")  # numbers between the powers of ten would overlap
        axes.set_xlabel(label if by == "weight" else f"gate weight {label}")
        axes.set_title(f"rank correlation {spell(found[by], '.2f')}", fontsize=9)
    below[0].set_ylabel("KL after leaving it out, nats (real)")
    below[0].legend(fontsize=7)


main = experiment("When selection helps, and what importance tells", measure, finding, draw)

if __name__ == "__main__":
    main()
