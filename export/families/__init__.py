"""Model families: what a checkpoint of each type is called inside, one short file each. docs/adding-a-model.md."""

from __future__ import annotations

from collections.abc import Callable

from wdmoe.export.families import granitemoe, mixtral, olmoe, qwen2_moe, qwen3_moe
from wdmoe.export.families.config import Config
from wdmoe.export.families.layout import BlockNames, ExpertNames, ModelLayout

__all__ = ["FAMILIES", "BlockNames", "Config", "ExpertNames", "ModelLayout"]

# model_type of config.json -> the function that describes such a checkpoint under a name.
FAMILIES: dict[str, Callable[[Config, str], ModelLayout]] = {
    "mixtral": mixtral.layout,
    "qwen2_moe": qwen2_moe.layout,
    "qwen3_moe": qwen3_moe.layout,
    "olmoe": olmoe.layout,
    "granitemoe": granitemoe.layout,
}
