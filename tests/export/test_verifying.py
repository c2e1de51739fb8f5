"""A verification passes what an export made and names what is not what the checkpoint says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from tiny import tiny_checkpoint

from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.export.cli import main
from wdmoe.export.forward import Forward, bundle_experts
from wdmoe.export.verifying import Bound, verify_bundle
from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.manifest import PRECISIONS, BsManifest, DeviceManifest, Precision, read_manifest


def _export(
    folder: Path, precision: Precision = "fp32", family: str = "qwen2_moe", **options: Any
) -> tuple[Path, Path]:
    checkpoint = tiny_checkpoint(folder / "checkpoint", family, **options)
    config = ExportConfig(folder / "bundle", precision=precision)
    return export_bundle(plan_export(checkpoint, "tiny", config), config).out, checkpoint


@pytest.mark.parametrize(
    ("family", "options"),
    [("mixtral", {"sliding_window": 4}), ("qwen2_moe", {}), ("granitemoe", {}), ("olmoe", {"norm_topk_prob": True})],
)
def test_a_text_through_a_bundle_is_that_text_through_the_model(
    tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    bundle, checkpoint = _export(tmp_path, "fp32", family, **options)
    tokens = np.random.default_rng(0).integers(0, 256, 20)
    devices = tuple(read_manifest(path, DeviceManifest) for path in sorted(bundle.glob("device-*")))
    manifest = read_manifest(bundle / "bs", BsManifest)
    forward = Forward(bundle / "bs", manifest, [tokens[:13], tokens], bundle_experts(bundle, devices))
    *blocks, logits = forward.blocks()
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
    assert [block.shape for block in blocks] == [(33, 32)] * 2
    np.testing.assert_allclose(logits[:13], expected[:13], rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(logits[13:], expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_export_passes_and_costs_what_its_precision_costs(tmp_path: Path, precision: Precision) -> None:
    bundle, checkpoint = _export(tmp_path, precision)
    found = verify_bundle(bundle, checkpoint, experts=6, bound=Bound(0.4, math.inf))
    assert found.passed
    assert all(piece.rms == 0 for piece in found.station)
    assert (len(found.experts), len(found.text.blocks), found.text.tokens) == (6, 2, 48)
    low, high = {"fp32": (0, 1e-5), "fp16": (1e-5, 1e-3), "int8": (1e-3, 0.04), "int4": (0.04, 0.35)}[precision]
    assert low <= found.rms_of_experts <= high
    assert found.text.logits.rms <= 3 * high
    assert found.text.divergence + 1e-9 >= 0


def test_more_experts_than_there_are_is_all_of_them(tmp_path: Path) -> None:
    bundle, checkpoint = _export(tmp_path)
    names = [piece.name for piece in verify_bundle(bundle, checkpoint, experts=99, tokens=1).experts]
    assert len(set(names)) == len(names) == 16


def test_a_damaged_weight_is_beyond_the_bound_and_named(tmp_path: Path) -> None:
    bundle, checkpoint = _export(tmp_path, "int8")
    bs = read_manifest(bundle / "bs", BsManifest)
    path = bundle / "experts" / f"{bs.experts[1][3]}.safetensors"
    content = bytearray(path.read_bytes())
    for at in range(len(content) // 2, len(content) // 2 + 200):
        content[at] ^= 0x80
    with path.open("r+b") as file:  # in place: the device's link shows the same
        file.write(content)
    command = ["verify", str(bundle), "--model", str(checkpoint), "--experts", "16", "--max-kl", "9"]
    result = CliRunner().invoke(main, [*command, "--json"])
    found = json.loads(result.stdout)
    beyond = [piece["name"] for piece in found["experts"] if piece["rms"] > piece["bound"]]
    assert (result.exit_code, found["passed"], beyond) == (1, False, ["block 1, expert 3"])
    table = CliRunner().invoke(main, command)
    assert table.exit_code == 1
    assert "beyond the bound" in table.stdout
    assert "an error is beyond its bound" in table.stderr


def test_another_checkpoint_is_refused(tmp_path: Path) -> None:
    bundle, _ = _export(tmp_path)
    other = tiny_checkpoint(tmp_path / "other", "qwen2_moe", seed=1)
    with pytest.raises(BundleError, match="give the one it was made of with --model"):
        verify_bundle(bundle, other)
