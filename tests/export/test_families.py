"""Every family under both of its namings, and every field of a config that would change the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.export.checkpoint import ExpertRows, open_checkpoint
from wdmoe.export.families import FAMILIES
from wdmoe.runtime.errors import CheckpointError
from wdmoe.runtime.tensor_file import map_tensors


def test_tests_have_a_tiny_model_of_every_family() -> None:
    assert set(tiny.FAMILIES) == set(FAMILIES)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_both_namings_give_the_same_bundle(tmp_path: Path, family: str) -> None:
    ids = []
    for fused in (False, True):
        checkpoint = tiny.tiny_checkpoint(tmp_path / f"checkpoint-{fused}", family, fused=fused, shards=1 + fused)
        config = ExportConfig(tmp_path / f"bundle-{fused}")
        ids.append(export_bundle(plan_export(checkpoint, "tiny", config), config).bundle_id)
    assert ids[0] == ids[1]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("as_published", [True, False])
def test_what_transformers_saves_gives_the_same_bundle(tmp_path: Path, family: str, as_published: bool) -> None:
    """Its config.json has other fields than a published one, and its tensors come in another order."""
    transformers = pytest.importorskip("transformers")
    checkpoint = tiny.tiny_checkpoint(tmp_path / "checkpoint", family)
    saved = tmp_path / "saved"
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(saved, save_original_format=as_published)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (saved / name).write_bytes((checkpoint / name).read_bytes())
    ids = []
    for folder in (checkpoint, saved):
        config = ExportConfig(tmp_path / f"bundle-of-{folder.name}")
        ids.append(export_bundle(plan_export(folder, "tiny", config), config).bundle_id)
    assert ids[0] == ids[1]


def test_rows_of_a_fused_tensor_are_a_range_of_its_bytes(tmp_path: Path) -> None:
    folder = tiny.tiny_checkpoint(tmp_path / "c", "qwen3_moe", fused=True, dtype="float16")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    whole = map_tensors(folder / "model.safetensors")[name]
    checkpoint = open_checkpoint(folder)
    up = ExpertRows(name, (8, 48, 32), expert=5, first=24, last=48)
    np.testing.assert_array_equal(checkpoint.tensor(up), whole[5, 24:])
    np.testing.assert_array_equal(np.concatenate(list(checkpoint.pieces(up))), whole[5, 24:])
    assert checkpoint.span(up).size_bytes == 24 * 32 * 2
    assert str(up) == f"{name}[5, 24:48]"


def _plan(tmp_path: Path, family: str, fused: bool = False, **fields: Any) -> None:
    """Plan the export of a tiny checkpoint whose config says something else than its weights."""
    folder = tiny.tiny_checkpoint(tmp_path / "checkpoint", family, fused=fused)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    plan_export(folder, "tiny", ExportConfig(tmp_path / "bundle"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("mlp_bias", True),
        ("decoder_sparse_step", 2),
        ("mlp_only_layers", [0]),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("clip_qkv", 8.0),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("router_logit_softcapping", 30.0),
        ("partial_rotary_factor", 0.5),
        ("rms_norm_eps", 0),
        ("num_experts_per_tok", 9),
        ("num_key_value_heads", 3),
    ],
)
def test_what_the_graphs_cannot_express_is_refused_by_name(tmp_path: Path, family: str, field: str, value: Any) -> None:
    word = {"num_key_value_heads": "4 attention heads cannot share 3 key-value heads"}.get(field, field)
    with pytest.raises(CheckpointError, match=word):
        _plan(tmp_path, family, **{field: value})


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("mixtral", "attention_bias", True),
        ("mixtral", "use_sliding_window", True),
        ("qwen2_moe", "attention_bias", True),
        ("qwen2_moe", "use_sliding_window", True),
        ("olmoe", "sliding_window", 4096),
        ("granitemoe", "sliding_window", 4096),
        ("granitemoe", "logits_scaling", 0),
        ("granitemoe", "embedding_multiplier", "12"),
        ("qwen3_moe", "norm_topk_prob", 1),
    ],
)
def test_what_only_some_families_know_is_refused_by_the_others(
    tmp_path: Path, family: str, field: str, value: Any
) -> None:
    with pytest.raises(CheckpointError, match=field):
        _plan(tmp_path, family, **{field: value})


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("kind", ["dynamic", "longrope", "ntk"])
def test_a_rope_that_changes_with_the_length_is_refused_by_name(tmp_path: Path, family: str, kind: str) -> None:
    with pytest.raises(CheckpointError, match=f"rope type '{kind}' is not supported; supported: default, linear"):
        _plan(tmp_path, family, rope_scaling={"rope_type": kind, "factor": 2.0})


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "granitemoe"])
def test_biases_that_the_config_promises_must_be_there(tmp_path: Path, family: str) -> None:
    with pytest.raises(CheckpointError, match=r"self_attn\.q_proj\.bias is missing"):
        _plan(tmp_path, family, attention_bias=True)


def test_the_window_of_an_idle_switch_is_none(tmp_path: Path) -> None:
    for family in ("qwen2_moe", "qwen3_moe"):  # as published: the window is there, the switch is off
        folder = tiny.tiny_checkpoint(tmp_path / family, family, sliding_window=4, use_sliding_window=False)
        assert plan_export(folder, "tiny", ExportConfig()).layout.spec.sliding_window is None


def test_the_number_of_experts_goes_by_either_name(tmp_path: Path) -> None:
    folder = tiny.tiny_checkpoint(tmp_path / "c", "qwen3_moe")
    config = json.loads((folder / "config.json").read_text())
    config["num_local_experts"] = config.pop("num_experts")  # what transformers 5 saves
    (folder / "config.json").write_text(json.dumps(config))
    assert plan_export(folder, "tiny", ExportConfig()).layout.spec.n_experts == 8


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("fields", [{"num_experts": 7, "num_local_experts": 7}, {"ff": 23}, {"ff": 25}])
def test_fused_experts_of_another_shape_are_refused(tmp_path: Path, family: str, fields: dict[str, int]) -> None:
    """Fewer or narrower experts than the tensor holds would be cut out of the wrong places."""
    width = "moe_intermediate_size" if family.startswith("qwen") else "intermediate_size"
    changed = {width if name == "ff" else name: value for name, value in fields.items()}
    with pytest.raises(CheckpointError, match=r"has shape .* config\.json implies"):
        _plan(tmp_path, family, fused=True, **changed)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_missing_half_of_fused_experts_is_named(tmp_path: Path, family: str) -> None:
    folder = tiny.tiny_checkpoint(tmp_path / "c", family, fused=True)
    path = folder / "model.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in map_tensors(path).items()}
    (lost,) = (name for name in tensors if name.startswith("model.layers.1.") and name.endswith("experts.down_proj"))
    del tensors[lost]
    tiny.write_checkpoint_file(path, tensors, "F32")
    with pytest.raises(CheckpointError, match=f"tensor {lost} is missing"):
        plan_export(folder, "tiny", ExportConfig())


def test_a_fused_weight_too_large_for_float16_is_named_with_its_rows(tmp_path: Path) -> None:
    folder = tiny.tiny_checkpoint(tmp_path / "c", "mixtral", fused=True)
    path = folder / "model.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in map_tensors(path).items()}
    tensors["model.layers.1.mlp.experts.gate_up_proj"][5, 30, 2] = 1e5
    tiny.write_checkpoint_file(path, tensors, "F32")
    config = ExportConfig(tmp_path / "bundle", precision="fp16")
    with pytest.raises(CheckpointError, match=r"gate_up_proj\[5, 24:48\]: the value 100000 does not fit"):
        export_bundle(plan_export(folder, "tiny", config), config)


def test_graphs_without_multipliers_have_no_node_for_them(tmp_path: Path) -> None:
    import onnx

    for numbers, nodes in ((1.0, 0), (3.0, 1)):
        fields: dict[str, Any] = dict.fromkeys(
            ("embedding_multiplier", "residual_multiplier", "logits_scaling"), numbers
        )
        checkpoint = tiny.tiny_checkpoint(tmp_path / f"c{nodes}", "granitemoe", **fields)
        config = ExportConfig(tmp_path / f"b{nodes}")
        export_bundle(plan_export(checkpoint, "tiny", config), config)
        first, last = (onnx.load(config.out / f"bs/stage_0{k}.onnx", load_external_data=False) for k in (0, 2))
        assert [node.op_type for node in first.graph.node].count("Mul") == 2 * nodes  # embedding, attention
        assert [node.op_type for node in last.graph.node].count("Mul") == nodes  # experts
