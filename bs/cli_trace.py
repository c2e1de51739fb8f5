"""`wdmoe-bs trace`."""

from __future__ import annotations

from pathlib import Path

import click

from wdmoe.bs.cli_common import DEFAULTS, data_dir_option, progress_bars, reported_errors, say
from wdmoe.bs.config import StationConfig
from wdmoe.runtime.outputs import NewFile


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), default=DEFAULTS.bundle, help="The folder `bs` of a bundle.")
@click.option(
    "--dataset", "datasets", multiple=True, required=True, help="What to answer, as for wdmoe-bs run; several times."
)
@data_dir_option
@click.option("--limit", type=click.IntRange(min=1), help="Only the first rows of each data set.")
@click.option("--threads", type=click.IntRange(min=1), default=DEFAULTS.threads, help="Threads of the stages.")
@click.option("--out", type=NewFile(), default=Path("trace.npz"), help="The trace to write.")
def trace(
    bundle: Path, datasets: tuple[str, ...], data_dir: Path | None, limit: int | None, threads: int, out: Path
) -> None:
    """Record what the model's routers say to each token of a data set, for wdmoe-bs simulate.

    The whole bundle runs in this process, exactly; no device is needed. The file holds the probabilities of all experts
    as float16, where each question begins, and how often each expert is chosen.
    """
    with reported_errors():
        import numpy as np

        from wdmoe.bs.evaluation import evaluate, load_task
        from wdmoe.bs.experiment import load_tokenizer, max_length
        from wdmoe.bs.importance import norms_of_text
        from wdmoe.bs.policies import Exact
        from wdmoe.bs.scoring import DistributedScorer
        from wdmoe.bs.trace import Recorder, trace_info, write_trace
        from wdmoe.bs.virtual import in_this_process, open_virtual_station

        config = StationConfig(bundle, threads=threads)
        tasks = [load_task(name, data_dir) for name in dict.fromkeys(datasets)]
        rows = {task.dataset: task.count(limit) for task in tasks}
        with open_virtual_station(config, in_this_process(bundle), say) as station:
            model, tokenizer = station.manifest.model, load_tokenizer(station)
            recorder = Recorder(model.n_blocks, model.top_k)
            station.pipeline.on_router = recorder.on_router
            with progress_bars(rows) as on_question:
                for task in tasks:

                    def answered(dataset: str = task.dataset) -> None:
                        on_question(dataset)

                    evaluate(
                        task,
                        DistributedScorer(station.pipeline, Exact(), 1, model.sliding_window),
                        tokenizer,
                        max_length=max_length(station),
                        limit=limit,
                        on_question=answered,
                        prefix_token_id=model.bos_token_id,
                    )
            digests = {task.dataset: task.digest(limit) for task in tasks}
            placement = np.array([[holders[0] for holders in block] for block in station.manifest.placement])
            info = trace_info(station, rows, digests)
            recorded = recorder.trace(info, placement, norms_of_text(station.manifest))
        write_trace(out, recorded)
        tokens = recorded.probabilities.shape[1]
        say(
            f"wrote {out}: {recorded.n_questions} microbatches, {tokens:,} tokens x {recorded.n_blocks} blocks x "
            f"{recorded.n_experts} experts, {out.stat().st_size / 1e6:.1f} MB"
        )
