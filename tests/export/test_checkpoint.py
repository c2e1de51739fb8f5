"""A checkpoint is read as it is published; what is wrong with one is said with the file and the remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_checkpoint, write_checkpoint_file

from wdmoe.export.bundle import ExportConfig, plan_export
from wdmoe.export.checkpoint import open_checkpoint
from wdmoe.runtime.errors import CheckpointError
from wdmoe.runtime.tensor_file import map_tensors

EMBEDDING = "model.embed_tokens.weight"
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("whole") / "c", "qwen2_moe")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("sharded") / "c", "qwen2_moe", shards=3)


def _edit_json(name: str, **fields: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | fields
        (folder / name).write_text(json.dumps(content))

    return edit


def _edit_tensors(change: Callable[[dict[str, Any]], object], dtype: str = "F32") -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = {name: np.array(tensor) for name, tensor in map_tensors(folder / "model.safetensors").items()}
        change(tensors)
        write_checkpoint_file(folder / "model.safetensors", tensors, dtype)

    return edit


def _truncate(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1000])

    return edit


def _become_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _unlink(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return edit


DAMAGE_OF_SHARDS: list[tuple[Callable[[Path], None], str]] = [
    (_unlink(SHARD), f"{SHARD}: missing, the index names it; download"),
    (_truncate(SHARD), f"{SHARD}: .* the file is incomplete; download this file again"),
    (_write(SHARD, b"not safetensors at all"), f"{SHARD}: .*not a safetensors file; download"),
    (_write("model.safetensors.index.json", b"{}"), "has no weight_map"),
    (_edit_json("model.safetensors.index.json", weight_map={"a": "../x.safetensors"}), r"'\.\./x\.safetensors'"),
    (_unlink("model.safetensors.index.json"), "model.safetensors.index.json: missing, but"),
]
DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (_unlink("config.json"), r"config\.json: missing"),
    (_write("config.json", b"{"), r"config\.json: not JSON"),
    (_unlink("model.safetensors"), "has no weights"),
    (_become_pickle, r"pytorch_model\.bin: a pickle .*save_pretrained"),
    (_edit_json("config.json", model_type="mamba"), "'mamba' is not supported; supported: mixtral, qwen2_moe"),
    (_edit_json("config.json", quantization_config={"quant_method": "gptq"}), "quantised .gptq."),
    (_edit_json("config.json", hidden_act="gelu"), "hidden_act = 'gelu'"),
    (_edit_json("config.json", use_sliding_window=True), "use_sliding_window = True"),
    (_edit_json("config.json", decoder_sparse_step=2), "decoder_sparse_step = 2"),
    (_edit_json("config.json", mlp_only_layers=[0]), r"mlp_only_layers = \[0\]"),
    (_edit_json("config.json", hidden_size=None), "hidden_size is None, expected a positive integer"),
    (_edit_json("config.json", moe_intermediate_size=25), "config.json implies"),
    (_edit_json("config.json", qkv_bias=False), r"_proj\.bias is not understood"),
    (_edit_json("config.json", num_hidden_layers=1), r"layers\.1\..* is not understood"),
    (_edit_json("config.json", tie_word_embeddings="yes"), "tie_word_embeddings is 'yes'"),
    (_edit_tensors(lambda t: t.pop(EMBEDDING)), f"tensor {EMBEDDING} is missing"),
    (_edit_tensors(lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": np.ones(8)})), "q_norm"),
    (_edit_tensors(lambda t: t.update({EMBEDDING: t[EMBEDDING].astype(np.int32)}), "I32"), "type I32"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_an_unfit_checkpoint_is_refused_by_name(
    whole: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    _expect_refusal(whole, tmp_path, damage, message)


@pytest.mark.parametrize(("damage", "message"), DAMAGE_OF_SHARDS)
def test_a_damaged_shard_is_refused_by_name(
    sharded: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    _expect_refusal(sharded, tmp_path, damage, message)


def _expect_refusal(source: Path, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = shutil.copytree(source, tmp_path / "c")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        plan_export(folder, "tiny", ExportConfig(tmp_path / "bundle"))
    assert not (tmp_path / "bundle.partial").exists()


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        open_checkpoint(tmp_path / "nothing")


def test_shards_hold_the_same_tensors_as_one_file(whole: Path, sharded: Path) -> None:
    one, several = open_checkpoint(whole), open_checkpoint(sharded)
    assert one.names == several.names
    for name in one.names:
        np.testing.assert_array_equal(one.tensor(name), several.tensor(name))
        np.testing.assert_array_equal(np.concatenate(list(several.pieces(name))), one.tensor(name))


def test_large_tensors_come_in_whole_rows(tmp_path: Path) -> None:
    tensor = np.arange(700 * 1000, dtype=np.float32).reshape(700, 1000)
    (tmp_path / "config.json").write_text("{}")
    write_checkpoint_file(tmp_path / "model.safetensors", {"t": tensor}, "F32")
    pieces = list(open_checkpoint(tmp_path).pieces("t"))
    assert len(pieces) > 1
    assert all(piece.shape[1:] == (1000,) for piece in pieces)
    np.testing.assert_array_equal(np.concatenate(pieces), tensor)


def test_the_source_hash_names_weights_not_places(whole: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(whole, tmp_path / "copy")
    assert open_checkpoint(copy).source_sha256 == open_checkpoint(whole).source_sha256
    other = tiny_checkpoint(tmp_path / "other", "qwen2_moe", seed=1)  # a fine-tuned model: same config, same shapes
    assert open_checkpoint(other).source_sha256 != open_checkpoint(whole).source_sha256


def test_the_stamp_shows_any_change_of_a_file(whole: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(whole, tmp_path / "copy")
    before = open_checkpoint(copy).stamp
    (copy / "model.safetensors").touch()
    assert open_checkpoint(copy).stamp != before


def test_ids_of_the_generation_config_have_the_last_word(whole: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(whole, tmp_path / "copy")
    spec = plan_export(copy, "tiny", ExportConfig()).layout.spec
    assert (spec.bos_token_id, spec.eos_token_ids) == (256, (257,))
    (copy / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    spec = plan_export(copy, "tiny", ExportConfig()).layout.spec
    assert (spec.bos_token_id, spec.eos_token_ids) == (256, (7, 9))


def test_precision_auto_follows_the_weights(tmp_path: Path) -> None:
    for dtype, precision in [("float32", "fp32"), ("float16", "fp16"), ("bfloat16", "fp16")]:
        folder = tiny_checkpoint(tmp_path / dtype, "mixtral", dtype=dtype)
        assert plan_export(folder, "tiny", ExportConfig()).precision == precision
    assert plan_export(tmp_path / "bfloat16", "tiny", ExportConfig(precision="fp32")).precision == "fp32"
