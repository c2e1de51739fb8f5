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
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
from processes import device_processes, exit_on_sigterm, free_address

from scripts.bench._environment import environment, progress, write_json
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
def main(target: str | None, names: tuple[str, ...], tokens: int) -> None:
    """Compare greedy text with transformers; exit code 1 if a token differs."""
    exit_on_sigterm()
    models: dict[str, dict[str, Any]] = {}
    for name in names:
        with tempfile.TemporaryDirectory(prefix="wdmoe-generation-") as scratch:
            model = tiny_model(name, Path(scratch)) if name in TINY else real_model(name)
            models[model.name] = found = measure(model, tokens, Path(scratch))
        progress(
            f"{model.name}: {found['tokens']} tokens, {found['mismatches']} differ, {found['excluded_tokens']} left out"
        )
    total, mismatches, excluded = (
        sum(model[key] for model in models.values()) for key in ("tokens", "mismatches", "excluded_tokens")
    )
    passed = mismatches == 0 and excluded / total < MAX_EXCLUDED_SHARE
    result = {
        "passed": passed,
        "mismatches": mismatches,
        "tokens": total,
        "excluded_tokens": excluded,
        "excluded_share": excluded / total,
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


def measure(model: Model, tokens: int, scratch: Path) -> dict[str, Any]:
    """Export a model, let it write through four device processes, compare its text with transformers."""
    progress(f"{model.name}: exporting")
    config = ExportConfig(scratch / "bundle", devices=4)
    export_bundle(plan_export(model.checkpoint, model.name, config), config)
    address = free_address()
    with device_processes(config.out, address):
        station = StationConfig(bundle=config.out, listen=address, wire="fp32")
        with open_station(station, lambda text: progress(f"{model.name}: {text}")) as open_:
            completions = [write(open_, prompt, tokens) for prompt in model.prompts]
            top_k = open_.manifest.model.top_k
    progress(f"{model.name}: asking transformers")
    fed = [[*prompt, *done.token_ids[:-1]] for prompt, done in zip(model.prompts, completions, strict=True)]
    references = ask_transformers(model.checkpoint, fed, top_k)
    answers = [
        compare(prompt, done, reference)
        for prompt, done, reference in zip(model.prompts, completions, references, strict=True)
    ]
    return {
        "tokens": sum(len(done.token_ids) for done in completions),
        "mismatches": sum(len(answer["differ"]) for answer in answers),
        "excluded_tokens": sum(len(answer["excluded"]) for answer in answers),
        "smallest_router_margin": min(answer["smallest_router_margin"] for answer in answers),
        "smallest_logit_margin": min(answer["smallest_logit_margin"] for answer in answers),
        "answers": answers,
    }


def write(station: Station, prompt: list[int], tokens: int) -> Completion:
    """Continue a prompt greedily, past the end-of-text token."""
    model = CachedModel(station.pipeline, station.manifest.model, Exact())
    tokenizer = load_tokenizer(station.folder, station.manifest)
    sampling = Sampling(max_tokens=tokens)
    return Writer(model, tokenizer, (), station.hub.clock).answer(prompt, sampling, sampling.rng())


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
