"""Carving whole checkpoints: what comes out, interruptions, refusals."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny_dense
import torch
import transformers

from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.export.carve import CarveShape
from wdmoe.export.carve_state import CarveState
from wdmoe.export.carving import PHASES, CarveConfig, Carved, carve_checkpoint, plan_carving
from wdmoe.export.checkpoint import open_checkpoint
from wdmoe.export.dense import carve_shape, dense_model
from wdmoe.export.dense_forward import Attention, add_feed_forward, rms_norm
from wdmoe.export.forward import Forward, bundle_experts
from wdmoe.runtime.errors import CheckpointError
from wdmoe.runtime.manifest import BsManifest, DeviceManifest, read_manifest

Logits = npt.NDArray[np.float64]

CASES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama-tied-bfloat16": {"family": "llama", "tie_word_embeddings": True, "dtype": "bfloat16", "shards": 3},
    "llama-rope": {
        "family": "llama",
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama-multi-head": {"family": "llama", "num_key_value_heads": 4, "head_dim": None, "rope_theta": 500.0},
    "mistral-head-dim": {"family": "mistral", "dtype": "float16", "shards": 2},
    "qwen2": {"family": "qwen2"},
    "qwen2-tied": {"family": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 1},
}  # fmt: skip


def carve(folder: Path, out: Path, **options: Any) -> Carved:
    text = tiny_dense.text_file(out.parent / "text.txt")
    settings: dict[str, Any] = {"experts": 4, "tokens": 1024, "window": 32, **options}
    return carve_checkpoint(plan_carving(folder, CarveConfig(out, (text,), **settings)))


def oracle(folder: Path, dtype: Any = torch.float64) -> Any:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    return model.eval()


def logits_of(model: Any, tokens: npt.NDArray[np.int64]) -> Logits:
    with torch.no_grad():
        logits: Logits = model(torch.from_numpy(tokens)[None]).logits[0].double().numpy()
        return logits


def tokens(count: int = 40) -> npt.NDArray[np.int64]:
    return np.random.default_rng(1).integers(0, 320, count)


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_with_every_expert_chosen_the_carved_model_is_the_dense_model(tmp_path: Path, options: dict[str, Any]) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", **options)
    carve(dense, tmp_path / "moe", top_k=4)
    expected = logits_of(oracle(dense), tokens())
    carved = oracle(tmp_path / "moe")
    assert type(carved).__name__ == "Qwen2MoeForCausalLM"
    np.testing.assert_allclose(logits_of(carved, tokens()), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_the_dense_forward_pass_is_that_of_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = tiny_dense.tiny_dense(tmp_path / "dense", **options)
    model = dense_model(open_checkpoint(folder), experts=4)
    layout, ids = model.layout, tokens()
    hidden = model.matrix(layout.embedding)[ids]
    for block in range(layout.spec.n_blocks):
        hidden += Attention(model, block, 64)(hidden)
        norm = model.matrix(layout.block(block).post_norm)
        add_feed_forward(hidden, norm, layout.norm_eps, model.feed_forward(block))
    normed = rms_norm(hidden, model.matrix(layout.final_norm), layout.norm_eps)
    logits = normed @ model.matrix(layout.embedding if layout.tied_head else layout.head).T
    expected = logits_of(oracle(folder), ids)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_carved_checkpoint_brings_its_tokenizer_licence_and_record(tmp_path: Path) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", "llama", shards=2)
    made = carve(dense, tmp_path / "moe", shared=16)
    shards = {f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)}
    small = {"config.json", "model.safetensors.index.json", "carving.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "moe").iterdir()} == shards | small | {"LICENSE"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "moe")
    assert tokenizer.decode(tokenizer("tea")["input_ids"]) == "tea"
    record = json.loads((tmp_path / "moe" / "carving.json").read_bytes())
    assert (record["recipe"]["shared"], record["recipe"]["expert_neurons"]) == (16, 8)
    assert [block["error"] for block in record["blocks"]] == [block.error for block in made.blocks]
    assert not (tmp_path / "moe.partial").exists()


def test_distillation_brings_blocks_nearer_to_the_dense_ones(tmp_path: Path) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", "qwen2")
    cut = carve(dense, tmp_path / "cut", tokens=8192, distil="none")
    fitted = carve(dense, tmp_path / "fitted", tokens=8192)
    assert [block.error_cut for block in cut.blocks] == [block.error for block in cut.blocks]
    for before, after in zip(cut.blocks, fitted.blocks, strict=True):
        assert before.error_cut == after.error_cut
        assert after.error < 0.9 * before.error


def test_the_error_that_is_reported_is_that_of_the_written_block(tmp_path: Path) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", "llama", num_hidden_layers=1)
    text = tiny_dense.text_file(tmp_path / "text.txt")
    plan = plan_carving(dense, CarveConfig(tmp_path / "moe", (text,), experts=4, tokens=1024, window=32))
    (report,) = carve_checkpoint(plan).blocks
    judged = torch.from_numpy(plan.windows.token_ids[plan.windows.held_out])
    outputs: list[Any] = []
    for folder in (dense, tmp_path / "moe"):
        model = oracle(folder)
        model.model.layers[0].mlp.register_forward_hook(
            lambda _module, _inputs, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
        with torch.no_grad():
            model(judged)
    exact, carved = (output.reshape(-1, 32) for output in outputs)
    relative = ((carved - exact).square().sum(-1) / exact.square().sum(-1)).mean().sqrt()
    assert float(relative) == pytest.approx(report.error, rel=1e-4)


def test_a_carved_checkpoint_exports_and_runs_as_in_transformers(tmp_path: Path) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", "llama")
    carve(dense, tmp_path / "moe")
    config = ExportConfig(tmp_path / "bundle", experts_per_device=2)
    export_bundle(plan_export(tmp_path / "moe", "tiny", config), config)
    manifest = read_manifest(config.out / "bs", BsManifest)
    devices = [read_manifest(config.out / f"device-{n}", DeviceManifest) for n in range(manifest.n_devices)]
    experts = bundle_experts(config.out, devices)
    *_, logits = Forward(config.out / "bs", manifest, [tokens()], experts).blocks()
    model = oracle(tmp_path / "moe", torch.float32)
    single = logits_of(model, tokens())
    double = logits_of(model.double(), tokens())
    assert np.abs(logits - double).max() <= 2 * np.abs(single - double).max() + 1e-6


class Killed(Exception):
    """In place of a signal."""


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("phase", PHASES)
def test_an_interrupted_carving_goes_on_and_ends_the_same(tmp_path: Path, block: int, phase: str) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", "llama", num_hidden_layers=3)
    carve(dense, tmp_path / "whole")
    config = CarveConfig(tmp_path / "moe", (tmp_path / "text.txt",), experts=4, tokens=1024, window=32)
    begun: list[tuple[int, str]] = []

    def kill(at_block: int, at_phase: str) -> None:
        begun.append((at_block, at_phase))
        if (at_block, at_phase) == (block, phase):
            raise Killed

    with pytest.raises(Killed):
        carve_checkpoint(plan_carving(dense, config), kill)
    assert not config.out.exists()
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "moe.partial").glob("model-*.safetensors")}
    assert len(stamps) == block
    begun.clear()
    made = carve_checkpoint(plan_carving(dense, config), lambda *at: begun.append(at))
    assert begun[0] == (block, PHASES[0])  # finished blocks are not done again
    assert {name: (config.out / name).stat().st_mtime_ns for name in stamps} == stamps
    assert content(config.out) == content(tmp_path / "whole")
    assert len(made.blocks) == 3


def test_an_interruption_after_the_last_block_costs_no_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", "llama")
    carve(dense, tmp_path / "whole")

    def kill(_state: CarveState) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(CarveState, "close_record", kill)
        with pytest.raises(Killed):
            carve(dense, tmp_path / "moe")
    begun: list[tuple[int, str]] = []
    config = CarveConfig(tmp_path / "moe", (tmp_path / "text.txt",), experts=4, tokens=1024, window=32)
    carve_checkpoint(plan_carving(dense, config), lambda *at: begun.append(at))
    assert begun == []
    assert content(tmp_path / "moe") == content(tmp_path / "whole")


def test_a_damaged_or_different_unfinished_carving_begins_again(tmp_path: Path) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", "llama")
    carve(dense, tmp_path / "whole")
    config = CarveConfig(tmp_path / "moe", (tmp_path / "text.txt",), experts=4, tokens=1024, window=32)

    def kill(block: int, phase: str) -> None:
        if block == 1:
            raise Killed

    def begun_after(config: CarveConfig) -> list[tuple[int, str]]:
        begun: list[tuple[int, str]] = []
        carve_checkpoint(plan_carving(dense, config), lambda *at: begun.append(at))
        return begun

    with pytest.raises(Killed):
        carve_checkpoint(plan_carving(dense, config), kill)
    first = tmp_path / "moe.partial" / "model-00001-of-00003.safetensors"
    first.write_bytes(first.read_bytes()[:-1] + b"?")
    assert begun_after(config)[0] == (0, PHASES[0])
    assert content(config.out) == content(tmp_path / "whole")

    other = replace(config, out=tmp_path / "other")
    with pytest.raises(Killed):
        carve_checkpoint(plan_carving(dense, other), kill)
    assert begun_after(replace(other, seed=1))[0] == (0, PHASES[0])


def test_one_process_at_a_time_carves_into_a_folder(tmp_path: Path) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", "llama")
    with (
        CarveState(tmp_path / "moe.partial", {"blocks": 2}),
        pytest.raises(CheckpointError, match="another carving is writing there"),
    ):
        carve(dense, tmp_path / "moe")


def test_what_is_already_there_is_kept(tmp_path: Path) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", "llama")
    made = carve(dense, tmp_path / "moe")
    before = content(tmp_path / "moe")
    again = carve(dense, tmp_path / "moe")
    assert (made.already_there, again.already_there, again.blocks) == (False, True, made.blocks)
    with pytest.raises(CheckpointError, match="choose another --out or remove it"):
        carve(dense, tmp_path / "moe", top_k=1)
    assert content(tmp_path / "moe") == before


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", "llama")
    span = open_checkpoint(dense).span("model.layers.1.mlp.up_proj.weight")
    with (dense / "model.safetensors").open("r+b") as file:
        file.seek(span.offset_bytes)
        file.write(np.float32(np.nan).tobytes())
    with pytest.raises(CheckpointError, match="out of block 1 is not finite"):
        carve(dense, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_too_little_room_is_told_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", "llama")
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match="choose another --out"):
        carve(dense, tmp_path / "moe")
    assert not list((tmp_path / "moe.partial").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"model_type": "gemma2"}, "'gemma2' cannot be carved; .*llama, mistral, qwen2"),
        ("llama", {"model_type": "mixtral"}, "mixture of experts already"),
        ("llama", {"attention_bias": True}, "attention_bias is true; .*no place for a bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias is true"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama", {"intermediate_size": 64}, r"has shape \[48, 32\], config.json implies \[64, 32\]"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ("llama", {"num_hidden_layers": 1}, "model.layers.1.* is not understood"),
        ("mistral", {"sliding_window": 64}, "slides over 64 positions of 256.*set sliding_window to null"),
        ("qwen2", {"use_sliding_window": True}, "slides over 128 .*set use_sliding_window to false"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ],
)
def test_what_a_carved_checkpoint_cannot_say_is_refused(
    tmp_path: Path, family: str, fields: dict[str, Any], message: str
) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", family)
    config = json.loads((dense / "config.json").read_bytes())
    (dense / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(CheckpointError, match=message):
        carve(dense, tmp_path / "moe")
    assert not (tmp_path / "moe.partial").exists()


def test_a_window_that_no_text_can_leave_is_no_window(tmp_path: Path) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", "mistral", sliding_window=256)
    carve(dense, tmp_path / "moe", top_k=4)
    expected = logits_of(oracle(dense), tokens())
    np.testing.assert_allclose(logits_of(oracle(tmp_path / "moe"), tokens()), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shared": 17}, "other 31 .* do not divide among 4 experts; give --shared 16 or 20"),
        ({"shared": 48}, "give --shared 44"),
        ({"shared": 99}, "give --shared 44"),
        ({"top_k": 5}, "more than the 4 experts"),
        ({"experts": 48}, "the shared expert needs one"),
    ],
)
def test_neurons_that_do_not_divide_are_refused_with_what_does(arguments: dict[str, int], message: str) -> None:
    asked = {"experts": 4, "top_k": 2, "shared": 16, **arguments}
    with pytest.raises(ValueError, match=message):
        carve_shape(48, **asked)


def test_half_of_the_neurons_are_shared_if_nothing_else_is_said() -> None:
    assert carve_shape(1536, 8, 2, None) == CarveShape(768, 8, 96, 2)
    assert carve_shape(50, 4, 2, None) == CarveShape(26, 4, 6, 2)
    assert carve_shape(11008, 8, 2, None) == CarveShape(5504, 8, 688, 2)
    assert carve_shape(9000, 60, 4, None) == CarveShape(4680, 60, 72, 4)  # 75 would not be a multiple of 8
