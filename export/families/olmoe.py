"""OLMoE: 64 experts, none shared; queries and keys normed over all heads at once; gate weights as they come."""

from __future__ import annotations

from wdmoe.export.families.config import Config
from wdmoe.export.families.decoder import decoder
from wdmoe.export.families.layout import ModelLayout
from wdmoe.export.families.names import QWEN, QWEN_FUSED


def layout(config: Config, name: str) -> ModelLayout:
    """Describe an OLMoE checkpoint."""
    has_biases = config.flag("attention_bias", False)
    return decoder(
        config,
        name,
        namings=(QWEN, QWEN_FUSED),
        n_experts=config.count("num_experts", "num_local_experts", default=64),
        top_k=config.count("num_experts_per_tok", default=8),
        d_ff=config.count("intermediate_size"),
        norm_top_k=config.flag("norm_topk_prob", False),
        norm_eps=1e-5,
        qkv_bias=has_biases,
        output_bias=has_biases,
        qk_norm="projection",
        reads=["attention_bias"],
    )
