"""What all families have in common: a decoder of the Llama kind whose feed-forwards are mixtures of experts."""

from __future__ import annotations

from collections.abc import Sequence

from wdmoe.export.families.config import Config
from wdmoe.export.families.layout import NO_MULTIPLIERS, ModelLayout, Multipliers, QkNorm
from wdmoe.export.families.names import Naming, naming_of
from wdmoe.export.rope import rope_from_config
from wdmoe.runtime.errors import CheckpointError
from wdmoe.runtime.manifest import ModelSpec

# Fields that change what a model computes, and the one value that the graphs have. A family that can do more reads
# the field itself and says so with `reads`.
_UNDERSTOOD: dict[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "decoder_sparse_step": 1,  # every block is a mixture
    "mlp_only_layers": [],
    "clip_qkv": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "router_logit_softcapping": None,
}


def decoder(
    config: Config,
    name: str,
    *,
    namings: Sequence[Naming],
    n_experts: int,
    top_k: int,
    d_ff: int,
    norm_top_k: bool,
    norm_eps: float,
    rope_theta: float = 1e4,
    sliding_window: int | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
    qk_norm: QkNorm | None = None,
    shared_ff: int = 0,
    multipliers: Multipliers = NO_MULTIPLIERS,
    reads: Sequence[str] = (),
) -> ModelLayout:
    """Describe a checkpoint.

    Args:
        config: of the checkpoint.
        name: what the model shall be called.
        namings: how its tensors may be called, the published way first.
        n_experts: routed experts of a block.
        top_k: experts of a token.
        d_ff: width of a routed expert.
        norm_top_k: whether the chosen experts' weights are scaled to sum to one. A softmax over the chosen logits
            alone is the same.
        norm_eps: of the family, where the config names none.
        rope_theta: the same.
        sliding_window: positions a token can look back; None: all.
        qkv_bias: whether the projections before attention have biases.
        output_bias: whether the one after it has.
        qk_norm: what norms of queries and keys see; None: there are none.
        shared_ff: width of the expert that sees every token, behind a sigmoid gate; 0: there is none.
        multipliers: constants of the graphs.
        reads: fields of `_UNDERSTOOD` that the family has read by itself.

    Raises:
        CheckpointError: the config says something that the graphs cannot express; names the field.
    """
    for field, understood in _UNDERSTOOD.items():
        if field not in reads:
            config.require(field, understood=understood)
    if any(kind != "full_attention" for kind in config.values.get("layer_types") or ()):
        raise CheckpointError("config.json: layer_types that differ from 'full_attention' are not supported")
    n_heads = config.count("num_attention_heads")
    n_kv_heads = config.count("num_key_value_heads", default=n_heads)
    if n_heads % n_kv_heads:
        raise CheckpointError(f"config.json: {n_heads} attention heads cannot share {n_kv_heads} key-value heads")
    if top_k > n_experts:
        raise CheckpointError(f"config.json: num_experts_per_tok {top_k} is more than the {n_experts} experts")
    spec = ModelSpec(
        name=name,
        family=str(config.values["model_type"]),
        n_blocks=config.count("num_hidden_layers"),
        n_experts=n_experts,
        top_k=top_k,
        d_model=config.count("hidden_size"),
        d_ff=d_ff,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.count("vocab_size"),
        max_positions=config.count("max_position_embeddings"),
        norm_top_k=norm_top_k,
        rope=rope_from_config(config.values, config.head_dim, rope_theta),
        shared_expert=shared_ff > 0,
        sliding_window=sliding_window,
        bos_token_id=config.bos_token_id,
        eos_token_ids=config.eos_token_ids,
    )
    return ModelLayout(
        spec=spec,
        naming=naming_of(config.tensors, namings),
        norm_eps=config.number("rms_norm_eps", norm_eps),
        tied_head=config.flag("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        qk_norm=qk_norm,
        shared_ff=shared_ff,
        multipliers=multipliers,
    )
