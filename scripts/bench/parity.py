"""How close the distributed model comes to transformers, through real device processes and `--wire fp32`.

    python scripts/bench/parity.py --json -

Tiny random checkpoints of every family under both of its namings, and the small real model; four prompts each: the
prompt at once (prefill), then 32 greedy tokens with the KV cache (decode). The figures at the top of the result are the
worst over all. transformers is then shown prompt and answer in one pass, in float32 and in float64. The reference is its
own float32 error, the difference between the two. Ours is taken against both, and the larger counts. Errors are root mean squares
over all logits of a phase: two independent roundings of equal size give a ratio of 1 against float64 and of 1.4 against
float32, and unlike the ratio of two maxima it does not hang on a single logit. The maxima are reported beside it.

The bars: the error ratio is at most 2 for each model and phase; the most likely token is that of transformers in
float32 at every position. Where two experts are nearly tied in a router, a rounding decides who is asked: tokens
whose k-th and (k+1)-th router logit differ by less than 1e-5 in any block are listed. A model that misses a bar with
them is compared again without them; left out may be less than 1 % of all tokens. NOTE: transformers computes norms,
rotary angles and router softmax in float32 also in a float64 model, so its float64 logits carry a little of that
rounding, which is in both errors.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
import tiny
from processes import device_processes, exit_on_sigterm, free_address

from scripts.bench._environment import environment, progress, write_json
from wdmoe.bs.config import StationConfig
from wdmoe.bs.microbatch import pack_sequence
from wdmoe.bs.policies import Exact
from wdmoe.bs.stages import new_cache
from wdmoe.bs.station import Station, open_station
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.export.models import SMALL_MODEL, find_checkpoint

MAX_RATIO = 2.0
MIN_MARGIN = 1e-5  # of router logits
MAX_EXCLUDED_SHARE = 0.01
GENERATED = 32  # tokens after each prompt
# Name -> family, and whether tensors are named as transformers 5 holds them instead of as published.
TINY = {
    f"tiny-{family.replace('_', '-')}{'-fused' if fused else ''}": (family, fused)
    for family in tiny.FAMILIES
    for fused in (False, True)
}

Double = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

PROMPTS = (
    (
        "The ferry to the northern islands leaves twice a day, at seven in the morning and at four in the afternoon, "
        "and the crossing takes about"
    ),
    (
        "To keep bread fresh for longer, wrap it in a clean cotton cloth and put it in a wooden box. Do not keep it in "
        "the fridge, because"
    ),
    (
        "Question: A train travels 120 kilometres in an hour and a half. How fast is it on average?\n"
        "Answer: Divide the distance by the time. The train"
    ),
    "def mean(values):\n    # Return the arithmetic mean of a list of numbers, or None for an empty list.\n    if not",
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What our model made of one prompt: rows 0 .. len(prompt) - 1 are prefill, the rest decode."""

    prompt: list[int]
    token_ids: list[int]  # that were fed: the prompt and all generated tokens but the last
    logits: Double  # [len(token_ids), vocab]


