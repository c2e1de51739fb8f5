"""Is one device folder's expert faster than another's, and do they answer alike? Both are called in turns, in one process.

    python scripts/bench/two_folders.py BEFORE/device-0 AFTER/device-0 --json -

For a change of graphs, of a release of ONNX Runtime's files, or of precision: export with the one and with the other, and compare
ratios, which hold on a machine whose speed comes and goes. For each number of rows: the median time of each, and the median of
after over before, turn by turn; and the largest difference of their answers to random rows, over the largest value. Exit code 0.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path += [str(Path(__file__).parents[2])]
from scripts.bench._environment import environment, progress, write_json
from wdmoe.device.config import DeviceConfig
from wdmoe.runtime.engines import ENGINES, ExpertEngine, load_engine
from wdmoe.runtime.errors import BundleError, EngineError
from wdmoe.runtime.manifest import DeviceManifest, read_manifest

_FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


@click.command(context_settings={"show_default": True})
@click.argument("before", type=_FOLDER)
@click.argument("after", type=_FOLDER)
@click.option("--engine", type=click.Choice([*ENGINES]), default="onnxruntime")
@click.option("--threads", type=click.IntRange(min=1), default=DeviceConfig().threads)
@click.option("--rows", multiple=True, type=click.IntRange(min=1), default=(1, 4, 16, 64, 256))
@click.option("--turns", type=click.IntRange(min=2), default=20, help="For each number of rows.")
@click.option("--json", "target", metavar="FILE", help="Write the result as JSON; - for stdout.")
def main(
    before: Path, after: Path, engine: str, threads: int, rows: tuple[int, ...], turns: int, target: str | None
) -> None:
    """Compare the first expert of two device folders."""
    try:
        manifests = [read_manifest(folder, DeviceManifest) for folder in (before, after)]
        entries = [manifest.experts[0] for manifest in manifests]
        engines = [
            load_engine(engine, folder, [entry], threads)
            for folder, entry in zip((before, after), entries, strict=True)
        ]
    except (BundleError, EngineError) as error:
        raise click.ClickException(str(error)) from error
    shapes = [f"{manifest.model.d_model}x{manifest.model.d_ff}" for manifest in manifests]
    if shapes[0] != shapes[1]:
        raise click.ClickException(f"{before} has experts of {shapes[0]}, {after} of {shapes[1]}: nothing to compare")
    asked = [(one, entry.block, entry.expert) for one, entry in zip(engines, entries, strict=True)]
    rng = np.random.default_rng(0)
    found = {
        str(n): compared(asked, rng.standard_normal((n, manifests[0].model.d_model), np.float32), turns) for n in rows
    }
    for n, one in found.items():
        progress(
            f"{n} rows: {one['before_ms']:.2f} ms before, {one['after_ms']:.2f} after, ratio {one['ratio']:.3f}; answers "
            f"{one['difference']:.1e} apart"
        )
    if target is not None:
        result = {
            "shape": shapes[0],
            "precisions": [manifest.precision for manifest in manifests],
            "engine": engine,
            "threads": threads,
            "turns": turns,
            "rows": found,
            **environment(("numpy", "onnxruntime")),
        }
        write_json(target, result)


def compared(asked: list[tuple[ExpertEngine, int, int]], rows: Any, turns: int) -> dict[str, float]:
    """Call both in turns; a call of each before the first turn is not counted."""
    answers = [engine.run(block, expert, rows) for engine, block, expert in asked]
    taken_ms = np.empty((turns, 2))
    for turn in range(turns):
        for which, (engine, block, expert) in enumerate(asked):
            started_s = time.perf_counter()
            engine.run(block, expert, rows)
            taken_ms[turn, which] = (time.perf_counter() - started_s) * 1e3
    before_ms, after_ms = np.median(taken_ms, axis=0)
    return {
        "before_ms": float(before_ms),
        "after_ms": float(after_ms),
        "ratio": float(np.median(taken_ms[:, 1] / taken_ms[:, 0])),
        "difference": float(np.abs(answers[1] - answers[0]).max() / np.abs(answers[0]).max()),
    }


if __name__ == "__main__":
    main()
