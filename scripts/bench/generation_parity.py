"""Whether greedy text is that of transformers, through real device processes and `--wire fp32`.

    python scripts/bench/generation_parity.py --json -

Each model continues four prompts by 128 greedy tokens, the way `wdmoe-bs generate` does it (chunked prompt, KV cache,
sampling), but past the end-of-text token. transformers is then shown prompt and answer in one pass in float32: if its
most likely token is ours at every position, its own greedy text is the same, token by token, and after a difference
the rest can still be compared.

The bar: no position differs. Where two experts are nearly tied in a router, a rounding decides who is asked: positions
whose k-th and (k+1)-th router probability differ by less than 1e-5 in any block are listed and left out, and may be
less than 1 % of all. The smallest distance of its two highest logits is reported beside it: how nearly the test
could have hung on a rounding.

With `--kill` (the default) the same prompts are continued once more with a second device process for each folder. In
each answer, at about its 40th token, one of the devices that are being used is killed (SIGKILL, at a random moment of
that token); what takes over must write the same text, held against transformers in the same way (`with_failure`).
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
from processes import device_processes, exit_on_sigterm, free_address

from scripts.bench._environment import environment, progress, write_json
from scripts.bench._system import READY_S, Devices, running_devices, wait_for_names
from scripts.bench.parity import (
    MAX_EXCLUDED_SHARE,
    MIN_MARGIN,
    TINY,
    Model,
    Reference,
    ask_transformers,
    real_model,
    tiny_model,
)
from wdmoe.bs.config import StationConfig
from wdmoe.bs.generation import CachedModel, Completion, Writer, load_tokenizer
from wdmoe.bs.policies import Exact
from wdmoe.bs.sampling import Sampling
from wdmoe.bs.station import Station, open_station
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.export.models import SMALL_MODEL

KILL_AFTER = 40 / 128  # of the answer


@click.command()
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, allow_dash=True), help="Keep the result; - prints it."
)
@click.option(
    "--model", "names", multiple=True, default=(*TINY, SMALL_MODEL), show_default=True,
    help="What to compare: tiny random models, or what wdmoe-export takes, such as a checkpoint folder.",
)  # fmt: skip
@click.option(
    "--tokens", type=click.IntRange(min=2), default=128, show_default=True, help="To write after each prompt."
)
@click.option("--kill/--no-kill", default=True, show_default=True, help="Also with a device killed in each answer.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of who is killed, and when.")
def main(target: str | None, names: tuple[str, ...], tokens: int, kill: bool, seed: int) -> None:
    """Compare greedy text with transformers; exit code 1 if a token differs."""
    exit_on_sigterm()
    models: dict[str, dict[str, Any]] = {}
    for name in names:
        with tempfile.TemporaryDirectory(prefix="wdmoe-generation-") as scratch:
            model = tiny_model(name, Path(scratch)) if name in TINY else real_model(name)
            models[model.name] = found = measure(model, tokens, Path(scratch), kill, np.random.default_rng(seed))
        progress(
            f"{model.name}: {found['tokens']} tokens, {found['mismatches']} differ, {found['excluded_tokens']} left out"
        )
        if kill:
            progress(f"{model.name}, with a device killed in each answer: {found['with_failure']}")
    total, mismatches, excluded = (
        sum(model[key] for model in models.values()) for key in ("tokens", "mismatches", "excluded_tokens")
    )
    passed = mismatches == 0 and excluded / total < MAX_EXCLUDED_SHARE
    with_failure: dict[str, Any] | None = None
    if kill:
        broken = [model["with_failure"] for model in models.values()]
        with_failure = {key: sum(found[key] for found in broken) for key in ("tokens", "differ", "excluded", "killed")}
        with_failure["killed_at_token"] = round(KILL_AFTER * tokens)
        passed &= with_failure["differ"] == 0
        passed &= with_failure["excluded"] / with_failure["tokens"] < MAX_EXCLUDED_SHARE
    result = {
        "passed": passed,
        "mismatches": mismatches,
        "tokens": total,
        "excluded_tokens": excluded,
        "excluded_share": excluded / total,
        "with_failure": with_failure,
        "tokens_per_prompt": tokens,
        "wire": "fp32",
        "bars": {"mismatches": 0, "excluded_share": MAX_EXCLUDED_SHARE, "router_margin": MIN_MARGIN},
        "models": models,
        **environment(("torch", "transformers", "numpy", "onnxruntime", "pyzmq", "tokenizers")),
    }
    progress("all bars are met" if passed else "a bar is missed")
    if target is not None:
        write_json(target, result)
    sys.exit(0 if passed else 1)


def measure(model: Model, tokens: int, scratch: Path, kill: bool, rng: np.random.Generator) -> dict[str, Any]:
    """Export a model, let it write through device processes, compare its text with transformers."""
    progress(f"{model.name}: exporting")
    config = ExportConfig(scratch / "bundle", devices=4)
    export_bundle(plan_export(model.checkpoint, model.name, config), config)
    address = free_address()
    with device_processes(config.out, address):
        station = StationConfig(bundle=config.out, listen=address, wire="fp32")
        with open_station(station, lambda text: progress(f"{model.name}: {text}")) as open_:
            completions = [write(open_, prompt, tokens) for prompt in model.prompts]
            top_k = open_.manifest.model.top_k
    broken, victims = write_with_failures(model, tokens, config.out, rng) if kill else ([], [])
    progress(f"{model.name}: asking transformers")
    pairs = list(zip(2 * model.prompts, (*completions, *broken), strict=False))
    fed = [(*prompt, *done.token_ids[:-1]) for prompt, done in pairs]
    once = list(dict.fromkeys(fed))  # a text that a failure did not change is shown once
    references = dict(zip(once, ask_transformers(model.checkpoint, [list(ids) for ids in once], top_k), strict=True))
    compared = [compare(prompt, done, references[ids]) for (prompt, done), ids in zip(pairs, fed, strict=True)]
    answers, disturbed = compared[: len(completions)], compared[len(completions) :]
    result = {
        "tokens": sum(len(done.token_ids) for done in completions),
        "mismatches": sum(len(answer["differ"]) for answer in answers),
        "excluded_tokens": sum(len(answer["excluded"]) for answer in answers),
        "smallest_router_margin": min(answer["smallest_router_margin"] for answer in answers),
        "smallest_logit_margin": min(answer["smallest_logit_margin"] for answer in answers),
        "answers": answers,
    }
    if kill:
        result["with_failure"] = {
            "tokens": sum(len(done.token_ids) for done in broken),
            "differ": sum(len(answer["differ"]) for answer in disturbed),
            "excluded": sum(len(answer["excluded"]) for answer in disturbed),
            "killed": len(victims),
            "victims": victims,
        }
    return result


def write_with_failures(
    model: Model, tokens: int, bundle: Path, rng: np.random.Generator
) -> tuple[list[Completion], list[dict[str, Any]]]:
    """Continue each prompt with two processes for each folder, and kill one that is used meanwhile.

    Raises:
        RuntimeError: nobody had to take over, so nothing was tried.
    """
    address = free_address()
    config = StationConfig(bundle=bundle, listen=address, wire="fp32")
    completions: list[Completion] = []
    victims: list[dict[str, Any]] = []
    with (
        running_devices(bundle, address, replicas=True) as devices,
        open_station(config, lambda text: progress(f"{model.name}, to be disturbed: {text}")) as station,
    ):
        wait_for_names(station, list(devices.by_name))
        write(station, model.prompts[0], 2)  # the first calls allocate
        for prompt in model.prompts:
            completion, victim = write_with_failure(station, devices, prompt, tokens, rng)
            progress(f"{model.name}: {victim}")
            completions.append(completion)
            victims.append(victim)
    return completions, victims


def write_with_failure(
    station: Station, devices: Devices, prompt: list[int], tokens: int, rng: np.random.Generator
) -> tuple[Completion, dict[str, Any]]:
    """Continue one prompt, kill a device that is used, and have it back before the next."""
    at, requests = round(KILL_AFTER * tokens), station.pipeline.requests
    experts = [(b, e) for b, row in enumerate(station.manifest.placement) for e, _ in enumerate(row)]
    victim = requests.preferred(*experts[int(rng.integers(len(experts)))])
    assert victim is not None
    session = station.hub.devices[victim].session
    before = requests.counts["replaced"] + requests.counts["hedged"]
    timer = threading.Timer(float(rng.uniform(0, 0.01)), devices.by_name[victim].kill)

    def on_token(number: int) -> None:
        if number == at:
            timer.start()

    try:
        completion = write(station, prompt, tokens, on_token)
    finally:
        if timer.ident is not None:
            timer.join()
    took_over = requests.counts["replaced"] + requests.counts["hedged"] - before
    if not took_over:
        raise RuntimeError(f"{victim} was killed at token {at}, but nobody had to take over: nothing was tried")
    standing = requests.fleet.of(victim)
    found = {
        "victim": victim,
        "killed_at_token": at,
        "taken_over": took_over,
        "state": standing.health.value,
        "reason": standing.reason,
    }
    devices.keep()
    wait_until_back(station, victim, session)
    return completion, found


def wait_until_back(station: Station, name: str, session: str) -> None:
    """Turn the loop until a device is there in a new life.

    Raises:
        TimeoutError: it is not after a minute.
    """
    deadline_s = time.monotonic() + READY_S
    while (device := station.hub.devices.get(name)) is None or device.session == session:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{name} did not come back in {READY_S:g} s")
        station.pipeline.idle(0.05)


def write(
    station: Station, prompt: list[int], tokens: int, on_token: Callable[[int], None] = lambda number: None
) -> Completion:
    """Continue a prompt greedily, past the end-of-text token; `on_token` is told of each before it is computed."""
    model = CachedModel(station.pipeline, station.manifest.model, Exact())
    tokenizer = load_tokenizer(station.folder, station.manifest)
    sampling = Sampling(max_tokens=tokens)
    numbers = itertools.count()

    def never() -> bool:
        on_token(next(numbers))
        return False

    return Writer(model, tokenizer, (), station.hub.clock).answer(prompt, sampling, sampling.rng(), cancelled=never)


def compare(prompt: list[int], completion: Completion, reference: Reference) -> dict[str, Any]:
    """Compare the tokens of one answer with transformers' most likely ones."""
    ours = np.array(completion.token_ids)
    predicting = slice(len(prompt) - 1, None)  # the rows whose next token is part of the answer
    theirs = reference.single[predicting].argmax(1)
    margin = reference.margin[predicting]
    logit_margin = np.diff(np.sort(reference.single[predicting], axis=1)[:, -2:], axis=1)
    kept = margin >= MIN_MARGIN
    return {
        "prompt_tokens": len(prompt),
        "text": completion.text,
        "differ": [
            {"token": int(n), "ours": int(ours[n]), "transformers": int(theirs[n])}
            for n in np.flatnonzero((ours != theirs) & kept)
        ],
        "excluded": [
            {"token": int(n), "router_margin": float(margin[n]), "same": bool(ours[n] == theirs[n])}
            for n in np.flatnonzero(~kept)
        ],
        "smallest_router_margin": float(margin.min()),
        "smallest_logit_margin": float(logit_margin.min()),
        "timing": asdict(completion.timing),
    }


if __name__ == "__main__":
    main()
