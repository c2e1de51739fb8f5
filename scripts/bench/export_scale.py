"""Export a checkpoint with the shapes of Mixtral-8x7B: memory, and rate against a script that copies the same bytes.

    python scripts/bench/export_scale.py --json -

Makes a random bf16 checkpoint in shards (hidden 4096, ffn 14336, 8 experts, `--blocks` of the 32 blocks; 6.4 GB for 2)
and exports it, experts in fp16, for four devices, in a process of its own. Needs about 3 times that on the disk; with the
part `memory` 5 times. `--hidden` and `--ffn` make it narrower, for a trial of the script.

- `peak_rss_mb` (bar: 1536): the largest ru_maxrss of any export, as the kernel reports it when the process ends. It
  counts everything resident, pages of mapped files too; MB are 10^6 bytes. `peak_anonymous_mb` is the part that could not
  be dropped (RssAnon, sampled every 20 ms).
- `throughput_vs_copy` (bar: 0.7): wall time of `_copy.py` (reads, SHA-256s, writes and fsyncs the shards, one process)
  over wall time of the export, both from an empty page cache, start-up included; the two take turns, medians of
  `--repeats`. The export writes more bytes than it reads (stages become float32); that is not credited to it.
- `memory_growth`: `peak_rss_mb` at twice the blocks over that at `--blocks` (bar: 1.10).
- `quantised`, part `quantised`: the same of exports in int4 and int8, medians of `--repeats`, no copy beside them:
  `export_mb_per_s` of the checkpoint read, `peak_rss_mb` (bar: 1536 too), `bytes_written`; where the part `rate` ran,
  `seconds_vs_fp16` and `throughput_vs_copy` (no bar: the arithmetic of quantising is not copying).
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
from processes import command, exit_on_sigterm

from scripts.bench._environment import CpuUse, environment, progress, write_json
from wdmoe.export.families import FAMILIES, Config
from wdmoe.export.tensor_writer import TensorWriter
from wdmoe.export.weights import all_expert_parts, station_parts

MAX_PEAK_MB = 1536.0
MIN_RATE_RATIO = 0.7
MAX_GROWTH = 1.10
SHARD_BYTES = 1_000_000_000
_PIECE = 1 << 20  # random weights drawn at a time
_SAMPLE_S = 0.02
_LIMIT_S = 1800.0
PARTS = ("rate", "memory", "quantised")
QUANTISED = ("int4", "int8")
CONFIG: dict[str, Any] = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "vocab_size": 32000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
    "rope_theta": 1e6, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Run:
    """One export."""

    wall_s: float
    peak_rss_mb: float
    peak_anonymous_mb: float
    bytes_written: int


@click.command()
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, allow_dash=True), help="Keep the result; - prints it."
)
@click.option("--blocks", type=click.IntRange(min=1, max=16), default=2, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Of export and copy.")
@click.option(
    "--part", "parts", multiple=True, type=click.Choice(PARTS), default=PARTS,
    show_default=True, help="What to measure; may be given several times.",
)  # fmt: skip
@click.option("--hidden", type=click.IntRange(min=64), default=CONFIG["hidden_size"], show_default=True)
@click.option("--ffn", type=click.IntRange(min=64), default=CONFIG["intermediate_size"], show_default=True)
@click.option(
    "--scratch", type=click.Path(path_type=Path, file_okay=False), default=None,
    help="Where to put everything meanwhile; by default the folder for temporary files.",
)  # fmt: skip
def main(
    target: str | None, blocks: int, repeats: int, parts: tuple[str, ...], hidden: int, ffn: int, scratch: Path | None
) -> None:
    """Measure the exporter at full width; exit code 1 if a bar is missed."""
    exit_on_sigterm()
    config = CONFIG | {"hidden_size": hidden, "intermediate_size": ffn}
    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="wdmoe-scale-", dir=scratch) as folder:
        here, use = Path(folder), CpuUse()
        needed = tensor_bytes(config, blocks) * (5 if "memory" in parts else 3)
        if (free := shutil.disk_usage(here).free) < needed:
            raise click.ClickException(
                f"{here}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed; give --scratch or fewer --blocks"
            )
        checkpoint = make_checkpoint(here / "checkpoint", config, blocks)
        result, exports = measure_rate(here, checkpoint, repeats if "rate" in parts else 0)
        if not exports:
            exports = [export(here, checkpoint)]
        result |= {
            "peak_rss_mb": max(run.peak_rss_mb for run in exports),
            "peak_anonymous_mb": max(run.peak_anonymous_mb for run in exports),
            "bytes_written": exports[0].bytes_written,
        }
        if "quantised" in parts:
            result["quantised"] = {one: measure_quantised(here, checkpoint, one, repeats, result) for one in QUANTISED}
        if "memory" in parts:
            shutil.rmtree(checkpoint)
            twice = export(here, make_checkpoint(here / "checkpoint", config, 2 * blocks))
            result["peak_rss_mb_twice_the_blocks"] = twice.peak_rss_mb
            result["memory_growth"] = twice.peak_rss_mb / result["peak_rss_mb"]
        result |= {"blocks": blocks, "hidden": hidden, "ffn": ffn}
        result |= {"bytes_read": tensor_bytes(config, blocks), **use.since()}
    missed = missed_bars(result)
    bars = {"peak_rss_mb": MAX_PEAK_MB, "throughput_vs_copy": MIN_RATE_RATIO, "memory_growth": MAX_GROWTH}
    result |= {"bars": bars, "passed": not missed, **environment(("numpy", "onnx"))}
    progress(f"missed: {', '.join(missed)}" if missed else "all bars are met")
    if target is not None:
        write_json(target, result)
    sys.exit(1 if missed else 0)


def measure_rate(here: Path, checkpoint: Path, repeats: int) -> tuple[dict[str, Any], list[Run]]:
    """Let export and copy take turns."""
    exports: list[Run] = []
    copies_s: list[float] = []
    for number in range(repeats):
        for what in ("export", "copy") if number % 2 == 0 else ("copy", "export"):
            if what == "export":
                exports.append(export(here, checkpoint))
            else:
                copies_s.append(copy(here, checkpoint))
        progress(f"{number + 1} of {repeats}: export {exports[-1].wall_s:.1f} s, copy {copies_s[-1]:.1f} s")
    if not repeats:
        return {}, exports
    export_s, copy_s = statistics.median(run.wall_s for run in exports), statistics.median(copies_s)
    read_mb = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) / 1e6
    return {
        "throughput_vs_copy": copy_s / export_s,
        "export_mb_per_s": read_mb / export_s,
        "copy_mb_per_s": read_mb / copy_s,
        "export_s": [run.wall_s for run in exports],
        "copy_s": copies_s,
    }, exports


def measure_quantised(
    here: Path, checkpoint: Path, precision: str, repeats: int, fp16: dict[str, Any]
) -> dict[str, Any]:
    """Export in int8 or int4 a few times; compare with fp16 and the copy where those were measured."""
    runs = [export(here, checkpoint, precision) for _ in range(repeats)]
    export_s = statistics.median(run.wall_s for run in runs)
    read_mb = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) / 1e6
    progress(f"{precision}: export {export_s:.1f} s, peak {max(run.peak_rss_mb for run in runs):.0f} MB")
    compared = {}
    if "export_s" in fp16:
        compared["seconds_vs_fp16"] = export_s / statistics.median(fp16["export_s"])
        compared["throughput_vs_copy"] = statistics.median(fp16["copy_s"]) / export_s
    return {
        "export_mb_per_s": read_mb / export_s,
        "export_s": [run.wall_s for run in runs],
        "peak_rss_mb": max(run.peak_rss_mb for run in runs),
        "peak_anonymous_mb": max(run.peak_anonymous_mb for run in runs),
        "bytes_written": runs[0].bytes_written,
        **compared,
    }


def export(here: Path, checkpoint: Path, precision: str = "fp16") -> Run:
    """Export once, from an empty page cache, into a folder that is removed again."""
    forget_files(checkpoint)
    out = here / "bundle"
    line = command(
        "wdmoe-export", "--model", checkpoint, "--devices", 4, "--precision", precision, "--out", out, "--json"
    )
    with (here / "log").open("wb") as log:
        started_s = time.perf_counter()
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        peak_anonymous_kb = 0
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            peak_anonymous_kb = max(peak_anonymous_kb, anonymous_kb(process.pid))
            if time.perf_counter() - started_s > _LIMIT_S:
                process.kill()
            time.sleep(_SAMPLE_S)
        wall_s = time.perf_counter() - started_s
    process.returncode = os.waitstatus_to_exitcode(ended[1])
    if process.returncode:
        raise click.ClickException(f"the export failed: {(here / 'log').read_text()[-500:]}")
    n_bytes = sum(path.stat().st_size for name in ("experts", "bs") for path in (out / name).iterdir())
    shutil.rmtree(out)
    return Run(wall_s, ended[2].ru_maxrss * 1024 / 1e6, peak_anonymous_kb * 1024 / 1e6, n_bytes)


def copy(here: Path, checkpoint: Path) -> float:
    """Copy the shards once, from an empty page cache; return seconds."""
    forget_files(checkpoint)
    line = [sys.executable, str(Path(__file__).with_name("_copy.py"))]
    line += [str(path) for path in sorted(checkpoint.glob("*.safetensors"))] + [str(here / "copy")]
    started_s = time.perf_counter()
    subprocess.run(line, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=_LIMIT_S)
    wall_s = time.perf_counter() - started_s
    shutil.rmtree(here / "copy")
    return wall_s


def forget_files(folder: Path) -> None:
    """Take the files of a folder out of the page cache; what the run before left to be written is written first."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def anonymous_kb(pid: int) -> int:
    """Memory of a process that is not backed by files; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def tensors_of(config: dict[str, Any], blocks: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """List the tensors of a Mixtral checkpoint, with their shapes."""
    layout = FAMILIES["mixtral"](Config(config | {"num_hidden_layers": blocks}, {}, ()), "scale")
    for part in (*station_parts(layout), *all_expert_parts(layout)):
        yield from ((str(source), shape) for source, shape in part.sources)


def tensor_bytes(config: dict[str, Any], blocks: int) -> int:
    """Size of a checkpoint."""
    return sum(2 * int(np.prod(shape)) for _, shape in tensors_of(config, blocks))


def make_checkpoint(folder: Path, config: dict[str, Any], blocks: int) -> Path:
    """Write a checkpoint of random bf16 weights between 0.0005 and 0.008 in size, in shards of a GB."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": blocks}))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled_bytes = 0
    for name, shape in tensors_of(config, blocks):
        size_bytes = 2 * int(np.prod(shape))
        if filled_bytes and filled_bytes + size_bytes > SHARD_BYTES:
            shards.append({})
            filled_bytes = 0
        shards[-1][name] = shape
        filled_bytes += size_bytes
    rng = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file_name)
        with TensorWriter(folder / file_name, {name: ("BF16", shape) for name, shape in shard.items()}) as writer:
            left = sum(int(np.prod(shape)) for shape in shard.values())
            while left:
                bits = np.frombuffer(rng.bytes(2 * min(_PIECE, left)), np.uint16)
                writer.write((bits & np.uint16(0x81FF)) | np.uint16(0x3A00))
                left -= len(bits)
            writer.finish()
            writer.rename(folder / file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    progress(f"{len(shards)} shards, {blocks} blocks, {tensor_bytes(config, blocks) / 1e9:.1f} GB")
    return folder


def missed_bars(result: dict[str, Any]) -> list[str]:
    """Name the bars missed among those measured."""
    missed = []
    if result["peak_rss_mb"] > MAX_PEAK_MB:
        missed.append(f"peak_rss_mb {result['peak_rss_mb']:.0f} > {MAX_PEAK_MB:.0f}")
    for precision, found in result.get("quantised", {}).items():
        if found["peak_rss_mb"] > MAX_PEAK_MB:
            missed.append(f"{precision}: peak_rss_mb {found['peak_rss_mb']:.0f} > {MAX_PEAK_MB:.0f}")
    if result.get("throughput_vs_copy", MIN_RATE_RATIO) < MIN_RATE_RATIO:
        missed.append(f"throughput_vs_copy {result['throughput_vs_copy']:.2f} < {MIN_RATE_RATIO}")
    if result.get("memory_growth", 0.0) > MAX_GROWTH:
        missed.append(f"memory_growth {result['memory_growth']:.2f} > {MAX_GROWTH}")
    return missed


if __name__ == "__main__":
    main()
