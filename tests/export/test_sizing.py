"""The plan of an export agrees with what the export makes, and with what is published about the models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_checkpoint

from wdmoe.export.balance import read_counts
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.export.families import FAMILIES
from wdmoe.export.models import ALIASES
from wdmoe.export.placement import placement_of, split_per_device
from wdmoe.export.planning import DryRun, dry_run, spans
from wdmoe.export.published import layout_from_config
from wdmoe.export.sizing import advice, device_memory, fits, most_held, sizes_of, weight_bytes
from wdmoe.runtime.errors import CheckpointError
from wdmoe.runtime.manifest import PRECISIONS

PARAMETERS = {  # as published on the models' pages
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": 46_702_792_704,
    "mistralai/Mixtral-8x22B-v0.1": 140_620_634_112,
    "allenai/OLMoE-1B-7B-0924": 6_919_161_856,
    "Qwen/Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "ibm-granite/granite-3.0-1b-a400m-base": 1_334_628_352,
}
MIXTRAL_EXPERT = 3 * 4096 * 14336


def _plan(model: str, experts_per_device: int, memory_bytes: int | None = None, **options: Any) -> DryRun:
    layout, precision, origin = layout_from_config(model)
    spec = layout.spec
    placement = placement_of(split_per_device(spec.n_experts, experts_per_device), spec.n_blocks)
    counts = read_counts(None, spec.n_blocks, spec.n_experts)
    return dry_run(
        layout,
        origin,
        options.get("precision", precision),
        placement,
        counts,
        (),
        () if memory_bytes is None else (memory_bytes,),
    )


@pytest.mark.parametrize("alias", ALIASES)
def test_published_models_have_their_published_number_of_parameters(alias: str) -> None:
    assert _plan(alias, 1).sizes.parameters == PARAMETERS[ALIASES[alias]]


def test_mixtral_on_four_devices() -> None:
    plan = _plan("mixtral", 2, 32 * 10**9)
    for device in plan.sizes.devices["fp16"]:
        weights = 64 * MIXTRAL_EXPERT * 2
        assert device.experts == 64
        assert weights < device.disk_bytes < 1.001 * weights  # 22.5 GB
        assert weights < device.memory_bytes < weights + 10**9
    station = 46_702_792_704 - 256 * MIXTRAL_EXPERT
    assert 4 * station < plan.sizes.station.disk_bytes < 4 * station + 10**6
    assert plan.sizes.station.kv_bytes == 2 * 32 * 8 * 128 * 4096 * 4
    assert (plan.precision, plan.too_small, plan.advice) == ("fp16", (), None)


def test_a_quantised_mixtral_takes_its_bytes_and_its_scales() -> None:
    spec = layout_from_config("mixtral")[0].spec
    assert weight_bytes(spec, "int8") == MIXTRAL_EXPERT + 2 * (2 * 14336 + 4096)
    assert weight_bytes(spec, "int4") == MIXTRAL_EXPERT // 2 + 2 * MIXTRAL_EXPERT // 128


def test_a_device_too_small_is_named_with_what_to_change() -> None:
    assert _plan("mixtral", 2, 16 * 10**9).advice == (
        "use --experts-per-device 1 (8 devices) or --precision int8 --experts-per-device 2 (4 devices) "
        "or --precision int4 --experts-per-device 4 (2 devices)"
    )
    wide = _plan("mixtral", 2, 32 * 10**9, precision="fp32")
    assert wide.too_small == (0, 1, 2, 3)
    assert wide.advice == (
        "use --experts-per-device 1 (8 devices) or --precision fp16 --experts-per-device 2 (4 devices) "
        "or --precision int8 --experts-per-device 4 (2 devices) or --precision int4 --experts-per-device 8 (1 device)"
    )
    assert "--precision int4 --placement balanced --devices" in str(_plan("mixtral", 1, 3 * 10**9).advice)
    assert "one expert of each block in int4 need" in str(_plan("mixtral", 1, 5 * 10**8).advice)


def test_what_is_advised_fits() -> None:
    layout = layout_from_config("mixtral")[0]
    for memory_gb in range(1, 64):
        n_held = most_held(layout.spec, "fp16", memory_gb * 10**9)
        assert not n_held or fits(memory_gb * 10**9, device_memory(layout.spec, n_held, "fp16"))
        assert not fits(memory_gb * 10**9, device_memory(layout.spec, n_held + 1, "fp16"))
        assert advice(layout, "fp16", memory_gb * 10**9)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_plan_from_the_config_is_what_an_export_makes(tmp_path: Path, family: str, precision: Any) -> None:
    folder = tiny_checkpoint(tmp_path / "c", family, hidden_size=256, num_hidden_layers=4)
    config = ExportConfig(tmp_path / "bundle", experts_per_device=3, precision=precision)
    plan = plan_export(folder, "tiny", config)
    export_bundle(plan, config)
    sizes = sizes_of(layout_from_config(str(folder))[0], plan.placement)
    found = {path.name: sum(f.stat().st_size for f in path.iterdir()) for path in config.out.iterdir()}
    assert sizes.station.disk_bytes == pytest.approx(found["bs"] - (folder / "tokenizer.json").stat().st_size, rel=0.02)
    for device in sizes.devices[precision]:
        assert device.disk_bytes == pytest.approx(found[f"device-{device.device}"], rel=0.02)


def test_a_model_whose_config_nobody_has_is_refused() -> None:
    with pytest.raises(CheckpointError, match="give a folder that holds it, or one of mistralai/Mixtral-8x7B"):
        layout_from_config("nobody/nothing")
    assert "mixtral" in FAMILIES


@pytest.mark.parametrize(
    ("numbers", "text"), [([0, 1], "0, 1"), ([0, 1, 2, 5], "0-2, 5"), ([3], "3"), ([], ""), ([0, 2], "0, 2")]
)
def test_numbers_are_written_briefly(numbers: list[int], text: str) -> None:
    assert spans(numbers) == text
