"""Experiment 8: what a user feels: time to the first token and time per token, against published thresholds of perception.

    python scripts/experiments/e08_perception.py --data-dir DIR --json FILE --plot FILE.png

Bundled questions in the model's chat template, and pages of text, are fed to the model on modelled links in virtual time; then
the tokens of a reference answer one by one, so that every policy says the same words and only their pace differs.

Thresholds: 0.1 s seems immediate, 1 s keeps a train of thought, 10 s keeps attention (R. B. Miller, Response time in
man-computer conversational transactions, AFIPS 1968; S. Card, G. Robertson, J. Mackinlay, CHI 1991; J. Nielsen, Usability
Engineering, 1993, chapter 5). Adults read 238 English words a minute in silence (M. Brysbaert, Journal of Memory and Language
109, 2019); how many tokens a word has is counted on the text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

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
    spell,
    table,
)
from scripts.experiments._model import SAMPLE, TESTBED, bundle, texts
from scripts.experiments._more import chosen, open_tapped
from wdmoe.bs.chat import load_chat_template
from wdmoe.bs.config import VirtualConfig
from wdmoe.bs.experiment import load_tokenizer
from wdmoe.bs.generation import CachedModel
from wdmoe.bs.policies import parse_policy
from wdmoe.bs.station import Station
from wdmoe.profiles.link_profile import modelled_link

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINKS = ("ethernet-1g", "wifi-6-near", "wifi-6-mid", "wifi-5ghz-mid", "wifi-5ghz-far")
QUESTIONS, PAGES, ANSWER_TOKENS, PAGE_TOKENS = 6, 2, 8, 192
IMMEDIATE_S, THOUGHT_S, ATTENTION_S = 0.1, 1.0, 10.0
WORDS_PER_MINUTE = 238
CLASSES = ((IMMEDIATE_S, "immediate"), (THOUGHT_S, "within a train of thought"), (ATTENTION_S, "within attention"))


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked, and what is answered."""

    token_ids: tuple[int, ...]
    answer: tuple[int, ...]


def measure(settings: Settings) -> Values:
    links = LINKS[::3] if settings.short else LINKS
    names = ["exact", *chosen()]
    folder = bundle(settings)
    found: Values = {}
    for link in links:
        # A cable is full duplex, and each device has its own; what is on WiFi shares the channel.
        channel: Literal["shared", "orthogonal"] = "shared" if modelled_link(link).half_duplex else "orthogonal"
        arm = VirtualConfig(
            TESTBED.devices, (link,), channel, None, TESTBED.shape, TESTBED.cost_precision, TESTBED.stage_ms
        )
        found[link] = {}
        for name in names:
            with open_tapped(folder, arm) as station:
                questions, pages = prompts(settings, station)
                found[link][name] = felt(station, name, questions, pages)
        progress(f"{link}: done under {len(names)} policies")
    with open_tapped(folder) as station:
        questions, pages = prompts(settings, station)
        rate = tokens_per_word(settings, station)
    return {
        "questions": len(questions),
        "pages": len(pages),
        "question_tokens": float(np.mean([len(question.token_ids) for question in questions])),
        "page_tokens": float(np.mean([len(page.token_ids) for page in pages])),
        "tokens_per_word": rate,
        "reading_ms_a_token": 60e3 / WORDS_PER_MINUTE / rate,
        "links": found,
    }


