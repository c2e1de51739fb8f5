"""Rotary position embedding, resolved from a config into frequencies.

Follows transformers' `modeling_rope_utils.py` step by step, in float32 where it computes in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.runtime.errors import CheckpointError
from wdmoe.runtime.manifest import Rope

FloatArray = npt.NDArray[np.float32]

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def rope_from_config(config: Mapping[str, Any], head_dim: int, default_theta: float) -> Rope:
    """Resolve `rope_parameters`, or the older `rope_theta` and `rope_scaling`, of a config.

    Args:
        config: the content of config.json.
        head_dim: width of one head.
        default_theta: of the family, where the config names none.

    Raises:
        CheckpointError: the rope type is none of `ROPE_TYPES`, rotates a part of a head, or lacks a parameter.
    """
    parameters = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise CheckpointError(f"config.json: rope type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    share = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if share != 1.0:
        raise CheckpointError(f"config.json: partial_rotary_factor {share} is not supported; only whole heads rotate")
    if any(isinstance(value, dict) for value in parameters.values()):
        raise CheckpointError("config.json: rope_parameters that differ by layer are not supported")
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or default_theta)
    try:
        inv_freq, scaling = _resolve(kind, parameters, config, head_dim, theta)
    except KeyError as error:
        raise CheckpointError(f"config.json: rope type {kind!r} needs the parameter {error.args[0]}") from error
    return Rope(inv_freq=tuple(float(value) for value in inv_freq), attention_scaling=scaling)


def _resolve(
    kind: str, parameters: Mapping[str, Any], config: Mapping[str, Any], dim: int, theta: float
) -> tuple[FloatArray, float]:
    if kind == "default":
        return _default(dim, theta), 1.0
    if kind == "linear":
        return _default(dim, theta) / np.float32(parameters["factor"]), 1.0
    if kind == "llama3":
        return _llama3(parameters, _old_context(parameters, config), dim, theta), 1.0
    return _yarn(parameters, config, dim, theta)


def _old_context(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    """Tokens that the model was first trained on; transformers looks for them in this order."""
    field = "original_max_position_embeddings"
    return float(config.get(field) or parameters.get(field) or config["max_position_embeddings"])


def _powers(dim: int, theta: float) -> FloatArray:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.power(float(np.float32(theta)), exponents.astype(np.float64)).astype(np.float32)


def _default(dim: int, theta: float) -> FloatArray:
    return np.float32(1) / _powers(dim, theta)


def _llama3(parameters: Mapping[str, Any], old_context: float, dim: int, theta: float) -> FloatArray:
    factor = np.float32(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    inv_freq = _default(dim, theta)
    wavelength = np.float32(2 * math.pi) / inv_freq
    scaled = np.where(wavelength > old_context / low, inv_freq / factor, inv_freq)
    smooth = (np.float32(old_context) / wavelength - np.float32(low)) / np.float32(high - low)
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    medium = ~(wavelength < old_context / high) & ~(wavelength > old_context / low)
    return np.where(medium, smoothed, scaled).astype(np.float32)


def _yarn(parameters: Mapping[str, Any], config: Mapping[str, Any], dim: int, theta: float) -> tuple[FloatArray, float]:
    old_context = _old_context(parameters, config)
    factor = parameters.get("factor") or config["max_position_embeddings"] / old_context
    powers = _powers(dim, theta)

    def rotations_at(rotations: float) -> float:
        """Dimension whose wave turns this often within the old context."""
        return float(dim * math.log(old_context / (rotations * 2 * math.pi)) / (2 * math.log(theta)))

    low = rotations_at(parameters.get("beta_fast") or 32)
    high = rotations_at(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = 1 - np.clip(ramp, 0, 1)
    inv_freq = 1 / (np.float32(factor) * powers) * (1 - keep) + 1 / powers * keep
    return inv_freq.astype(np.float32), _yarn_attention_scaling(parameters, float(factor))


def _yarn_attention_scaling(parameters: Mapping[str, Any], factor: float) -> float:
    def scale_of(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return scale_of(parameters["mscale"]) / scale_of(parameters["mscale_all_dim"])
    return scale_of(1)
