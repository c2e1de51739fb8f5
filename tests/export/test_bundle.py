"""A bundle is whole or not there, complete for both sides, and the same whatever happened on the way."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import CHAT_TEMPLATE, tiny_checkpoint, write_checkpoint_file

from wdmoe.export.bundle import ExportConfig, ExportResult, export_bundle, plan_export
from wdmoe.export.journal import Journal
from wdmoe.runtime.errors import BundleError, CheckpointError
from wdmoe.runtime.manifest import BsManifest, DeviceManifest, read_manifest, verify_files
from wdmoe.runtime.tensor_file import map_tensors, read_spans


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", "qwen2_moe", dtype="bfloat16")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    _export(checkpoint, out)
    return out


def _export(
    checkpoint: Path, out: Path, on_bytes: Callable[[int], None] = lambda _: None, **options: Any
) -> ExportResult:
    config = ExportConfig(out, **({"workers": 1} | options))  # one: files and pieces in a known order
    return export_bundle(plan_export(checkpoint, "tiny", config), config, on_bytes)


def _tree(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class _Interruption(Exception):
    pass


def _interrupt_after(pieces: int) -> Callable[[int], None]:
    left = iter(range(pieces))

    def on_bytes(_: int) -> None:
        if next(left, None) is None:
            raise _Interruption

    return on_bytes


def test_every_folder_passes_the_check_of_the_side_that_uses_it(bundle: Path) -> None:
    bs = read_manifest(bundle / "bs", BsManifest)
    verify_files(bundle / "bs", bs)
    assert set(bs.files) == {path.name for path in (bundle / "bs").iterdir()} - {"manifest.json"}
    assert (bs.n_devices, len(bs.stages), len(bs.shared), bs.precision) == (4, 3, 2, "fp16")
    for number in range(4):
        folder = bundle / f"device-{number}"
        device = read_manifest(folder, DeviceManifest)
        verify_files(folder, device)
        assert set(device.files) == {path.name for path in folder.iterdir()} - {"manifest.json"}
        assert device.bundle_id == bs.bundle_id
        assert [(e.block, e.expert) for e in device.experts] == [
            (b, e) for b in (0, 1) for e in _experts_of(bs, number)
        ]


def _experts_of(bs: BsManifest, device: int) -> list[int]:
    return [expert for expert, devices in enumerate(bs.placement[0]) if device in devices]


def test_experts_are_named_by_their_content_and_stored_once(bundle: Path) -> None:
    files = list((bundle / "experts").iterdir())
    assert len(files) == 16
    for path in files:
        assert path.name == f"{hashlib.sha256(path.read_bytes()).hexdigest()}.safetensors"
        assert path.stat().st_nlink == 2  # here and in the folder of one device
        assert {name: (s.dtype, s.shape) for name, s in read_spans(path).items()} == {
            "gate_proj": ("F16", (24, 32)),
            "up_proj": ("F16", (24, 32)),
            "down_proj": ("F16", (32, 24)),
        }


def test_tokenizer_and_chat_template_go_to_the_base_station(bundle: Path, checkpoint: Path) -> None:
    bs = read_manifest(bundle / "bs", BsManifest)
    assert (bs.tokenizer, bs.chat_template) == ("tokenizer.json", "chat_template.jinja")
    assert (bundle / "bs/chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert (bundle / "bs/tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    _export(tiny_checkpoint(tmp_path / "c", "mixtral", tie_word_embeddings=True), tmp_path / "bundle")
    assert not (tmp_path / "bundle/bs/head.safetensors").exists()
    assert b"embedding.safetensors" in (tmp_path / "bundle/bs/head.onnx").read_bytes()


def test_a_readme_says_how_to_start_the_device(bundle: Path) -> None:
    text = (bundle / "device-3/README.md").read_text()
    assert "wdmoe-device --bundle . --bs tcp://BS_HOST:5555" in text
    assert "--enrol TOKEN" in text and "`wdmoe-bs enrol device-3`" in text
    assert "Engines are not\nbuilt at export" in text and "may be copied" in text
    assert "6, 7 of 8" in text


def test_golden_rows_look_like_rows_of_their_block(bundle: Path, checkpoint: Path) -> None:
    golden = map_tensors(bundle / "device-0/golden.safetensors")
    assert {name: tensor.shape for name, tensor in golden.items()} == {
        name: (4, 32)
        for block in ("00", "01")
        for name in (f"input.block_{block}", *(f"output.block_{block}.expert_{e}" for e in ("00", "01")))
    }
    other = map_tensors(bundle / "device-1/golden.safetensors")
    np.testing.assert_array_equal(golden["input.block_00"], other["input.block_00"])
    assert not np.array_equal(golden["input.block_00"], golden["input.block_01"])


def test_the_bundle_id_does_not_depend_on_the_placement(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    other = _export(checkpoint, tmp_path / "bundle", devices=3)
    assert other.bundle_id == read_manifest(bundle / "bs", BsManifest).bundle_id
    sizes = [len(read_manifest(tmp_path / f"bundle/device-{k}", DeviceManifest).experts) for k in range(3)]
    assert sizes == [4, 4, 8]


def test_two_ways_to_say_the_placement_are_refused() -> None:
    with pytest.raises(ValueError, match="not both"):
        ExportConfig(experts_per_device=2, devices=4)


def test_the_same_export_again_is_already_there(bundle: Path, checkpoint: Path) -> None:
    before = _tree(bundle)
    assert _export(checkpoint, bundle).already_there
    assert _tree(bundle) == before


@pytest.mark.parametrize(
    ("options", "difference"),
    [({"devices": 2}, "another placement"), ({"precision": "fp32"}, "another precision")],
)
def test_another_bundle_is_replaced_only_by_force(
    checkpoint: Path, bundle: Path, tmp_path: Path, options: dict[str, Any], difference: str
) -> None:
    out = shutil.copytree(bundle, tmp_path / "bundle")
    with pytest.raises(BundleError, match=f"{difference}.*--force"):
        _export(checkpoint, out, **options)
    assert _tree(out) == _tree(bundle)
    assert not _export(checkpoint, out, **options, force=True).already_there
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert _export(checkpoint, out, **options).already_there


def test_a_damaged_bundle_is_not_taken_for_the_same(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    out = shutil.copytree(bundle, tmp_path / "bundle")
    (out / "bs/stage_01.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match=r"damaged file stage_01\.safetensors.*--force"):
        _export(checkpoint, out)
    (out / "bs/manifest.json").write_text("{}")
    _export(checkpoint, out, force=True)
    assert _tree(out) == _tree(bundle)


def test_what_is_not_a_bundle_is_never_replaced(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("four years")
    with pytest.raises(BundleError, match="not a bundle"):
        _export(checkpoint, tmp_path, force=True)
    assert (tmp_path / "thesis.txt").read_text() == "four years"


def test_an_empty_folder_may_become_the_bundle(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    _export(checkpoint, tmp_path)
    assert _tree(tmp_path) == _tree(bundle)


# 16 experts of 3 tensors, then the base station.
@pytest.mark.parametrize("pieces", [0, 4, 20, 47, 48, 55, 78])
def test_an_interrupted_export_goes_on_and_ends_the_same(
    checkpoint: Path, bundle: Path, tmp_path: Path, pieces: int
) -> None:
    with pytest.raises(_Interruption):
        _export(checkpoint, tmp_path / "bundle", _interrupt_after(pieces))
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.partial"]
    assert not list(tmp_path.rglob("manifest.json"))
    partial = tmp_path / "bundle.partial"
    finished = {path: path.stat().st_mtime_ns for path in partial.glob("*/*.safetensors")}
    assert len(list(partial.glob("experts/*.safetensors"))) == min(16, pieces // 3)
    assert bool(list(partial.glob("bs/*.safetensors"))) == (pieces > 48)

    _export(checkpoint, tmp_path / "bundle")
    assert _tree(tmp_path / "bundle") == _tree(bundle)
    for path, written in finished.items():
        assert (tmp_path / "bundle" / path.relative_to(partial)).stat().st_mtime_ns == written  # not written again


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_an_interrupted_export_of_quantised_experts_ends_the_same(tmp_path: Path, precision: str) -> None:
    wide: dict[str, Any] = {
        "num_hidden_layers": 1,
        "num_local_experts": 2,
        "hidden_size": 1056,
        "intermediate_size": 512,
    }
    folder = tiny_checkpoint(tmp_path / "checkpoint", "mixtral", **wide)  # matrices of several pieces
    _export(folder, tmp_path / "whole", precision=precision, experts_per_device=1)
    with pytest.raises(_Interruption):
        _export(folder, tmp_path / "bundle", _interrupt_after(12), precision=precision, experts_per_device=1)
    assert len(list(tmp_path.glob("bundle.partial/experts/*.safetensors"))) == 1
    _export(folder, tmp_path / "bundle", precision=precision, experts_per_device=1)
    assert _tree(tmp_path / "bundle") == _tree(tmp_path / "whole")


def test_the_manifests_say_what_quantising_costs(checkpoint: Path, tmp_path: Path) -> None:
    errors = {}
    for precision in ("fp16", "int8", "int4"):
        result = _export(checkpoint, tmp_path / precision, precision=precision)
        bs = read_manifest(result.out / "bs", BsManifest)
        assert bs.quantisation_error == read_manifest(result.out / "device-0", DeviceManifest).quantisation_error
        errors[precision] = bs.quantisation_error
    int8, int4 = errors["int8"], errors["int4"]
    assert errors["fp16"] is None and int8 is not None and int4 is not None
    assert 0 < int8.rms < 0.02
    assert 0.05 < int4.rms < 0.3
    assert int8.largest > int8.rms and int4.largest > int4.rms


def test_a_killed_export_goes_on_and_ends_the_same(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
left = iter(range(20))
config = ExportConfig(Path({str(tmp_path / "bundle")!r}), workers=1)
plan = plan_export(Path({str(checkpoint)!r}), "tiny", config)
export_bundle(plan, config, lambda _: next(left, None) is None and os.kill(os.getpid(), signal.SIGTERM))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGTERM
    assert not list(tmp_path.rglob("manifest.json"))
    assert list(tmp_path.glob("bundle.partial/experts/*.partial"))  # what it was writing

    _export(checkpoint, tmp_path / "bundle")
    assert _tree(tmp_path / "bundle") == _tree(bundle)


def test_a_finished_expert_that_was_damaged_since_is_written_again(
    checkpoint: Path, bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(_Interruption):
        _export(checkpoint, tmp_path / "bundle", _interrupt_after(20))
    damaged, shorter, *_ = (tmp_path / "bundle.partial/experts").glob("*.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    shorter.write_bytes(b"")
    with (tmp_path / "bundle.partial/done.jsonl").open("a") as record:
        record.write('{"key": "cut sh')
    _export(checkpoint, tmp_path / "bundle")
    assert _tree(tmp_path / "bundle") == _tree(bundle)


def test_nothing_of_another_checkpoint_gets_into_a_resumed_export(
    checkpoint: Path, bundle: Path, tmp_path: Path
) -> None:
    other = tiny_checkpoint(tmp_path / "other", "qwen2_moe", dtype="bfloat16", seed=1)
    with pytest.raises(_Interruption):
        _export(other, tmp_path / "bundle", _interrupt_after(40))
    _export(checkpoint, tmp_path / "bundle")
    assert _tree(tmp_path / "bundle") == _tree(bundle)


def test_two_exports_do_not_write_into_one_folder(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle.partial").mkdir()
    with (
        Journal(tmp_path / "bundle.partial"),
        pytest.raises(BundleError, match="another wdmoe-export"),
    ):
        _export(checkpoint, tmp_path / "bundle")
    _export(checkpoint, tmp_path / "bundle")


def test_a_weight_too_large_for_float16_stops_the_export(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "c")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    path = folder / "model.safetensors"
    tensors = {
        key: (np.array(raw).astype(np.uint32) << np.uint32(16)).view(np.float32)
        for key, raw in map_tensors(path).items()
    }
    tensors[name][3, 2] = 1e5
    write_checkpoint_file(path, tensors, "BF16")
    with pytest.raises(CheckpointError, match=f"tensor {name}: the value .* does not fit"):
        _export(folder, tmp_path / "bundle")
    _export(folder, tmp_path / "bundle", precision="fp32")


def test_equal_experts_share_one_file(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "c", "mixtral")
    path = folder / "model.safetensors"
    tensors = {key: np.array(raw) for key, raw in map_tensors(path).items()}
    for weight in ("w1", "w2", "w3"):
        prefix = "model.layers.0.block_sparse_moe.experts"
        tensors[f"{prefix}.1.{weight}.weight"] = tensors[f"{prefix}.0.{weight}.weight"]
    write_checkpoint_file(path, tensors, "F32")
    _export(folder, tmp_path / "bundle")
    assert len(list((tmp_path / "bundle/experts").iterdir())) == 15
    device = read_manifest(tmp_path / "bundle/device-0", DeviceManifest)
    assert device.experts[0].weights == device.experts[1].weights
    verify_files(tmp_path / "bundle/device-0", device)


def test_threads_change_nothing_in_the_bundle(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    _export(checkpoint, tmp_path / "bundle", workers=4)
    assert _tree(tmp_path / "bundle") == _tree(bundle)


def test_an_export_with_threads_that_is_interrupted_goes_on(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(_Interruption):
        _export(checkpoint, tmp_path / "bundle", _interrupt_after(30), workers=4)
    _export(checkpoint, tmp_path / "bundle", workers=4)
    assert _tree(tmp_path / "bundle") == _tree(bundle)


def test_an_export_killed_after_its_last_step_but_one_is_found_whole(
    checkpoint: Path, bundle: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(bundle, tmp_path / "bundle")
    (out / "done.jsonl").write_text("")
    assert _export(checkpoint, out).already_there
    assert _tree(out) == _tree(bundle)


def test_every_byte_of_the_weights_is_dealt_with_once(checkpoint: Path, tmp_path: Path) -> None:
    config = ExportConfig(tmp_path / "bundle", workers=2)
    plan = plan_export(checkpoint, "tiny", config)
    dealt_with: list[int] = []
    export_bundle(plan, config, dealt_with.append)
    assert sum(dealt_with) == plan.total_bytes


def test_a_disk_too_small_is_told_before_the_first_byte(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BundleError, match=r"0\.0 GB free, the bundle needs .* GB; choose another --out"):
        _export(checkpoint, tmp_path / "bundle")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_clamping_is_counted_and_another_export(checkpoint: Path, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "c", "mixtral")
    path = folder / "model.safetensors"
    tensors = {key: np.array(raw) for key, raw in map_tensors(path).items()}
    tensors["model.layers.1.block_sparse_moe.experts.7.w2.weight"][0, :3] = [1e5, -np.inf, 1e-9]
    write_checkpoint_file(path, tensors, "F32")
    with pytest.raises(CheckpointError, match=r"experts\.7\.w2\.weight: the value inf does not fit .* --clamp"):
        _export(folder, tmp_path / "bundle", precision="fp16")
    result = _export(folder, tmp_path / "bundle", precision="fp16", clamp=True)
    losses = read_manifest(result.out / "bs", BsManifest).expert_losses
    assert losses is not None
    assert (losses.weights, losses.clamped) == (16 * 3 * 32 * 24, 2)
    assert losses.to_zero >= 1
    assert _export(folder, tmp_path / "bundle", precision="fp16", clamp=True).already_there
    with pytest.raises(BundleError, match="2 clamped weights, and --clamp is not given"):
        _export(folder, tmp_path / "bundle", precision="fp16")
