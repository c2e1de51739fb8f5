"""Experiment 5: seven multiple-choice sets per policy in virtual time; and code, sums and chat by bits per byte.

    python scripts/experiments/e05_sets.py --data-dir DIR --json FILE --plot FILE.png

The first rows of each set, judged by lm-eval, one at a time on the testbed's shared channel at 6:4:2 bit/s/Hz. A reference text
is weighed by the bits that the model needs for each byte of it: HumanEval's solutions, GSM8K's answers, and the right answers
to PIQA's goals in the model's chat template. Evaluation rows are measured here, and nothing is chosen by them. Without
--data-dir the bundled questions stand in for all.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.append(str(Path(__file__).parents[2]))
from scripts.experiments._frame import (
    Settings,
    Values,
    bootstrap,
    colour_of,
    error_bars,
    experiment,
    progress,
    ratio_of_sums,
    spell,
)
from scripts.experiments._model import SAMPLE, TESTBED, bundle
from scripts.experiments._more import chosen, open_tapped
from wdmoe.bs.chat import load_chat_template
from wdmoe.bs.evaluation import Evaluation, PairedDifference, evaluate, load_task, paired_difference, pooled_difference
from wdmoe.bs.experiment import load_tokenizer, max_length
from wdmoe.bs.policies import parse_policy
from wdmoe.bs.questions import Choice, Question
from wdmoe.bs.scoring import DistributedScorer
from wdmoe.bs.station import Station

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETS = ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande", "openbookqa")
ROWS, TEXT_ROWS, TEXT_TOKENS = 20, 12, 320  # tokens of a text at most, its prompt's beginning cut off
EFFICIENCY, MEDIUM = "6:4:2", "shared"


def measure(settings: Settings) -> Values:
    rows = 3 if settings.short else ROWS
    names = ["exact", *(chosen("wlr", "bottleneck") if settings.short else chosen())]
    sets: dict[str, dict[str, Values]] = {}
    verdicts: dict[str, list[Evaluation]] = {name: [] for name in names}
    with open_tapped(bundle(settings), TESTBED.arm(EFFICIENCY, MEDIUM)) as station:
        tokenizer, model = load_tokenizer(station), station.manifest.model
        for dataset in SETS if settings.data_dir is not None else ("piqa-sample",):
            task = load_task(dataset, settings.data_dir)
            sets[dataset] = {}
            exact_ms: list[float] = []
            for name in names:
                scorer = DistributedScorer(station.pipeline, parse_policy(name), 1, model.sliding_window)
                verdict = evaluate(
                    task, scorer, tokenizer, max_length=max_length(station), limit=rows,
                    prefix_token_id=model.bos_token_id,
                )  # fmt: skip
                verdicts[name].append(verdict)
                took_ms = [record.latency_ms for record in scorer.records]
                exact_ms = exact_ms or took_ms
                sets[dataset][name] = {
                    "rows": verdict.rows,
                    "accuracy": verdict.metrics["acc"],
                    "difference_points": _points(paired_difference(verdict, verdicts["exact"][-1])),
                    "latency_mean_ms": float(np.mean(took_ms)),
                    "latency_over_exact": ratio_of_sums(took_ms, exact_ms),
                }
            progress(f"{dataset}: {rows} rows under {len(names)} policies")
        read = {kind: bits(station, names, questions) for kind, questions in references(settings, station).items()}
    pooled = {
        name: {"rows": (found := pooled_difference(some, verdicts["exact"])).rows, "difference_points": _points(found)}
        for name, some in verdicts.items()
    }
    return {"sets": sets, "pooled": pooled, "texts": read}


def references(settings: Settings, station: Station) -> dict[str, list[tuple[Question, int]]]:
    """Return texts to be weighed by kind, each with the bytes of what is scored."""
    tokenizer = load_tokenizer(station)
    template = load_chat_template(station.folder, station.manifest, tokenizer)
    count = 3 if settings.short else TEXT_ROWS

    def chat(goal: str) -> str:
        return template.render([{"role": "user", "content": goal}])

    pairs: dict[str, list[tuple[str, str]]] = {}
    if settings.data_dir is None:
        pairs["chat"] = [(chat(row["goal"]), row["sol1"]) for row in _rows(SAMPLE, count)]
    else:
        folder = settings.data_dir
        code = _rows(folder / "humaneval" / "HumanEval.jsonl", count)
        sums = _rows(folder / "gsm8k" / "test.jsonl", count)
        goals = _rows(folder / "piqa" / "valid.jsonl", count)
        labels = (folder / "piqa" / "valid-labels.lst").read_text().split()
        pairs["HumanEval"] = [(row["prompt"], row["canonical_solution"]) for row in code]
        pairs["GSM8K"] = [(f"Question: {row['question']}\nAnswer: ", row["answer"]) for row in sums]
        pairs["chat"] = [
            (chat(row["goal"]), row[f"sol{int(label) + 1}"]) for row, label in zip(goals, labels, strict=False)
        ]
    found: dict[str, list[tuple[Question, int]]] = {}
    for kind, texts in pairs.items():
        found[kind] = []
        for number, (prompt, text) in enumerate(texts):
            before, after = (tokenizer.encode(part, add_special_tokens=False).ids for part in (prompt, text))
            after = after[: TEXT_TOKENS // 2]
            size = len(tokenizer.decode(after, skip_special_tokens=False).encode())
            choice = Choice(tuple(before[-(TEXT_TOKENS - len(after)) :]), tuple(after))
            found[kind].append((Question(f"{kind}/{number}", (choice,)), size))
    return found


def bits(station: Station, names: Sequence[str], texts: Sequence[tuple[Question, int]]) -> dict[str, Values]:
    """Weigh texts under each policy, exact first: bits per byte, with intervals over texts."""
    sizes = [float(size) for _, size in texts]
    found: dict[str, Values] = {}
    exact: list[float] = []
    for name in names:
        scorer = DistributedScorer(station.pipeline, parse_policy(name), 1, station.manifest.model.sliding_window)
        spent = [
            -answer.log_likelihoods[0] / math.log(2) for answer in scorer.score([question for question, _ in texts])
        ]
        exact = exact or spent
        difference = np.array(spent) - np.array(exact)
        weights = np.array(sizes)

        def mean_more(drawn: Any, more: Any = difference, weights: Any = weights) -> float:
            return float(more[drawn].sum() / weights[drawn].sum())

        found[name] = {
            "texts": len(texts),
            "bits_per_byte": ratio_of_sums(spent, sizes),
            "over_exact": ratio_of_sums(spent, exact),
            "more_than_exact": bootstrap(mean_more, len(spent)),
        }
    return found


def _rows(path: Path, count: int) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]


def _points(difference: PairedDifference) -> list[float]:
    return [difference.mean_points, *difference.interval_points]


def finding(values: Values) -> str:
    sets, pooled = values["sets"], values["pooled"]
    rows = pooled["exact"]["rows"]
    right = sum(one["exact"]["accuracy"] * one["exact"]["rows"] for one in sets.values()) / rows
    said = [f"On {rows} rows of {len(sets)} set{'s' * (len(sets) > 1)} exact answers {100 * right:.1f} % right."]
    for name, found in pooled.items():
        if name == "exact":
            continue
        over = [one[name]["latency_over_exact"][0] for one in sets.values()]
        more = "; ".join(f"{kind} {spell(one[name]['over_exact'], '.3f')}" for kind, one in values["texts"].items())
        said.append(
            f"{name}: {spell(found['difference_points'], '+.1f')} points, {min(over):.2f} to {max(over):.2f} of exact's "
            f"latency by set (modelled); bits per byte over exact's: {more}."
        )
    needed = "; ".join(f"{kind} {spell(one['exact']['bits_per_byte'], '.2f')}" for kind, one in values["texts"].items())
    sure = [
        name
        for name, found in pooled.items()
        if not found["difference_points"][1] <= 0 <= found["difference_points"][2]
    ]
    said.append(
        f"Exact itself needs, in bits per byte: {needed}. So few rows tell a difference of accuracy from chance for "
        f"{', '.join(sure) or 'no policy'}; bits per byte see one sooner."
    )
    return " ".join(said)


def draw(values: Values, figure: Figure) -> None:
    figure.set_size_inches(11, 4.4)
    axes = figure.subplots(1, 3, width_ratios=(1.5, 1.5, 1))
    names = [name for name in values["pooled"] if name != "exact"]
    pooled = {name: {"difference_points": values["pooled"][name]["difference_points"]} for name in names}
    kinds = {
        "points above exact": ({**values["sets"], "all": pooled}, "difference_points", 0),
        "latency over exact's (modelled)": (values["sets"], "latency_over_exact", 1),
        "bits per byte over exact's": (values["texts"], "over_exact", 1),
    }
    for place, (title, (groups, key, even)) in zip(axes, kinds.items(), strict=True):
        for number, name in enumerate(names):
            at = [k + 0.13 * (number - (len(names) - 1) / 2) for k in range(len(groups))]
            error_bars(
                place, at, [group[name][key] for group in groups.values()], color=colour_of(name), label=name, ls="none",
                ms=3.5,
            )  # fmt: skip
        place.axhline(even, color="#bbbbbb", lw=0.8)
        place.set_title(title)
        place.set_xlim(-0.5, len(groups) - 0.5)
        place.set_xticks(range(len(groups)), list(groups), rotation=35, ha="right")
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)


main = experiment("Seven sets, code, sums and chat", measure, finding, draw)

if __name__ == "__main__":
    main()
