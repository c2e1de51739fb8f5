"""Frequencies are those of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

from wdmoe.export.rope import ROPE_TYPES, rope_from_config
from wdmoe.runtime.errors import CheckpointError

_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS: list[dict[str, Any]] = [
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    {"rope_theta": 5e5},
    {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 3.0}},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e5}},
    {"rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 8192, "rope_theta": 5e5}},
    {"rope_theta": 5e5, "rope_scaling": {**_LLAMA3, "original_max_position_embeddings": 4096}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}},
    {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "rope_theta": 1e4,
            "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False, "beta_fast": 16, "beta_slow": 2,
        }
    },
    {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, "rope_theta": 1e4,
            "attention_factor": 1.25,
        }
    },
]  # fmt: skip


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("fields", CONFIGS)
def test_frequencies_are_those_of_transformers(fields: dict[str, Any], head_dim: int) -> None:
    shape = {"max_position_embeddings": 32768, "head_dim": head_dim}
    config = transformers.MixtralConfig(**shape, **{key: _copy(value) for key, value in fields.items()})
    kind = config.rope_parameters["rope_type"]
    expected, scaling = (
        ROPE_INIT_FUNCTIONS[kind](config)
        if kind in ROPE_INIT_FUNCTIONS
        else MixtralRotaryEmbedding.compute_default_rope_parameters(config)
    )
    rope = rope_from_config({**shape, **fields}, head_dim, default_theta=1e6)
    # Two units in the last place: torch's float32 power is not rounded correctly everywhere.
    np.testing.assert_allclose(np.array(rope.inv_freq, np.float32), expected.numpy(), rtol=2.4e-7)
    assert rope.attention_scaling == pytest.approx(scaling, rel=1e-12)


def test_the_default_theta_is_the_family_s() -> None:
    assert rope_from_config({}, 16, default_theta=1e6) == rope_from_config({"rope_theta": 1e6}, 16, default_theta=1.0)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ by layer"),
    ],
)
def test_what_the_graphs_cannot_rotate_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        rope_from_config({"max_position_embeddings": 64, **fields}, 16, default_theta=1e4)


def test_every_rope_type_is_tested() -> None:
    kinds = {
        (f.get("rope_parameters") or f.get("rope_scaling") or {}).get(key)
        for f in CONFIGS
        for key in ("rope_type", "type")
    }
    assert set(ROPE_TYPES) <= kinds


def _copy(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value
