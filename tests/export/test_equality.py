"""The exported graphs, run one by one, equal the model that transformers makes of the same checkpoint.

Tolerance: the largest error of our logits against transformers in float64 is at most twice that of transformers
in float32, plus 1e-6 for logits of size 1 to 5: both are a handful of float32 roundings, and a maximum over a few
thousand of them varies by chance.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import tiny
import torch
import transformers

from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.export.quantising import rounded_rows
from wdmoe.runtime.manifest import PRECISIONS, BsManifest, DeviceManifest, ModelSpec, read_manifest
from wdmoe.runtime.quantised import expert_matrices
from wdmoe.runtime.tensor_file import map_tensors

FloatArray = npt.NDArray[np.float32]

CASES: dict[str, dict[str, Any]] = {
    "mixtral": {"family": "mixtral"},
    "mixtral-multi-head": {"family": "mixtral", "num_key_value_heads": 4, "shards": 3},
    "mixtral-head-dim": {"family": "mixtral", "head_dim": 16, "tie_word_embeddings": True},
    "mixtral-window": {"family": "mixtral", "sliding_window": 4},
    "mixtral-bfloat16": {"family": "mixtral", "dtype": "bfloat16"},
    "mixtral-yarn": {
        "family": "mixtral",
        "head_dim": 8,  # named, as transformers' yarn does not derive it
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "qwen2-moe": {"family": "qwen2_moe"},
    "qwen2-moe-tied": {"family": "qwen2_moe", "tie_word_embeddings": True, "norm_topk_prob": True, "shards": 2},
    "qwen2-moe-no-bias": {"family": "qwen2_moe", "qkv_bias": False, "dtype": "float16"},
    "qwen3-moe": {"family": "qwen3_moe"},
    "qwen3-moe-raw-bias": {"family": "qwen3_moe", "norm_topk_prob": False, "attention_bias": True},
    "qwen3-moe-top-3": {"family": "qwen3_moe", "num_experts_per_tok": 3, "head_dim": 8, "num_key_value_heads": 1},
    "qwen3-moe-window": {"family": "qwen3_moe", "use_sliding_window": True, "sliding_window": 4, "shards": 2},
    "qwen3-moe-tied-bfloat16": {"family": "qwen3_moe", "tie_word_embeddings": True, "dtype": "bfloat16"},
    "olmoe": {"family": "olmoe"},
    "olmoe-multi-head-normed": {"family": "olmoe", "num_key_value_heads": 4, "norm_topk_prob": True},
    "olmoe-bias-tied": {"family": "olmoe", "attention_bias": True, "tie_word_embeddings": True},
    "granitemoe": {"family": "granitemoe"},
    "granitemoe-untied-bias": {"family": "granitemoe", "tie_word_embeddings": False, "attention_bias": True},
    "granitemoe-other-numbers": {
        "family": "granitemoe",
        "embedding_multiplier": 0.3,
        "attention_multiplier": 1.7,
        "residual_multiplier": 2.5,
        "logits_scaling": 0.07,
    },
    **{f"{family}-fused": {"family": family, "fused": True} for family in tiny.FAMILIES},
}


@dataclass(slots=True)
class BundleRunner:
    """Runs a bundle by hand: graphs in onnxruntime, routing and cache in numpy."""

    bundle: Path
    manifest: BsManifest
    devices: list[DeviceManifest]
    past: list[tuple[FloatArray, FloatArray]] = field(default_factory=list)  # of each block
    _sessions: dict[Path, Any] = field(default_factory=dict)

    def logits(self, token_ids: npt.NDArray[np.int64]) -> FloatArray:
        """Feed the next tokens of the one sequence."""
        spec = self.manifest.model
        if not self.past:
            empty = np.zeros((1, 0, spec.kv_dim), np.float32)
            self.past = [(empty, empty)] * spec.n_blocks
        n_past = self.past[0][0].shape[1]
        positions = np.arange(n_past, n_past + len(token_ids))
        angles = positions[:, None].astype(np.float32) * np.array(spec.rope.inv_freq, np.float32)
        attention: dict[str, Any] = {
            "cos": np.cos(angles) * np.float32(spec.rope.attention_scaling),
            "sin": np.sin(angles) * np.float32(spec.rope.attention_scaling),
            "mask": _mask(spec, positions, n_past + len(token_ids))[None, None],
            "lanes": np.arange(len(token_ids))[None],
            "back": np.arange(len(token_ids)),
        }
        feed: dict[str, Any] = {"token_ids": token_ids}
        for block in range(spec.n_blocks):
            past_key, past_value = self.past[block]
            feed |= attention | {"past_key": past_key, "past_value": past_value}
            out = self._run(self.bundle / "bs" / self.manifest.stages[block], feed)
            self.past[block] = (
                np.concatenate([past_key, out["new_key"][None]], axis=1),
                np.concatenate([past_value, out["new_value"][None]], axis=1),
            )
            feed = {"residual": out["residual_out"], "moe_out": self._moe(block, out["hidden"], out["router_logits"])}
        hidden = self._run(self.bundle / "bs" / self.manifest.stages[-1], feed)["hidden"]
        head = self._run(self.bundle / "bs" / self.manifest.head, {"hidden": hidden})
        logits: FloatArray = head["logits"]
        return logits

    def _moe(self, block: int, hidden: FloatArray, router_logits: FloatArray) -> FloatArray:
        spec = self.manifest.model
        gates = np.exp(router_logits - router_logits.max(-1, keepdims=True))
        gates /= gates.sum(-1, keepdims=True)
        chosen = np.argsort(-gates, axis=-1, kind="stable")[:, : spec.top_k]
        weights = np.take_along_axis(gates, chosen, -1)
        if spec.norm_top_k:
            weights /= weights.sum(-1, keepdims=True)
        total = np.zeros_like(hidden)
        for device in self.devices:
            for entry in (entry for entry in device.experts if entry.block == block):
                rows, slots = np.nonzero(chosen == entry.expert)
                if len(rows):
                    path = self.bundle / f"device-{device.device}" / entry.graph
                    total[rows] += self._run(path, {"rows": hidden[rows]})["out"] * weights[rows, slots][:, None]
        if spec.shared_expert:
            total += self._run(self.bundle / "bs" / self.manifest.shared[block], {"hidden": hidden})["shared_out"]
        return total

    def _run(self, path: Path, feed: dict[str, Any]) -> dict[str, Any]:
        if path not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self._sessions[path] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        session = self._sessions[path]
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, feed), strict=True))


def _mask(spec: ModelSpec, positions: npt.NDArray[np.int64], length: int) -> FloatArray:
    distance = positions[:, None] - np.arange(length)
    seen = distance >= 0
    if spec.sliding_window is not None:
        seen &= distance < spec.sliding_window
    return np.where(seen, np.float32(0), np.float32(-np.inf))


def _exported(tmp_path: Path, precision: Any = "auto", **options: Any) -> tuple[Path, BundleRunner]:
    checkpoint = tiny.tiny_checkpoint(tmp_path / "checkpoint", **options)
    config = ExportConfig(tmp_path / "bundle", experts_per_device=3, precision=precision)
    export_bundle(plan_export(checkpoint, "tiny", config), config)
    manifest = read_manifest(config.out / "bs", BsManifest)
    devices = [read_manifest(config.out / f"device-{k}", DeviceManifest) for k in range(manifest.n_devices)]
    return checkpoint, BundleRunner(config.out, manifest, devices)


def _oracle(checkpoint: Path) -> Any:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",  # the grouped one has no float64
        output_loading_info=True,
    )
    assert not any(report.values())  # the checkpoint is what transformers thinks it should be
    return model.eval()


def _oracle_logits(model: Any, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    with torch.no_grad():
        logits: npt.NDArray[np.float64] = model(torch.from_numpy(tokens)[None]).logits[0].double().numpy()
        return logits


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_exported_graphs_give_the_logits_of_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    checkpoint, runner = _exported(tmp_path, **options)
    tokens = np.random.default_rng(1).integers(0, 320, 24)
    model = _oracle(checkpoint)
    single = _oracle_logits(model, tokens)
    double = _oracle_logits(model.double(), tokens)
    tolerance = 2 * np.abs(single - double).max() + 1e-6

    prefill = runner.logits(tokens[:20])
    assert np.abs(prefill - double[:20]).max() <= tolerance
    decoded = np.concatenate([runner.logits(tokens[20:21]), runner.logits(tokens[21:])])  # one token, then three
    assert np.abs(decoded - double[20:]).max() <= tolerance


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_float16_experts_are_the_rounded_experts_and_nothing_else_is(tmp_path: Path, family: str) -> None:
    checkpoint, runner = _exported(tmp_path, "fp16", family=family)
    tokens = np.random.default_rng(1).integers(0, 320, 24)
    model = _oracle(checkpoint)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data = parameter.data.half().float()
    single = _oracle_logits(model, tokens)
    double = _oracle_logits(model.double(), tokens)
    assert np.abs(runner.logits(tokens) - double).max() <= 2 * np.abs(single - double).max() + 1e-6


def _round_rows(experts: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    rows, *others = inputs
    return torch.from_numpy(rounded_rows(rows.float().numpy())).to(rows.dtype), *others


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 160, "moe_intermediate_size": 144}], ids=["tiny", "groups"])
def test_quantised_experts_are_what_the_files_say_and_nothing_else_is(
    tmp_path: Path, precision: str, sizes: dict[str, int]
) -> None:
    checkpoint, runner = _exported(tmp_path, precision, family="qwen2_moe", **sizes)
    tokens = np.random.default_rng(1).integers(0, 320, 24)
    model = _oracle(checkpoint)
    whole = _oracle_logits(model, tokens)
    for block, hashes in enumerate(runner.manifest.experts):
        experts = model.model.layers[block].mlp.experts
        for number, name in enumerate(hashes):
            path = runner.bundle / "experts" / f"{name}.safetensors"
            gate, up, down = (torch.from_numpy(m.float32().copy()) for m in expert_matrices(map_tensors(path), path))
            experts.gate_up_proj.data[number] = torch.cat([gate, up])
            experts.down_proj.data[number] = down
        if precision == "int4":  # rows come to these experts rounded to int8
            experts.register_forward_pre_hook(_round_rows)
    expected = _oracle_logits(model.double(), tokens)
    # The kernel rounds rows to what two int8 hold, a ten-thousandth; quantising itself costs much more.
    error = np.abs(runner.logits(tokens) - expected).max()
    assert error <= 1e-3 * np.abs(expected).max()
    assert error < 0.1 * np.abs(whole - expected).max()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_golden_outputs_are_what_the_graphs_answer(tmp_path: Path, precision: str) -> None:
    _, runner = _exported(tmp_path, precision, family="qwen2_moe")
    for device in runner.devices:
        golden = map_tensors(runner.bundle / f"device-{device.device}" / device.golden)
        for entry in device.experts:
            rows = golden[f"input.block_{entry.block:02d}"]
            answer = runner._run(runner.bundle / f"device-{device.device}" / entry.graph, {"rows": rows})["out"]
            expected = golden[f"output.block_{entry.block:02d}.expert_{entry.expert:02d}"]
            tolerance = 1e-5 if precision in ("fp32", "fp16") else 3e-4
            np.testing.assert_allclose(answer, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_graph_passes_the_onnx_checker(tmp_path: Path, precision: str) -> None:
    import onnx

    _, runner = _exported(tmp_path, precision, family="qwen2_moe")
    for path in (runner.bundle / "bs").glob("*.onnx"):
        onnx.checker.check_model(path, full_check=True)
    # A copy, as a device gets it: the checker refuses the hard links that the weights are in the bundle.
    shutil.copytree(runner.bundle / "device-0", tmp_path / "copy")
    for path in (tmp_path / "copy").glob("*.onnx"):
        onnx.checker.check_model(path, full_check=True)