def prompts(settings: Settings, station: Station) -> tuple[list[Prompt], list[Prompt]]:
    """Return questions with their answers, and pages of text with how they go on."""
    tokenizer = load_tokenizer(station)
    template = load_chat_template(station.folder, station.manifest, tokenizer)
    rows = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    answer_tokens = 3 if settings.short else ANSWER_TOKENS

    def encoded(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

    questions = [
        Prompt(
            encoded(template.render([{"role": "user", "content": row["goal"]}])), encoded(row["sol1"])[:answer_tokens]
        )
        for row in rows[: 2 if settings.short else QUESTIONS]
    ]
    pages: list[Prompt] = []
    for text in list(texts(settings).values())[: 1 if settings.short else PAGES]:
        ids = encoded(text[len(text) // 2 :][: 16 * PAGE_TOKENS])[: PAGE_TOKENS + 1]
        pages.append(Prompt(ids[:-1], ids[-1:]))
    return questions, pages


def felt(station: Station, policy: str, questions: Sequence[Prompt], pages: Sequence[Prompt]) -> Values:
    """Return the time to the first token of questions and of pages, and the time per token, in seconds."""
    model = CachedModel(station.pipeline, station.manifest.model, parse_policy(policy))
    clock = station.hub.clock

    def took_s(tokens: Sequence[int]) -> float:
        started_s = clock.now_s()
        model.feed(tokens)
        return clock.now_s() - started_s

    def first_s(prompt: Prompt) -> float:
        model.rewind([-1], 1)  # nothing of the prompt before it is kept
        model.rewind(prompt.token_ids, len(prompt.answer))
        return took_s(prompt.token_ids)

    first: list[float] = []
    each: list[float] = []
    for question in questions:
        first.append(first_s(question))
        each.append(float(np.mean([took_s([token]) for token in question.answer])))
    page = [first_s(prompt) for prompt in pages]
    return {"first_s": first, "page_s": page, "token_s": each, "first": _mean(first), "token": _mean(each)}


def tokens_per_word(settings: Settings, station: Station) -> float:
    """Count tokens and words of some text."""
    samples = [text[len(text) // 3 :][:20_000] for text in texts(settings).values()]
    tokenizer = load_tokenizer(station)
    tokens = sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in samples)
    return tokens / sum(len(text.split()) for text in samples)


def _mean(values: Sequence[float]) -> Interval:
    numbers = np.array(values)
    return bootstrap(lambda drawn: float(numbers[drawn].mean()), len(numbers))


def finding(values: Values) -> str:
    reading_s = values["reading_ms_a_token"] / 1e3
    links = values["links"]
    keeping = [link for link, policies in links.items() if policies["exact"]["token"][2] <= reading_s]
    changed = [
        f"{name} on {link}"
        for link, policies in links.items()
        for name, one in policies.items()
        if one["token"][2] <= reading_s < policies["exact"]["token"][1]
        or _class(one["first"][0]) != _class(policies["exact"]["first"][0])
    ]
    said = (
        f"Modelled on the testbed's three devices, charged as Mixtral's experts; questions of {values['question_tokens']:.0f} "
        f"tokens, pages of {values['page_tokens']:.0f}. Reading pace ({WORDS_PER_MINUTE} words a minute, "
        f"{values['tokens_per_word']:.2f} tokens a word) allows {1e3 * reading_s:.0f} ms a token. Exact keeps up with reading "
        f"on {', '.join(keeping) or 'none of these links'}. A threshold is crossed that exact misses by "
        f"{', '.join(changed) or 'no policy on any of these links'}; elsewhere a gain is measured, but not felt."
    )
    rows: list[list[str]] = []
    for link, policies in links.items():
        quick = min((name for name in policies if name != "exact"), key=lambda name: float(policies[name]["first"][0]))
        for name in ("exact", quick):
            one = policies[name]
            rows.append(
                [
                    f"{link}, {name}",
                    f"{spell(one['first'], '.2f')}",
                    _class(one["first"][0]),
                    f"{np.mean(one['page_s']):.1f}",
                    spell([1e3 * end for end in one["token"]], ".0f"),
                    _pace(one["token"], reading_s),
                ]
            )
    heads = (
        "link, exact and the policy that is quickest there", "first token of a question, s", "which is", "of a page, s",
        "each further token, ms", "than reading",
    )  # fmt: skip
    return f"{said}\n\n{table(heads, rows)}"


def _class(seconds: float) -> str:
    return next((name for limit, name in CLASSES if seconds <= limit), "beyond attention")


def _pace(interval: Sequence[float], reading_s: float) -> str:
    return "faster" if interval[2] <= reading_s else "slower" if interval[1] > reading_s else "as fast"


def draw(values: Values, figure: Figure) -> None:
    from matplotlib.ticker import NullFormatter

    figure.set_size_inches(10.5, 4.7)
    axes = figure.subplots(1, 2)
    links = list(values["links"])
    for place, key, title in ((axes[0], "first", "to the first token of a question"), (axes[1], "token", "per token")):
        names = list(values["links"][links[0]])
        for number, name in enumerate(names):
            at = [k + 0.11 * (number - (len(names) - 1) / 2) for k in range(len(links))]
            points = [values["links"][link][name][key] for link in links]
            marked_bars(place, at, points, [name == "exact"] * len(links), colour_of(name), name, ls="none")
        place.set(yscale="log", title=f"seconds {title} (modelled)")
        place.yaxis.set_major_formatter("{x:g}")
        place.yaxis.set_minor_formatter("{x:g}" if key == "token" else NullFormatter())
        place.set_xticks(range(len(links)), [link.replace("-", "-\n", 1) for link in links], fontsize=8)
        place.set_xlim(-0.5, len(links) - 0.25)
    for limit, what in CLASSES:
        axes[0].axhline(limit, color="#999999", lw=0.8, ls="--")
        axes[0].annotate(
            f"{limit:g} s: {what}", (0.01, limit), xycoords=("axes fraction", "data"), xytext=(0, 2),
            textcoords="offset points", fontsize=7, color="#555555",
        )  # fmt: skip
    reading_s = values["reading_ms_a_token"] / 1e3
    axes[1].axhline(reading_s, color="#999999", lw=0.8, ls="--")
    axes[1].annotate(
        f"reading pace, {1e3 * reading_s:.0f} ms", (0.01, reading_s), xycoords=("axes fraction", "data"), xytext=(0, 2),
        textcoords="offset points", fontsize=7, color="#555555",
    )  # fmt: skip
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(min(0.05, low), max(20.0, high))
    handles = [*axes[1].get_legend_handles_labels()[0], hollow(UNMEASURED)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)


main = experiment("What a user feels", measure, finding, draw)

if __name__ == "__main__":
    main()
