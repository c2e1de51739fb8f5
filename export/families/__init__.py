"""Model families: what a checkpoint of each type is called inside, one short file each. docs/adding-a-model.md."""

from __future__ import annotations

from collections.abc import Callable

from wdmoe.export.families import granitemoe, mixtral, olmoe, qwen2_moe, qwen3_moe
from wdmoe.export.families.config import Config
from wdmoe.export.families.layout import BlockNames, ExpertNames, ModelLayout
from wdmoe.runtime.errors import CheckpointError

__all__ = ["FAMILIES", "BlockNames", "Config", "ExpertNames", "ModelLayout", "check_family"]

# model_type of config.json -> the function that describes such a checkpoint under a name.
FAMILIES: dict[str, Callable[[Config, str], ModelLayout]] = {
    "mixtral": mixtral.layout,
    "qwen2_moe": qwen2_moe.layout,
    "qwen3_moe": qwen3_moe.layout,
    "olmoe": olmoe.layout,
    "granitemoe": granitemoe.layout,
}


def check_family(config: dict[str, object], where: str) -> None:
    """Refuse a config of a family that is not known."""
    if config.get("model_type") not in FAMILIES:
        raise CheckpointError(
            f"{where}: model_type {config.get('model_type')!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
