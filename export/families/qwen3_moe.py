"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B): many small experts, none shared; queries and keys normed by head."""

from __future__ import annotations

from wdmoe.export.families.config import Config
from wdmoe.export.families.decoder import decoder
from wdmoe.export.families.layout import ModelLayout
from wdmoe.export.families.names import QWEN, QWEN_FUSED


def layout(config: Config, name: str) -> ModelLayout:
    """Describe a Qwen3-MoE checkpoint."""
    has_biases = config.flag("attention_bias", False)
    slides = config.flag("use_sliding_window", False)
    return decoder(
        config,
        name,
        namings=(QWEN, QWEN_FUSED),
        n_experts=config.count("num_experts", "num_local_experts", default=128),
        top_k=config.count("num_experts_per_tok", default=8),
        d_ff=config.count("moe_intermediate_size"),
        norm_top_k=config.flag("norm_topk_prob", False),
        norm_eps=1e-6,
        sliding_window=config.count("sliding_window", default=4096) if slides else None,
        qkv_bias=has_biases,
        output_bias=has_biases,
        qk_norm="head",
        reads=["attention_bias", "sliding_window", "use_sliding_window"],
    )
