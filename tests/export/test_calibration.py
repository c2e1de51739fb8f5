"""The norms and counts that a bundle carries are those of its experts on the tokens that chose them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from tiny import BOS, FAMILIES, tiny_checkpoint

from wdmoe.bs.importance import output_norms
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.export.calibration import calibrate_bundle
from wdmoe.export.cli import main
from wdmoe.export.inspection import inspect_folder
from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.manifest import BsManifest, read_manifest
from wdmoe.runtime.tensor_file import map_tensors

TEXT = "The kettle boils; who takes it off? " * 12


def _export(folder: Path, family: str = "mixtral", **options: Any) -> tuple[Path, Path]:
    checkpoint = tiny_checkpoint(folder / "checkpoint", family, **options)
    config = ExportConfig(folder / "bundle")
    return export_bundle(plan_export(checkpoint, "tiny", config), config).out, checkpoint


def _text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_an_export_carries_the_norms_of_the_golden_answers(tmp_path: Path) -> None:
    bundle, _ = _export(tmp_path)
    manifest = read_manifest(bundle / "bs", BsManifest)
    assert (manifest.calibration.source, manifest.calibration.counts) == ("golden", ())
    answers = {name: t for path in bundle.glob("device-*/golden.safetensors") for name, t in map_tensors(path).items()}
    for block in range(2):
        for expert in range(8):
            norms = np.linalg.norm(answers[f"output.block_{block:02d}.expert_{expert:02d}"], axis=1)
            assert manifest.calibration.norms[block][expert] == pytest.approx(norms.mean(), rel=1e-6)
    assert output_norms(manifest).shape == (2, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_measured_as_transformers_would(tmp_path: Path, family: str) -> None:
    """The windows are 255 tokens behind a BOS, as the model knows 256 positions; the first row is not measured."""
    bundle, checkpoint = _export(tmp_path, family, seed=1)  # with seed 0 a token of Qwen2-MoE stands at a tie
    found = calibrate_bundle(bundle, [_text(tmp_path)], tokens=300)
    assert (found.source, found.tokens) == ("text", 300)
    ids = list(TEXT.encode())[:300]
    windows = [[BOS, *ids[:255]], [BOS, *ids[255:]]]
    counts, sums = np.zeros((2, 8)), np.zeros((2, 8))
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for window in windows:
        for block, (chosen, answers) in enumerate(_answers_of_experts(model, window)):
            for expert in range(8):
                of = (chosen[1:] == expert).any(dim=1)
                counts[block, expert] += int(of.sum())
                sums[block, expert] += float(answers[expert, 1:][of].norm(dim=1).sum())
    np.testing.assert_array_equal(found.counts, counts)
    np.testing.assert_allclose(np.array(found.norms)[counts > 0], (sums / np.maximum(counts, 1))[counts > 0], rtol=1e-4)


def _answers_of_experts(model: Any, window: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return for each block the experts chosen [N, k], and what every expert answers to every row [E, N, d_model]."""
    seen: dict[int, torch.Tensor] = {}
    blocks = [getattr(layer, "block_sparse_moe", None) or layer.mlp for layer in model.model.layers]
    hooks = [
        block.register_forward_pre_hook(lambda module, args, number=number: seen.update({number: args[0][0]}))
        for number, block in enumerate(blocks)
    ]
    with torch.no_grad():
        model(torch.tensor([window]))
        for hook in hooks:
            hook.remove()
        found = []
        for number, block in enumerate(blocks):
            rows, experts = seen[number], block.experts
            router = getattr(block, "router", None) or block.gate
            logits = rows @ getattr(router, "layer", router).weight.T
            chosen = logits.topk(2, dim=1).indices
            width = experts.gate_up_proj.shape[1] // 2
            both = torch.einsum("efd,nd->enf", experts.gate_up_proj, rows)
            inner = torch.nn.functional.silu(both[..., :width]) * both[..., width:]
            found.append((chosen, torch.einsum("edf,enf->end", experts.down_proj, inner)))
    return found


