"""Mixtral: routed experts only; the weights of the chosen experts always sum to one."""

from __future__ import annotations

from wdmoe.export.families.layout import BlockNames, Config, ExpertNames, ModelLayout
from wdmoe.export.rope import rope_from_config
from wdmoe.runtime.manifest import ModelSpec


def layout(config: Config, name: str) -> ModelLayout:
    """Describe a Mixtral checkpoint."""
    config.require("hidden_act", understood="silu", default="silu")
    n_heads = config.count("num_attention_heads")
    spec = ModelSpec(
        name=name,
        family="mixtral",
        n_blocks=config.count("num_hidden_layers"),
        n_experts=config.count("num_local_experts", 8),
        top_k=config.count("num_experts_per_tok", 2),
        d_model=config.count("hidden_size"),
        d_ff=config.count("intermediate_size"),
        n_heads=n_heads,
        n_kv_heads=config.count("num_key_value_heads", n_heads),
        head_dim=config.head_dim,
        vocab_size=config.count("vocab_size"),
        max_positions=config.count("max_position_embeddings"),
        norm_top_k=True,
        rope=rope_from_config(config.values, config.head_dim, default_theta=1e6),
        sliding_window=config.count("sliding_window") if config.values.get("sliding_window") else None,
        bos_token_id=config.bos_token_id,
        eos_token_ids=config.eos_token_ids,
    )
    return ModelLayout(
        spec=spec,
        norm_eps=config.number("rms_norm_eps", 1e-5),
        tied_head=config.flag("tie_word_embeddings", False),
        block=_block,
        expert=_expert,
    )


def _block(block: int) -> BlockNames:
    prefix = f"model.layers.{block}"
    return BlockNames(
        input_norm=f"{prefix}.input_layernorm.weight",
        query=f"{prefix}.self_attn.q_proj.weight",
        key=f"{prefix}.self_attn.k_proj.weight",
        value=f"{prefix}.self_attn.v_proj.weight",
        output=f"{prefix}.self_attn.o_proj.weight",
        post_norm=f"{prefix}.post_attention_layernorm.weight",
        router=f"{prefix}.block_sparse_moe.gate.weight",
    )


def _expert(block: int, expert: int) -> ExpertNames:
    prefix = f"model.layers.{block}.block_sparse_moe.experts.{expert}"
    return ExpertNames(gate=f"{prefix}.w1.weight", up=f"{prefix}.w3.weight", down=f"{prefix}.w2.weight")
