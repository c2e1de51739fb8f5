"""What experiments have in common: a command with its options, a JSON file and a plot, each written whole or not at all.

An experiment is a module with three functions: `measure` makes plain values, `finding` words them, `draw` draws them. The
words and the picture come from the values alone, so that neither can say what was not measured.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).parents[2]
sys.path += [path for path in (str(ROOT / "tests"), str(ROOT)) if path not in sys.path]
from processes import exit_on_sigterm

from scripts.bench._environment import environment, progress
from wdmoe.runtime.errors import WdmoeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ORIGIN = "emulated devices and links, modelled times; answers of the model, where there are any, are real"
WORK = ROOT / ".experiments"
AT_A_TIME = "WDMOE_EXPERIMENTS_AT_A_TIME"  # told by scripts/experiments/run to each of them
SMALL_MODEL, TINY = "smollm2-moe", "tiny"
COLOURS = {
    "exact": "#222222",
    "round-robin": "#888888",
    "wlr": "#cc6677",
    "ser": "#ddaa33",
    "top-cut": "#44aa99",
    "capacity": "#4477aa",
    "bottleneck": "#117733",
}  # of policies, the same in every plot

MISSES, UNMEASURED = "misses the quality bar", "quality not measured here"  # what hollow markers say

_PLOT_COLOURS = 96

Values = dict[str, Any]  # what JSON can hold
Interval = tuple[float, float, float]  # value, and the ends of its 95 % interval


@dataclass(frozen=True, slots=True)
class Settings:
    """What an experiment is told."""

    model: str = SMALL_MODEL  # what `wdmoe-export --model` takes, or `tiny`: a random one
    data_dir: Path | None = None  # with corpus/; None: the bundled questions are the text
    work: Path = WORK  # for what experiments share, such as the bundle
    short: bool = False  # as little as shows that it works

    def key(self, module: Path) -> str:
        """Return what a result is valid for: these settings and the code of the experiment."""
        told = [self.model, str(self.short), "" if self.data_dir is None else str(self.data_dir.resolve())]
        sources = [module.read_bytes()] + [path.read_bytes() for path in sorted(Path(__file__).parent.glob("_*.py"))]
        return hashlib.sha256(b"\0".join([*map(str.encode, told), *sources])).hexdigest()[:16]


def experiment(
    title: str,
    measure: Callable[[Settings], Values],
    finding: Callable[[Values], str],
    draw: Callable[[Values, Figure], None],
) -> click.Command:
    """Make the command of an experiment.

    Args:
        title: one line.
        measure: makes the values.
        finding: says with 95 % intervals what the values show, what did not work included: a paragraph, and where there
            is much to say, a table below it.
        draw: draws them.
    """
    module = Path(inspect.getfile(measure))

    @click.command(name=module.stem, help=inspect.getdoc(inspect.getmodule(measure)))
    @click.option("--data-dir", type=click.Path(path_type=Path, exists=True, file_okay=False), help="With corpus/.")
    @click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Keep the result.")
    @click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw it.")
    @click.option("--model", default=SMALL_MODEL, show_default=True, help="Or tiny: a random one.")
    @click.option("--work", type=click.Path(path_type=Path), default=WORK, help="Keeps what experiments share.")
    @click.option(
        "--values",
        "source",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="Measure nothing: word and draw the values of this result.",
    )
    @click.option("--short", is_flag=True, help="As little as shows that it works; the figures mean nothing.")
    def command(json_path: Path | None, plot: Path | None, source: Path | None, **told: Any) -> None:
        exit_on_sigterm()
        settings = Settings(**told)
        try:
            started_s = time.monotonic()
            kept = None if source is None else json.loads(source.read_bytes())
            measured = measure(settings) if kept is None else kept["values"]
            wall_s = time.monotonic() - started_s if kept is None else kept.get("wall_s")
            values = json.loads(json.dumps(measured, allow_nan=False))
        except WdmoeError as error:
            raise click.ClickException(str(error)) from error
        result = {
            "experiment": module.stem,
            "title": title,
            "origin": ORIGIN,
            "model": settings.model,
            "short": settings.short,
            "key": settings.key(module),
            "finding": finding(values),
            "values": values,
            "wall_s": wall_s,  # that measuring took on this machine
            "cpus": os.cpu_count(),
            "at_a_time": at_a_time(),
            **environment(("numpy", "onnxruntime")),
        }
        if plot is not None:
            figure = new_figure()
            draw(values, figure)
            save_plot(figure, plot)
        if json_path is not None:
            write_whole(json_path, (json.dumps(result, indent=2) + "\n").encode())
        click.echo(result["finding"])

    return command


def at_a_time() -> int:
    """Return how many experiments run beside each other, this one among them."""
    return int(os.environ.get(AT_A_TIME, "1"))


@contextmanager
def one_at_a_time(work: Path, name: str) -> Iterator[None]:
    """Let one process after the other make what experiments share; the next ones find it there."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / f"{name}.lock").open("w") as file:
        # A lock lasts until the file is closed, which the end of a process does as well.
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another experiment to make {name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name first; make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


# -- plots -------------------------------------------------------------------------------------------------------------


def new_figure() -> Figure:
    """Return an empty figure for one or two plots side by side; needs no display."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    return Figure(figsize=(9, 4), layout="constrained")


def save_plot(figure: Figure, path: Path) -> None:
    """Write a figure as PNG of a few colours, small and with nothing in it of when and by what; whole or not at all."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    small = io.BytesIO()
    Image.open(drawn).convert("RGB").quantize(_PLOT_COLOURS).save(small, format="png", optimize=True)
    write_whole(path, small.getvalue())


def colour_of(policy: str) -> str:
    """Return the colour of a policy, whatever its options."""
    return COLOURS[policy.partition(":")[0]]


def error_bars(axes: Axes, x: Sequence[float], intervals: Sequence[Sequence[float]], **style: Any) -> None:
    """Draw values with their intervals."""
    value, low, high = np.array(intervals, dtype=float).T
    axes.errorbar(x, value, yerr=np.maximum(0, [value - low, high - value]), **{"capsize": 2, "marker": "o", **style})


def marked_bars(
    axes: Axes,
    x: Sequence[float],
    intervals: Sequence[Sequence[float]],
    good: Sequence[bool],
    colour: str,
    label: str | None = None,
    **style: Any,
) -> None:
    """Draw values with their intervals, hollow where their quality is not known to reach the bar; see `hollow`.

    Args:
        axes: where.
        x: of each value.
        intervals: of each value.
        good: whether each is at the bar of quality; False also where it was not measured.
        colour: of all.
        label: for a legend.
        style: of markers and line.
    """
    shape = {"marker": style.pop("marker", "o"), "ms": style.pop("ms", 4), "color": colour}
    error_bars(axes, x, intervals, color=colour, marker="", **style)
    for which, face in ((True, colour), (False, "white")):
        at = [n for n, one in enumerate(good) if one is which]
        if at:
            points = [x[n] for n in at], [intervals[n][0] for n in at]
            axes.plot(*points, ls="none", markerfacecolor=face, markeredgewidth=1.2, zorder=3, **shape)
    face = colour if any(good) else "white"
    axes.plot([], [], ls=style.get("ls", "-"), markerfacecolor=face, label=label, **shape)


def hollow(label: str) -> Any:
    """Return what says in a legend what hollow markers are: no speed is shown without a word on its quality."""
    from matplotlib.lines import Line2D

    return Line2D([], [], ls="none", marker="o", ms=5, color="#555555", markerfacecolor="white", label=label)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, the first column to the left and the others to the right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# -- intervals ---------------------------------------------------------------------------------------------------------


def bootstrap(statistic: Callable[[npt.NDArray[np.int64]], float], n: int, rounds: int = 2000) -> Interval:
    """Return a statistic with its 95 % interval, from drawing n units with replacement.

    Args:
        statistic: takes the indices that were drawn.
        n: units, such as windows of text: what belongs together is drawn together, so that the interval is paired.
        rounds: more are more exact.
    """
    rng = np.random.default_rng(0)
    drawn = [statistic(rng.integers(n, size=n)) for _ in range(rounds)]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(statistic(np.arange(n))), float(low), float(high)


def ratio_of_sums(above: Sequence[float], below: Sequence[float]) -> Interval:
    """Return sum(above) / sum(below) of paired units, such as the latency of each question under two policies."""
    a, b = np.array(above, dtype=float), np.array(below, dtype=float)
    return bootstrap(lambda drawn: float(a[drawn].sum() / b[drawn].sum()), len(a))


def spell(interval: Sequence[float], form: str = ".3f", unit: str = "") -> str:
    """Spell a value with its interval: `1.021 [1.018, 1.024]`."""
    value, low, high = (f"{end:{form}}{unit}" for end in interval)
    return f"{value} [{low}, {high}]"


__all__ = [
    "MISSES",
    "ROOT",
    "UNMEASURED",
    "Interval",
    "Settings",
    "Values",
    "bootstrap",
    "colour_of",
    "error_bars",
    "exit_on_sigterm",
    "experiment",
    "hollow",
    "marked_bars",
    "progress",
    "ratio_of_sums",
    "spell",
    "table",
    "write_whole",
]
