"""A device folder with a few experts of any shape, of random weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
from tiny import tiny_checkpoint

from scripts.bench._environment import progress
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.profiles.modelled import ExpertShape
from wdmoe.runtime.manifest import Precision

N_EXPERTS = 2


def export_experts(
    scratch: Path, shape: ExpertShape, precisions: Sequence[Precision]
) -> Iterator[tuple[Precision, Path]]:
    """Export two experts to one device in each precision; yield the folder of each."""
    progress(f"{N_EXPERTS} experts of {shape.d_model}x{shape.d_ff}, random")
    checkpoint = tiny_checkpoint(
        scratch / "checkpoint", "mixtral", dtype="bfloat16", hidden_size=shape.d_model, intermediate_size=shape.d_ff,
        num_local_experts=N_EXPERTS, num_hidden_layers=1, num_key_value_heads=1,
    )  # fmt: skip
    for precision in precisions:
        config = ExportConfig(scratch / precision, devices=1, precision=precision)
        bundle = export_bundle(plan_export(checkpoint, "random experts", config), config).out
        yield precision, bundle / "device-0"