@dataclass(frozen=True, slots=True)
class Reference:
    """What transformers makes of the same tokens in one pass."""

    single: Double  # [n, vocab], computed in float32
    double: Double  # [n, vocab], computed in float64
    margin: Double  # [n], smallest over the blocks: k-th minus (k+1)-th router logit
    flipped: Bools  # [n], whether float32 and float64 ask different experts in some block


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint and what to ask of it."""

    name: str
    checkpoint: Path
    prompts: list[list[int]]


@click.command()
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, allow_dash=True), help="Keep the result; - prints it."
)
@click.option(
    "--model", "names", multiple=True, default=(*TINY, SMALL_MODEL), show_default=True,
    help="What to compare: tiny random models, or what wdmoe-export takes, such as a checkpoint folder.",
)  # fmt: skip
def main(target: str | None, names: tuple[str, ...]) -> None:
    """Compare the distributed model with transformers; exit code 1 if a bar is missed."""
    exit_on_sigterm()
    models: dict[str, dict[str, Any]] = {}
    for name in names:
        with tempfile.TemporaryDirectory(prefix="wdmoe-parity-") as scratch:
            model = tiny_model(name, Path(scratch)) if name in TINY else real_model(name)
            models[model.name] = measure(model, Path(scratch))
    phases = [phase for model in models.values() for phase in model["phases"].values()]
    tokens, near_tied, excluded = (
        sum(model[key] for model in models.values()) for key in ("tokens", "near_tied_tokens", "excluded_tokens")
    )
    result = {
        "error_over_reference": max(phase["error_over_reference"] for phase in phases),
        "max_error_over_reference": max(phase["max_error_over_reference"] for phase in phases),
        "argmax_mismatches": sum(phase["argmax_mismatches"] for phase in phases),
        "excluded_tokens": excluded,
        "excluded_share": excluded / tokens,
        "near_tied_tokens": near_tied,
        "tokens": tokens,
        "generated_tokens": GENERATED,
        "wire": "fp32",
        "bars": {
            "error_over_reference": MAX_RATIO,
            "argmax_mismatches": 0,
            "excluded_share": MAX_EXCLUDED_SHARE,
            "router_margin": MIN_MARGIN,
        },
        "models": models,
        **environment(("torch", "transformers", "numpy", "onnxruntime", "pyzmq")),
    }
    missed = [
        text
        for text, is_missed in (
            (f"error_over_reference {result['error_over_reference']:.2f}", result["error_over_reference"] > MAX_RATIO),
            (f"argmax_mismatches {result['argmax_mismatches']}", result["argmax_mismatches"] > 0),
            (f"excluded_share {result['excluded_share']:.2%}", result["excluded_share"] >= MAX_EXCLUDED_SHARE),
        )
        if is_missed
    ]
    result["passed"] = not missed
    _print_table(models)
    progress(f"missed: {', '.join(missed)}" if missed else "all bars are met")
    if target is not None:
        write_json(target, result)
    sys.exit(1 if missed else 0)


def measure(model: Model, scratch: Path) -> dict[str, Any]:
    """Export a model, run it through four device processes, compare it with transformers."""
    progress(f"{model.name}: exporting")
    config = ExportConfig(scratch / "bundle", devices=4)
    export_bundle(plan_export(model.checkpoint, model.name, config), config)
    address = free_address()
    with device_processes(config.out, address):
        station = StationConfig(bundle=config.out, listen=address, wire="fp32")
        with open_station(station, lambda text: progress(f"{model.name}: {text}")) as open_:
            answers = [answer_prompt(open_, prompt) for prompt in model.prompts]
            model_spec, precision = open_.manifest.model, open_.manifest.precision
            devices = sorted(open_.hub.devices)
    progress(f"{model.name}: asking transformers")
    references = ask_transformers(model.checkpoint, [answer.token_ids for answer in answers], model_spec.top_k)
    return {
        "family": model_spec.family,
        "blocks": model_spec.n_blocks,
        "experts": model_spec.n_experts,
        "top_k": model_spec.top_k,
        "expert_precision": precision,
        "devices": devices,
        "prompt_tokens": [len(answer.prompt) for answer in answers],
        **compare(answers, references),
    }


def answer_prompt(station: Station, prompt: list[int]) -> Answer:
    """Feed the prompt at once, then one greedy token after the other."""
    cache = new_cache(station.manifest, len(prompt) + GENERATED)
    window = station.manifest.model.sliding_window
    fed, logits = list(prompt), []
    step = prompt
    for _ in range(GENERATED):
        microbatch = pack_sequence("parity", step, cache, window, all_logits=True)
        ((_, result, _),) = station.pipeline.run([microbatch], Exact())
        assert result.logits is not None
        logits.append(result.logits)
        step = [int(result.logits[-1].argmax())]
        fed += step
    return Answer(prompt, fed[:-1], np.concatenate(logits).astype(np.float64))


def ask_transformers(checkpoint: Path, sequences: Sequence[list[int]], top_k: int) -> list[Reference]:
    """Run sequences through the whole model, in float32 and in float64."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",  # the grouped one has no float64
    ).eval()

    def run(token_ids: list[int]) -> tuple[Double, Double, Bools]:
        with torch.no_grad():
            out = model(torch.tensor([token_ids]), output_router_logits=True)
        logits = torch.stack(out.router_logits).double()  # [blocks, n, experts]
        ordered = logits.sort(-1, descending=True).values
        margin = ordered[..., top_k - 1] - ordered[..., top_k]
        chosen = torch.zeros_like(logits).scatter(-1, logits.topk(top_k).indices, 1.0).bool()
        return out.logits[0].double().numpy(), margin.amin(0).numpy(), chosen.numpy()

    single = [run(token_ids) for token_ids in sequences]
    model.double()
    double = [run(token_ids) for token_ids in sequences]
    return [
        Reference(one[0], two[0], np.minimum(one[1], two[1]), (one[2] != two[2]).any((0, 2)))
        for one, two in zip(single, double, strict=True)
    ]


