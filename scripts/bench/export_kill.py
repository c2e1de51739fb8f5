"""Kill the exporter at random moments and start it again: it goes on, and ends with the same bundle.

    python scripts/bench/export_kill.py --json -

Exports a random bf16 checkpoint (mixtral, 4 blocks of `--experts` of `--width`) once undisturbed. Then, `--rounds` times: a
SIGKILL at a random moment of an export, in every other round of its restart too, and a restart that is let be. The bars:
it ends with exit code 0; the bundle equals the undisturbed one, hash for hash; no finished file of weights was written
again (inode and time of change stay); nothing unfinished was under the final name; as many kills as rounds hit.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
import tiny
from processes import command, exit_on_sigterm

from scripts.bench._environment import environment, progress, write_json
from wdmoe.export.inspection import inspect_folder
from wdmoe.runtime.errors import WdmoeError

_LIMIT_S = 300.0
_FIRST_SHARE = 0.2  # of an undisturbed export's time: nothing is written in the first fifth
Stamps = dict[Path, tuple[int, int]]  # name in the bundle -> inode and time of change


@click.command()
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, allow_dash=True), help="Keep the result; - prints it."
)
@click.option("--rounds", type=click.IntRange(min=1), default=10, show_default=True)
@click.option(
    "--width", type=click.IntRange(min=32), default=1024, show_default=True, help="d_model; d_ff is twice it."
)
@click.option("--experts", type=click.IntRange(min=2), default=8, show_default=True, help="Of each of 4 blocks.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--scratch", type=click.Path(path_type=Path, file_okay=False), default=None, help="Where to work.")
def main(target: str | None, rounds: int, width: int, experts: int, seed: int, scratch: Path | None) -> None:
    """Count what goes wrong; exit code 1 if anything does."""
    exit_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="wdmoe-kill-", dir=scratch) as folder:
        result = kill_again_and_again(Path(folder), rounds, width, experts, seed)
    result |= {"rounds": rounds, "width": width, "experts": experts, "seed": seed, **environment(("numpy", "onnx"))}
    progress("all bars are met" if result["passed"] else f"missed: {result}")
    if target is not None:
        write_json(target, result)
    sys.exit(0 if result["passed"] else 1)


def kill_again_and_again(here: Path, rounds: int, width: int, experts: int, seed: int) -> dict[str, Any]:
    """Run the whole experiment in a folder."""
    checkpoint = tiny.tiny_checkpoint(
        here / "checkpoint", "mixtral", dtype="bfloat16", hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=4, num_local_experts=experts, shards=3,
    )  # fmt: skip
    started_s = time.perf_counter()
    run(checkpoint, here / "whole")
    whole_s = time.perf_counter() - started_s
    expected = tree(here / "whole")

    rng = np.random.default_rng(seed)
    counts = dict.fromkeys(("killed", "different_bundles", "rewritten_files", "early_names"), 0)
    kept: list[int] = []
    for number in range(rounds):
        out = here / f"bundle-{number}"
        before: Stamps = {}
        for _ in range(1 + number % 2):  # every other round the restart is killed too
            moment_s = float(rng.uniform(_FIRST_SHARE, 1.0)) * whole_s
            if run(checkpoint, out, moment_s):
                break
            counts["killed"] += 1
            counts["early_names"] += out.exists() and read_early(out)
            after = stamps(out if out.exists() else here / f"{out.name}.partial")
            counts["rewritten_files"] += changed(before, after)
            before = after
        kept.append(len(before))
        run(checkpoint, out)
        counts["rewritten_files"] += changed(before, stamps(out))
        counts["different_bundles"] += tree(out) != expected
        progress(f"{number + 1} of {rounds}: {kept[-1]} files were finished when it was killed; {counts}")
        shutil.rmtree(out)
    passed = counts["killed"] >= rounds and not sum(counts.values()) - counts["killed"]
    return {"passed": passed, **counts, "finished_when_killed": kept, "uninterrupted_s": whole_s}


def read_early(out: Path) -> bool:
    """Say whether what is under the final name is not whole."""
    try:
        inspect_folder(out)
    except WdmoeError:
        return True
    return False


def changed(before: Stamps, after: Stamps) -> int:
    """Count the files that were there before and are not what they were."""
    return sum(after.get(name) != stamp for name, stamp in before.items())


def run(checkpoint: Path, out: Path, kill_after_s: float | None = None) -> bool:
    """Start an export; say whether it ended by itself.

    Raises:
        RuntimeError: it ended with an error.
    """
    line = command("wdmoe-export", "--model", checkpoint, "--devices", 4, "--out", out, "--json")
    process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, text = process.communicate(timeout=_LIMIT_S if kill_after_s is None else kill_after_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        if kill_after_s is None:
            raise RuntimeError(f"the export did not end within {_LIMIT_S:.0f} s") from None
        return False
    if process.returncode:
        raise RuntimeError(f"the export ended with {process.returncode}: {text.decode()[-500:]}")
    return True


def stamps(bundle: Path) -> Stamps:
    """Say when and as what each finished file of weights was written; links in device folders are the same files."""
    found: Stamps = {}
    for path in (*bundle.glob("experts/*.safetensors"), *bundle.glob("bs/*.safetensors")):
        status = path.stat()
        found[path.relative_to(bundle)] = status.st_ino, status.st_mtime_ns
    return found


def tree(bundle: Path) -> dict[str, str]:
    """Hash every file."""
    files = (path for path in bundle.rglob("*") if path.is_file())
    return {str(path.relative_to(bundle)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    main()
