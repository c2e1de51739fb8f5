"""Describes a model from its config alone: a folder's, or one of the published ones that the package knows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wdmoe.export.checkpoint import read_config
from wdmoe.export.families import FAMILIES, Config, ModelLayout, check_family
from wdmoe.export.models import ALIASES, SMALL_MODEL, find_checkpoint
from wdmoe.runtime.errors import CheckpointError
from wdmoe.runtime.manifest import Precision

PUBLISHED = Path(__file__).with_name("data") / "published_configs.json"


def layout_from_config(
    model: str, report: Callable[[str], None] = lambda _: None
) -> tuple[ModelLayout, Precision, str]:
    """Describe a model without its weights.

    Args:
        model: a folder with a config.json, an alias, or a hub id whose config the package knows.
        report: told when the small model is being made, the only one that has to be.

    Returns:
        The layout, the precision that `auto` would take, and where the config is from.

    Raises:
        CheckpointError: there is no config, or the family is unknown.
    """
    folder = find_checkpoint(model, report)[0] if model == SMALL_MODEL else Path(model).expanduser()
    if folder.is_dir():
        config, origin = read_config(folder), str(folder / "config.json")
        name = model if model == SMALL_MODEL else folder.resolve().name
    else:
        name = ALIASES.get(model, model)
        known = json.loads(PUBLISHED.read_text(encoding="utf-8"))["models"]
        if name not in known:
            raise CheckpointError(
                f"{model}: a plan needs its config.json: give a folder that holds it, or one of {', '.join(known)}"
            )
        config, origin = known[name], f"published config of {name}"
    check_family(config, origin)
    layout = FAMILIES[str(config["model_type"])](Config(config, {}, ()), name)
    return layout, _precision_of(config), origin


def _precision_of(config: Mapping[str, Any]) -> Precision:
    return "fp32" if config.get("torch_dtype", config.get("dtype")) in ("float32", "float64") else "fp16"
