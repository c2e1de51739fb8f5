"""Granite 3 MoE: four multipliers, and experts that are published fused.

Its router takes the softmax over the chosen logits alone, which is the softmax over all, scaled to sum to one.
"""

from __future__ import annotations

from wdmoe.export.families.config import Config
from wdmoe.export.families.decoder import decoder
from wdmoe.export.families.layout import ModelLayout, Multipliers
from wdmoe.export.families.names import GRANITE, GRANITE_FUSED


def layout(config: Config, name: str) -> ModelLayout:
    """Describe a Granite MoE checkpoint."""
    has_biases = config.flag("attention_bias", False)
    return decoder(
        config,
        name,
        namings=(GRANITE, GRANITE_FUSED),
        n_experts=config.count("num_local_experts", "num_experts", default=8),
        top_k=config.count("num_experts_per_tok", default=2),
        d_ff=config.count("intermediate_size"),
        norm_top_k=True,
        norm_eps=1e-6,
        qkv_bias=has_biases,
        output_bias=has_biases,
        multipliers=Multipliers(
            embedding=config.number("embedding_multiplier", 1.0),
            attention=config.number("attention_multiplier", 1.0),
            residual=config.number("residual_multiplier", 1.0),
            logits=1 / config.number("logits_scaling", 1.0),
        ),
        reads=["attention_bias"],
    )
