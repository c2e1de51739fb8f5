"""Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B): small routed experts and one shared expert behind a sigmoid gate."""

from __future__ import annotations

from wdmoe.export.families.config import Config
from wdmoe.export.families.decoder import decoder
from wdmoe.export.families.layout import ModelLayout
from wdmoe.export.families.names import QWEN, QWEN_FUSED


def layout(config: Config, name: str) -> ModelLayout:
    """Describe a Qwen2-MoE checkpoint."""
    return decoder(
        config,
        name,
        namings=(QWEN, QWEN_FUSED),
        n_experts=config.count("num_experts", "num_local_experts"),
        top_k=config.count("num_experts_per_tok"),
        d_ff=config.count("moe_intermediate_size"),
        norm_top_k=config.flag("norm_topk_prob", False),
        norm_eps=1e-6,
        qkv_bias=config.flag("qkv_bias", True),
        shared_ff=config.count("shared_expert_intermediate_size"),
        reads=["sliding_window"],  # idle, as use_sliding_window is false: published configs carry it all the same
    )