def test_a_calibrated_bundle_is_sound_keeps_its_id_and_places_by_its_counts(tmp_path: Path) -> None:
    bundle, checkpoint = _export(tmp_path)
    before = read_manifest(bundle / "bs", BsManifest)
    command = ["calibrate", str(bundle), "--text", str(_text(tmp_path)), "--tokens", "200"]
    result = CliRunner().invoke(main, [*command, "--counts", str(tmp_path / "counts.json"), "--json"])
    assert result.exit_code == 0, result.output
    after = inspect_folder(bundle).bs
    assert after is not None
    assert (after.bundle_id, after.files) == (before.bundle_id, before.files)
    assert after.calibration.source == "text"
    counts = json.loads((tmp_path / "counts.json").read_text())["counts"]
    assert [sum(row) for row in counts] == [400, 400]
    assert json.loads(result.stdout)["counts"] == counts

    # The same placement, whether the counts come from the bundle or from the file; and another than without.
    balanced = ["--placement", "balanced", "--devices", "3", "--json"]
    placed = {}
    for name, options in (("bundle", []), ("file", ["--counts", str(tmp_path / "counts.json")])):
        out = tmp_path / f"placed-{name}"
        made = CliRunner().invoke(main, ["place", str(bundle), "--out", str(out), *balanced, *options])
        assert made.exit_code == 0, made.output
        placed[name] = read_manifest(out / "bs", BsManifest)
    assert placed["bundle"].placement == placed["file"].placement
    assert placed["bundle"].calibration == after.calibration
    fresh = [*balanced, "--model", str(checkpoint), "--counts", str(tmp_path / "counts.json"), "--out"]
    assert CliRunner().invoke(main, [*fresh, str(tmp_path / "fresh")]).exit_code == 0
    assert read_manifest(tmp_path / "fresh/bs", BsManifest).placement == placed["file"].placement
    even = CliRunner().invoke(main, [*balanced, "--model", str(checkpoint), "--out", str(tmp_path / "even")])
    assert even.exit_code == 0
    assert read_manifest(tmp_path / "even/bs", BsManifest).placement != placed["file"].placement

    replicated = CliRunner().invoke(main, ["place", str(bundle), "--out", str(tmp_path / "r"), "--replicas", "2"])
    assert replicated.exit_code == 0, replicated.output
    for row, used in zip(read_manifest(tmp_path / "r/bs", BsManifest).placement, counts, strict=True):
        twice = {expert for expert, devices in enumerate(row) if len(devices) == 2}
        assert twice == set(sorted(range(8), key=lambda e: (-used[e], e))[:2])


def test_the_table_names_every_block(tmp_path: Path) -> None:
    bundle, _ = _export(tmp_path)
    result = CliRunner().invoke(main, ["calibrate", str(bundle), "--text", str(_text(tmp_path)), "--tokens", "60"])
    assert result.exit_code == 0, result.output
    assert "60 tokens" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 120
    assert CliRunner().invoke(main, ["inspect", str(bundle)]).stdout.count("of 60 tokens") == 1


def test_texts_share_the_tokens_and_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    bundle, _ = _export(tmp_path)
    short = tmp_path / "short.txt"
    short.write_text("ab")
    assert calibrate_bundle(bundle, [short, _text(tmp_path)], tokens=40).tokens == 40
    untouched = read_manifest(bundle / "bs", BsManifest)
    short.write_text("")
    with pytest.raises(BundleError, match=r"short\.txt: 0 tokens of text; give more"):
        calibrate_bundle(bundle, [short])
    assert read_manifest(bundle / "bs", BsManifest) == untouched

    gone = shutil.copytree(bundle, tmp_path / "gone")
    (gone / "bs/tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match=r"tokenizer\.json: cannot be read .*copy the folder again"):
        calibrate_bundle(gone, [_text(tmp_path)])
    (gone / "bs/tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json: missing; copy the folder again"):
        calibrate_bundle(gone, [_text(tmp_path)])

    bare = tiny_checkpoint(tmp_path / "bare", "mixtral")
    (bare / "tokenizer.json").unlink()
    config = ExportConfig(tmp_path / "no-tokenizer")
    export_bundle(plan_export(bare, "tiny", config), config)
    with pytest.raises(BundleError, match="has no tokenizer"):
        calibrate_bundle(config.out, [_text(tmp_path)])


def test_norms_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    bundle, _ = _export(tmp_path)
    copy = shutil.copytree(bundle / "bs", tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["calibration"]["norms"].pop()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"calibration\.norms is not 2 blocks x 8 experts"):
        read_manifest(copy, BsManifest)
