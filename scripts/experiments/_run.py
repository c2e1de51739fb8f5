"""Run experiments one after another, keep what is finished, and write what they found into docs/findings.md.

    scripts/experiments/run --all
    scripts/experiments/run --only e03_bandwidth --only pareto --again

Every module of this folder that does not begin with an underscore is an experiment. Each gets a process of its own. A
result is kept until its settings or its code change, or --again is given. At the end stands how long each measured, and
on what machine; --all writes that into docs/findings.md as well. Exit code 1: an experiment failed; the others
were run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT)]
from scripts.experiments._frame import SMALL_MODEL, WORK, Settings, exit_on_sigterm, progress, table, write_whole

HERE = Path(__file__).parent
WALL_TIMES = "wall_times"  # their place on the page
FINDINGS, PLOTS = ROOT / "docs" / "findings.md", ROOT / "docs" / "plots"
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


def wall_times(results: dict[str, dict[str, Any]]) -> str:
    """Say how long each experiment measured, and on what, from what their results keep."""
    known = {name: result for name, result in results.items() if result.get("wall_s") is not None}
    machines = list(dict.fromkeys(f"{result['hardware']}, {result['cpus']} CPUs" for result in known.values()))
    rows = [
        [name, f"{result['wall_s'] / 60:.1f}", *([] if len(machines) < 2 else [str(1 + machines.index(machine))])]
        for name, result in known.items()
        for machine in [f"{result['hardware']}, {result['cpus']} CPUs"]
    ]
    total = sum(result["wall_s"] for result in known.values()) / 60
    rows.append(["all", f"{total:.1f}", *([] if len(machines) < 2 else [""])])
    where = "; ".join(f"{n}: {machine}" if len(machines) > 1 else machine for n, machine in enumerate(machines, 1))
    heads = ("experiment", "wall time, min", *(() if len(machines) < 2 else ("machine",)))
    return f"Measured on {where or 'no machine that is known'}.\n\n{table(heads, rows)}"


def run_one(module: Path, options: Sequence[str]) -> int:
    """Run an experiment to its end, or end it with this process; return its exit code."""
    # NOTE: an interrupt from the terminal reaches it as well; a SIGTERM reaches this process alone.
    process = subprocess.Popen([sys.executable, str(module), *options], stdout=subprocess.DEVNULL)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait(timeout=30)
        raise


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
@click.option("--short", is_flag=True, help="As little as shows that they work; needs --out.")
def main(everything: bool, names: tuple[str, ...], out: Path | None, again: bool, **told: Any) -> None:
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
    failed: list[str] = []
    started_s = time.monotonic()
    try:
        for number, (name, module) in enumerate(chosen.items(), 1):
            where = f"[{number}/{len(chosen)}] {name}"
            json_path, plot = results / f"{name}.json", plots / f"{name}.png"
            if not again and is_finished(json_path, plot, settings.key(module)):
                progress(f"{where}: kept")
                continue
            progress(f"{where}: {(time.monotonic() - started_s) / 60:.1f} min so far")
            if run_one(module, [*options, "--json", str(json_path), "--plot", str(plot)]) != 0:
                failed.append(name)
                progress(f"{where}: failed")
    except KeyboardInterrupt:
        progress("interrupted; what is finished is kept, the same command goes on from there")
        sys.exit(130)
    done = [name for name in chosen if name not in failed]
    found = {name: json.loads((results / f"{name}.json").read_bytes()) for name in done}
    findings = {name: str(result["finding"]) for name, result in found.items()}
    took = wall_times(found)
    if len(done) == len(modules()):
        findings[WALL_TIMES] = took  # else those of the others would be lost from the page
    try:
        write_whole(page, with_findings(FINDINGS.read_text(), findings).encode())
    except ValueError as error:
        raise click.ClickException(f"{FINDINGS}: {error}") from error
    minutes = (time.monotonic() - started_s) / 60
    progress(took)
    progress(f"{len(done)} of {len(chosen)} experiments done in {minutes:.1f} min on {os.cpu_count()} CPUs; see {page}")
    if failed:
        progress(f"failed: {', '.join(failed)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
