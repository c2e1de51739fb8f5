"""Mixtral: routed experts only; the weights of the chosen experts always sum to one."""

from __future__ import annotations

from wdmoe.export.families.config import Config
from wdmoe.export.families.decoder import decoder
from wdmoe.export.families.layout import ModelLayout
from wdmoe.export.families.names import MIXTRAL, QWEN_FUSED


def layout(config: Config, name: str) -> ModelLayout:
    """Describe a Mixtral checkpoint."""
    return decoder(
        config,
        name,
        namings=(MIXTRAL, QWEN_FUSED),
        n_experts=config.count("num_local_experts", "num_experts", default=8),
        top_k=config.count("num_experts_per_tok", default=2),
        d_ff=config.count("intermediate_size"),
        norm_top_k=True,
        norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=config.count("sliding_window") if config.values.get("sliding_window") else None,
        reads=["sliding_window"],
    )