def compare(answers: Sequence[Answer], references: Sequence[Reference]) -> dict[str, Any]:
    """Compare phase by phase; tokens whose routing hangs on a rounding are left out if it takes that."""
    near_ties = [
        {"prompt": number, "position": int(position), "router_margin": float(reference.margin[position])}
        for number, reference in enumerate(references)
        for position in np.flatnonzero(reference.margin < MIN_MARGIN)
    ]
    everything = [np.ones(len(answer.token_ids), np.bool_) for answer in answers]
    all_tokens = phases = _compare_phases(answers, references, everything)
    excluded = 0
    if any(_missed(phase) for phase in all_tokens.values()):
        excluded = len(near_ties)
        phases = _compare_phases(answers, references, [reference.margin >= MIN_MARGIN for reference in references])
    return {
        "tokens": sum(map(len, everything)),
        "excluded_tokens": excluded,
        "near_tied_tokens": len(near_ties),
        "near_ties": near_ties,
        "smallest_router_margin": min(float(reference.margin.min()) for reference in references),
        "routing_flips_of_transformers": sum(int(reference.flipped.sum()) for reference in references),
        "phases": phases,
        "phases_with_all_tokens": all_tokens,
    }


def _compare_phases(
    answers: Sequence[Answer], references: Sequence[Reference], kept: Sequence[Bools]
) -> dict[str, dict[str, Any]]:
    prefill = [np.arange(len(answer.token_ids)) < len(answer.prompt) for answer in answers]
    return {
        phase: _compare_rows(
            answers, references, [(rows == (phase == "prefill")) & of for rows, of in zip(prefill, kept, strict=True)]
        )
        for phase in ("prefill", "decode")
    }


def _missed(phase: dict[str, Any]) -> bool:
    return bool(phase["error_over_reference"] > MAX_RATIO or phase["argmax_mismatches"])


def _compare_rows(answers: Sequence[Answer], references: Sequence[Reference], rows: Sequence[Bools]) -> dict[str, Any]:
    ours = _joined([answer.logits for answer in answers], rows)
    single = _joined([reference.single for reference in references], rows)
    double = _joined([reference.double for reference in references], rows)
    against_single, against_double, reference_error = ours - single, ours - double, single - double
    single_rms, double_rms, reference_rms = (
        float(np.sqrt(np.mean(np.square(e)))) for e in (against_single, against_double, reference_error)
    )
    rms, largest = max(single_rms, double_rms), float(max(np.abs(against_single).max(), np.abs(against_double).max()))
    reference_largest = float(np.abs(reference_error).max())
    return {
        "tokens": len(ours),
        "error_over_reference": rms / reference_rms,
        "error_over_reference_float32": single_rms / reference_rms,
        "error_over_reference_float64": double_rms / reference_rms,
        "rms_error": rms,
        "reference_rms_error": reference_rms,
        "max_error_over_reference": largest / reference_largest,
        "max_error": largest,
        "reference_max_error": reference_largest,
        "rms_logit": float(np.sqrt(np.mean(np.square(double)))),
        "argmax_mismatches": int((ours.argmax(1) != single.argmax(1)).sum()),
        "argmax_mismatches_float64": int((ours.argmax(1) != double.argmax(1)).sum()),
    }


def _joined(rows: Sequence[Double], kept: Sequence[Bools]) -> Double:
    return np.concatenate([part[which] for part, which in zip(rows, kept, strict=True)])


def tiny_model(name: str, scratch: Path) -> Model:
    """Make a random checkpoint and random prompts."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, tiny.VOCAB, length).tolist() for length in (20, 32, 45, 60)]
    family, fused = TINY[name]
    return Model(name, tiny.tiny_checkpoint(scratch / "checkpoint", family, fused=fused), prompts)


def real_model(word: str) -> Model:
    """Find a checkpoint as wdmoe-export does, and put our prompts into its tokens."""
    from tokenizers import Tokenizer

    checkpoint, name = find_checkpoint(word, progress)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return Model(name, checkpoint, [tokenizer.encode(text).ids for text in PROMPTS])


def _print_table(models: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("model", "phase", "tokens", "tied, out", "rms error", "ratio", "of max", "argmax"):
        table.add_column(heading, justify="left" if heading in ("model", "phase") else "right", no_wrap=True)
    for name, model in models.items():
        for phase, values in model["phases"].items():
            near = f"{model['near_tied_tokens']}, {model['excluded_tokens']}"
            table.add_row(
                *(name if phase == "prefill" else "", phase, str(values["tokens"])),
                near if phase == "prefill" else "",
                *(f"{values['rms_error']:.1e}", f"{values['error_over_reference']:.2f}"),
                f"{values['max_error_over_reference']:.2f}",
                "same" if values["argmax_mismatches"] == 0 else f"{values['argmax_mismatches']} differ",
            )
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
