"""Run experiments, keep what is finished, and write what they found into docs/findings.md.

    scripts/experiments/run --all
    scripts/experiments/run --only e03_bandwidth --only pareto --again

Every module of this folder that does not begin with an underscore is an experiment. Each gets a process of its own, and
several run at a time (--jobs), each on its part of the processors. A result is kept until its settings or its code change,
or --again is given. At the end stands how long each measured, and on what machine; --all writes that into docs/findings.md
as well. Exit code 1: an experiment failed; the others were run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT)]
from scripts.experiments._frame import (
    AT_A_TIME,
    SMALL_MODEL,
    WORK,
    Settings,
    exit_on_sigterm,
    progress,
    table,
    write_whole,
)

HERE = Path(__file__).parent
WALL_TIMES = "wall_times"  # their place on the page
FINDINGS, PLOTS = ROOT / "docs" / "findings.md", ROOT / "docs" / "plots"
_GRACE_S = 30.0  # for an experiment to end when it is told to
_MARKED = re.compile(r"(<!-- finding: (\S+) -->\n).*?(<!-- end of finding -->)", re.DOTALL)


def modules() -> dict[str, Path]:
    """Return the experiments by name."""
    return {path.stem: path for path in sorted(HERE.glob("*.py")) if not path.stem.startswith("_")}


def is_finished(json_path: Path, plot: Path, key: str) -> bool:
    """Say whether a result is there, and of this code and these settings."""
    try:
        return plot.exists() and bool(json.loads(json_path.read_bytes())["key"] == key)
    except (OSError, ValueError, KeyError):
        return False


def with_findings(page: str, findings: dict[str, str]) -> str:
    """Put findings between their markers, and leave what is not found anew as it is.

    Raises:
        ValueError: a finding has no place on the page.
    """
    places = {match[2] for match in _MARKED.finditer(page)}
    if missing := sorted(set(findings) - places):
        raise ValueError(f"no place for {', '.join(missing)}: write <!-- finding: NAME --> and <!-- end of finding -->")

    def put(match: re.Match[str]) -> str:
        return f"{match[1]}{findings[match[2]]}\n{match[3]}" if match[2] in findings else match[0]

    return _MARKED.sub(put, page)


def wall_times(results: dict[str, dict[str, Any]], took_s: float | None = None) -> str:
    """Say how long each experiment measured, and on what, from what their results keep.

    Args:
        results: by name.
        took_s: all together, where all of them ran just now.
    """
    known = {name: result for name, result in results.items() if result.get("wall_s") is not None}
    machines = list(dict.fromkeys(map(_machine, known.values())))
    rows = [
        [name, f"{result['wall_s'] / 60:.1f}", *([] if len(machines) < 2 else [str(1 + machines.index(machine))])]
        for name, result in known.items()
        for machine in [_machine(result)]
    ]
    if took_s is not None:
        rows.append(["all", f"{took_s / 60:.1f}", *([] if len(machines) < 2 else [""])])
    where = "; ".join(f"{n}: {machine}" if len(machines) > 1 else machine for n, machine in enumerate(machines, 1))
    heads = ("experiment", "wall time, min", *(() if len(machines) < 2 else ("machine",)))
    return f"Measured on {where or 'no machine that is known'}.\n\n{table(heads, rows)}"


def _machine(result: dict[str, Any]) -> str:
    beside = result.get("at_a_time", 1)
    return f"{result['hardware']}{f', {beside} experiments at a time' if beside > 1 else ''}"


class Runner:
    """Runs experiments, some at a time, each on its part of the processors; ends them when it is stopped."""

    def __init__(self, at_a_time: int) -> None:
        """Start nothing yet.

        Args:
            at_a_time: experiments, at most.
        """
        self._at_a_time = at_a_time
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False
        threads = max(1, (os.cpu_count() or 1) // at_a_time)
        self._environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | {AT_A_TIME: str(at_a_time)}

    def run(self, lines: dict[str, list[str]], begun: Callable[[str], None]) -> list[str]:
        """Run command lines by name, in their order; return those that failed.

        Args:
            lines: by name.
            begun: told of each when it starts.
        """
        with ThreadPoolExecutor(self._at_a_time) as pool:
            try:
                waiting = [pool.submit(self._one, name, line, begun) for name, line in lines.items()]
                wait(waiting, return_when=FIRST_EXCEPTION)
                codes = [one.result() for one in waiting]
            except BaseException:
                self._stopped = True
                # An interrupt from the terminal reaches them as well; a SIGTERM reaches this process alone.
                pool.shutdown(wait=False, cancel_futures=True)
                for process in self._running.copy():
                    process.terminate()
                for process in self._running.copy():
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(_GRACE_S)
                    process.kill()  # does nothing to one that has ended
                raise
        return [name for name, code in zip(lines, codes, strict=True) if code != 0]

    def _one(self, name: str, line: list[str], begun: Callable[[str], None]) -> int:
        begun(name)
        with subprocess.Popen(
            line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", env=self._environment
        ) as process:
            self._running.add(process)
            try:
                if self._stopped:
                    process.terminate()
                assert process.stderr is not None
                for said in process.stderr:
                    progress(f"{name}: {said.rstrip()}" if self._at_a_time > 1 else said.rstrip())
                return process.wait()
            finally:
                self._running.discard(process)


@click.command(help=__doc__)
@click.option("--all", "everything", is_flag=True, help="Run all experiments.")
@click.option(
    "--only", "names", multiple=True, type=click.Choice(list(modules())), metavar="NAME", help="Run this one."
)
@click.option(
    "--data-dir", type=click.Path(path_type=Path, exists=True, file_okay=False), help="With corpus/ and sets."
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="For JSON, plots and findings.md.")
@click.option("--again", is_flag=True, help="Do not keep what is finished.")
@click.option("--model", default=SMALL_MODEL, show_default=True, help="Or tiny: a random one.")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), default=WORK, help="Keeps what they share.")
@click.option(
    "--jobs", type=click.IntRange(min=1), default=min(4, os.cpu_count() or 1), show_default="processors, at most 4",
    help="Experiments at a time.",
)  # fmt: skip
@click.option("--short", is_flag=True, help="As little as shows that they work; needs --out.")
def main(everything: bool, names: tuple[str, ...], out: Path | None, again: bool, jobs: int, **told: Any) -> None:
    exit_on_sigterm()
    if everything == bool(names):
        raise click.UsageError("give --all, or --only NAME once or more; names: " + ", ".join(modules()))
    settings = Settings(**told)
    if out is None and (settings.short or settings.model != SMALL_MODEL):
        raise click.UsageError("--short and --model make figures that do not belong in docs/; give --out DIR")
    results, plots = (settings.work / "results", PLOTS) if out is None else (out, out)
    page = FINDINGS if out is None else out / FINDINGS.name
    options = ["--model", settings.model, "--work", str(settings.work), *(["--short"] if settings.short else [])]
    options += [] if settings.data_dir is None else ["--data-dir", str(settings.data_dir)]
    chosen = {name: path for name, path in modules().items() if everything or name in names}
    started_s = time.monotonic()
    lines: dict[str, list[str]] = {}
    for name, module in chosen.items():
        json_path, plot = results / f"{name}.json", plots / f"{name}.png"
        if not again and is_finished(json_path, plot, settings.key(module)):
            progress(f"{name}: kept")
        else:
            lines[name] = [sys.executable, str(module), *options, "--json", str(json_path), "--plot", str(plot)]

    def begun(name: str) -> None:
        number = 1 + list(lines).index(name)
        progress(f"[{number}/{len(lines)}] {name}: {(time.monotonic() - started_s) / 60:.1f} min so far")

    try:
        failed = Runner(min(jobs, len(lines) or 1)).run(lines, begun)
    except KeyboardInterrupt:
        progress("interrupted; what is finished is kept, the same command goes on from there")
        sys.exit(130)
    done = [name for name in chosen if name not in failed]
    found = {name: json.loads((results / f"{name}.json").read_bytes()) for name in done}
    findings = {name: str(result["finding"]) for name, result in found.items()}
    took_s = time.monotonic() - started_s
    took = wall_times(found, took_s if len(lines) == len(modules()) else None)
    if len(done) == len(modules()):
        findings[WALL_TIMES] = took  # else those of the others would be lost from the page
    try:
        write_whole(page, with_findings(FINDINGS.read_text(), findings).encode())
    except ValueError as error:
        raise click.ClickException(f"{FINDINGS}: {error}") from error
    progress(took)
    progress(
        f"{len(done)} of {len(chosen)} experiments done in {took_s / 60:.1f} min on {os.cpu_count()} CPUs; see {page}"
    )
    if failed:
        progress(f"failed: {', '.join(failed)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
