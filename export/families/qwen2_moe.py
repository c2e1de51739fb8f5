"""Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B): small routed experts and one shared expert behind a sigmoid gate."""

from __future__ import annotations

from wdmoe.export.families.layout import BlockNames, Config, ExpertNames, ModelLayout
from wdmoe.export.rope import rope_from_config
from wdmoe.runtime.manifest import ModelSpec


def layout(config: Config, name: str) -> ModelLayout:
    """Describe a Qwen2-MoE checkpoint."""
    config.require("hidden_act", understood="silu", default="silu")
    config.require("use_sliding_window", understood=False, default=False)
    config.require("decoder_sparse_step", understood=1, default=1)
    config.require("mlp_only_layers", understood=[], default=[])
    n_heads = config.count("num_attention_heads")
    spec = ModelSpec(
        name=name,
        family="qwen2_moe",
        n_blocks=config.count("num_hidden_layers"),
        n_experts=config.count("num_experts"),
        top_k=config.count("num_experts_per_tok"),
        d_model=config.count("hidden_size"),
        d_ff=config.count("moe_intermediate_size"),
        n_heads=n_heads,
        n_kv_heads=config.count("num_key_value_heads", n_heads),
        head_dim=config.head_dim,
        vocab_size=config.count("vocab_size"),
        max_positions=config.count("max_position_embeddings"),
        norm_top_k=config.flag("norm_topk_prob", False),
        rope=rope_from_config(config.values, config.head_dim, default_theta=1e4),
        shared_expert=True,
        bos_token_id=config.bos_token_id,
        eos_token_ids=config.eos_token_ids,
    )
    has_biases = config.flag("qkv_bias", True)
    return ModelLayout(
        spec=spec,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        tied_head=config.flag("tie_word_embeddings", False),
        block=lambda block: _block(block, has_biases),
        expert=_expert,
        shared_ff=config.count("shared_expert_intermediate_size"),
    )


def _block(block: int, has_biases: bool) -> BlockNames:
    prefix = f"model.layers.{block}"
    attention = f"{prefix}.self_attn"
    biases = (f"{attention}.q_proj.bias", f"{attention}.k_proj.bias", f"{attention}.v_proj.bias")
    return BlockNames(
        input_norm=f"{prefix}.input_layernorm.weight",
        query=f"{attention}.q_proj.weight",
        key=f"{attention}.k_proj.weight",
        value=f"{attention}.v_proj.weight",
        output=f"{attention}.o_proj.weight",
        post_norm=f"{prefix}.post_attention_layernorm.weight",
        router=f"{prefix}.mlp.gate.weight",
        biases=biases if has_biases else None,
        shared=_feed_forward(f"{prefix}.mlp.shared_expert"),
        shared_gate=f"{prefix}.mlp.shared_expert_gate.weight",
    )


def _expert(block: int, expert: int) -> ExpertNames:
    return _feed_forward(f"model.layers.{block}.mlp.experts.{expert}")


def _feed_forward(prefix: str) -> ExpertNames:
    return ExpertNames(
        gate=f"{prefix}.gate_proj.weight", up=f"{prefix}.up_proj.weight", down=f"{prefix}.down_proj.weight"
    )
