"""`wdmoe-bs calibrate`."""

from __future__ import annotations

from pathlib import Path

import click

from wdmoe.bs.cli_common import DEFAULTS, progress_bars, reported_errors, say
from wdmoe.bs.config import StationConfig

_BYTES_A_TOKEN = 16  # of a text, at most


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), default=DEFAULTS.bundle, help="The whole bundle.")
@click.option(
    "--text",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    help="A text like those to come.",
)
@click.option(
    "--tokens", type=click.IntRange(min=128), default=1024, help="Of the text, which is read once for each block."
)
@click.option("--threads", type=click.IntRange(min=1), default=DEFAULTS.threads, help="Threads of the stages.")
def calibrate(bundle: Path, text: Path, tokens: int, threads: int) -> None:
    """Measure how much leaving experts out costs in each block, so that policies can be told what they may lose.

    The whole bundle runs in this process; no device is needed. What is found is kept beside the manifest, and policies
    then take loss=NATS (as in bottleneck:loss=0.01) in place of a budget: the divergence from exact that a token may
    cost; --policy auto then keeps to one. Calibrate norms first (wdmoe-export calibrate) to have both kinds of
    importance.
    """
    with reported_errors():
        from wdmoe.bs.calibrating import measure_sensitivity, n_steps
        from wdmoe.bs.experiment import load_tokenizer
        from wdmoe.bs.sensitivity import write_sensitivity
        from wdmoe.bs.virtual import in_this_process, open_virtual_station

        with open_virtual_station(StationConfig(bundle, threads=threads), in_this_process(bundle), say) as station:
            with text.open(errors="replace") as file:
                ids = load_tokenizer(station).encode(file.read(_BYTES_A_TOKEN * tokens)).ids[:tokens]
            name = "blocks"
            with progress_bars({name: n_steps(station.manifest)}) as advance:
                found = measure_sensitivity(station.pipeline, station.manifest, ids, lambda: advance(name))
            path = write_sensitivity(station.folder, found)
        blocks = found.by_importance["weight"]
        most = max(range(len(blocks)), key=lambda block: blocks[block].nats)
        least = min(range(len(blocks)), key=lambda block: blocks[block].nats)
        ratio = blocks[most].nats / blocks[least].nats
        say(f"wrote {path}: {found.tokens:,} tokens; block {most} minds {ratio:.3g} times as much as block {least}")
