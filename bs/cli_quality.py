"""`wdmoe-bs quality`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from wdmoe.bs.cli_common import (
    command_line,
    data_dir_option,
    json_option,
    model_options,
    parse_policies,
    print_table,
    progress_bars,
    reported_errors,
    say,
    station_options,
    throughput_options,
    write_json,
)
from wdmoe.bs.cli_virtual import open_any_station, read_virtual, virtual_options
from wdmoe.bs.config import StationConfig

# As `wdmoe.bs.quality.ACCURACY_SETS`, which costs an import of numpy.
_DATASETS = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande")


@click.command()
@station_options
@click.option(
    "--policy", "policies", multiple=True, default=("wlr",), help="What to compare with exact; as for wdmoe-bs run."
)
@click.option(
    "--dataset", "datasets", multiple=True, default=_DATASETS, help="Choice questions; may be given several times."
)
@data_dir_option
@click.option("--rows", type=click.IntRange(min=1), help="Only the first rows of each data set.")
@click.option("--tokens", type=click.IntRange(min=1), help="Only the first tokens of wikitext2.")
@model_options
@throughput_options
@virtual_options
@json_option
def quality(
    policies: tuple[str, ...],
    datasets: tuple[str, ...],
    data_dir: Path | None,
    rows: int | None,
    tokens: int | None,
    json_path: Path | None,
    clock: str,
    **station: Any,
) -> None:
    """Hold policies against the quality bar.

    Perplexity of wikitext2 at most 1.02 x the exact one; mean KL from exact on the tokens of the answers at most
    0.02 nats; and, over at least 5,000 rows, the lower end of the 95 % interval of the paired accuracy difference
    at least -1.0 points.

    With --clock virtual the bundle's devices run in this process, and latencies, which policies look at, are modelled.
    With --json FILE what is done is kept in FILE.unfinished; the same command given again goes on from there.
    """
    with reported_errors():
        from wdmoe.bs.evaluation import load_task
        from wdmoe.bs.experiment import load_tokenizer, max_length
        from wdmoe.bs.quality import PERPLEXITY_SET, Finished, QualityBar, measure_quality, text_windows
        from wdmoe.bs.results import circumstances, describe_quality, describe_station, read_finished, write_finished
        from wdmoe.bs.tables import quality_table

        virtual = read_virtual(clock, station)
        config, command, bar = StationConfig(**station), command_line(), QualityBar()
        chosen = list({policy.describe(): policy for policy in parse_policies(policies, config.bundle)}.values())
        tasks = [load_task(name, data_dir) for name in dict.fromkeys(datasets)]
        for task in tasks:
            if not task.has_accuracy:
                raise ValueError(f"--dataset {task.dataset} has no acc for each row, which the bar needs")
        text_task = load_task(PERPLEXITY_SET, data_dir)
        with open_any_station(config, virtual) as open_:
            model, tokenizer = open_.manifest.model, load_tokenizer(open_)
            longest, prefix = max_length(open_), model.bos_token_id
            text = text_windows(text_task, tokenizer, max_length=longest, tokens=tokens, prefix_token_id=prefix)
            kept = None if json_path is None or str(json_path) == "-" else Path(f"{json_path}.unfinished")
            now = circumstances(describe_station(open_, command))
            now |= {"policies": [policy.describe() for policy in chosen], "tokens": tokens}
            finished, refused = read_finished(kept, now) if kept is not None else (Finished(), None)
            if refused is not None:
                say(f"{kept}: nothing of it is used again: {refused}")
            texts_left = 1 + len(chosen) - len(finished.likelihoods)
            steps = {PERPLEXITY_SET: len(text) * texts_left}
            steps |= {task.dataset: task.count(rows) for task in tasks if task.digest(rows) not in finished.parts}
            if finished.likelihoods:
                say(f"{kept}: {texts_left} texts and {len(steps) - 1} data sets are left to do")
            with progress_bars(steps) as on_step:
                qualities = measure_quality(
                    open_.pipeline,
                    chosen,
                    tasks,
                    text,
                    tokenizer,
                    max_length=longest,
                    window=model.sliding_window,
                    in_flight=config.in_flight,
                    batch=config.batch,
                    limit=rows,
                    prefix_token_id=prefix,
                    on_step=on_step,
                    finished=finished,
                    on_finished=lambda done: None if kept is None else write_finished(kept, now, done),
                )
            head = describe_station(open_, command)
        if json_path is None or str(json_path) != "-":
            for measured in qualities:
                print_table(quality_table(measured, bar, text_task.variant))
        if json_path is not None:
            write_json(json_path, describe_quality(head, qualities, bar, text_task))
        if kept is not None:
            kept.unlink(missing_ok=True)
