"""`wdmoe-bs plan`: what fits is what a dry run says, and what it prints is labelled as modelled."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from wdmoe.bs.cli import main
from wdmoe.export.forecasting import Forecast, forecast, read_devices, station_work
from wdmoe.export.models import ALIASES
from wdmoe.export.placement import held_by, placement_of
from wdmoe.export.published import layout_from_config
from wdmoe.export.sizing import device_memory, most_held, sizes_of, station_size
from wdmoe.profiles.modelled import memory_bytes


def _forecast(devices: str, model: str = "mixtral", link: str = "wifi-5ghz-mid", **options: Any) -> Forecast:
    layout, _, origin = layout_from_config(model)
    chosen = {"precision": "fp16", "bs": "laptop-8-core", "experts_per_device": None, "channel": "shared"} | options
    return forecast(layout, origin, read_devices(devices), [link], **chosen)


def test_mixtral_fits_on_four_agx_orin_32() -> None:
    found = _forecast("4xagx-orin-32gb", experts_per_device=2)
    spec = found.layout.spec
    assert found.fits
    assert found.advice is None
    assert [device.held for device in found.devices] == [64] * 4
    assert {device.needed_bytes for device in found.devices} == {device_memory(spec, 64, "fp16")}
    assert found.station_size == station_size(found.layout)
    assert found.question is not None
    assert found.token is not None
    # The bytes that must cross: two devices or fewer a token, its row down and up in fp16, in each of 32 blocks.
    once_ms = 32 * 50 * 2 * 4096 * 2 * 8e-3 / 234
    assert once_ms < found.question.air_ms < 2 * once_ms + 32 * 10
    assert found.question.bottleneck == "air"


def test_larger_and_faster_devices_hold_more_and_nobody_more_than_fits() -> None:
    found = _forecast("agx-orin-64gb,2xorin-nano-8gb", precision="int4")
    spec = found.layout.spec
    assert found.fits
    assert found.placement is not None
    held = [len(held_by(found.placement, device)) for device in range(3)]
    assert sum(held) == 256
    assert held[0] > max(held[1:])
    for device, count in zip(found.devices, held, strict=True):
        assert count == device.held <= most_held(spec, "int4", memory_bytes(device.hardware)) == device.could_hold


@pytest.mark.parametrize(
    ("devices", "options", "advice"),
    [
        ("2xorin-nano-8gb", {}, "hold 32 of 256 experts in fp16; more or larger devices are needed"),
        ("4xorin-nx-16gb", {}, "hold 136 of 256 experts in fp16; --precision int8 fits"),
        ("agx-orin-64gb,3xorin-nano-8gb", {"experts_per_device": 2, "precision": "int8"}, "leave --experts-per-device"),
    ],
)
def test_what_does_not_fit_is_told_with_what_to_change(devices: str, options: dict[str, Any], advice: str) -> None:
    found = _forecast(devices, **options)
    assert not found.fits
    assert advice in str(found.advice)
    if "experts_per_device" not in options:
        assert (found.placement, found.question) == (None, None)


def test_a_base_station_that_is_too_small_is_told() -> None:
    layout, _, origin = layout_from_config("mixtral")
    wide = dataclasses.replace(layout, spec=msgspec.structs.replace(layout.spec, vocab_size=10**6))
    devices = read_devices("4xagx-orin-32gb")
    found = forecast(wide, origin, devices, ["wifi-6"], "fp16", "laptop-8-core", 2, "shared")
    assert not found.fits
    needed_gb = found.station_size.memory_bytes / 0.8 / 1e9
    assert found.advice == f"the base station needs {needed_gb:.0f} GB (--bs)"
    assert forecast(wide, origin, devices, ["wifi-6"], "fp16", "h100", 2, "shared").fits


@pytest.mark.parametrize("alias", ALIASES)
def test_what_base_station_and_devices_compute_is_all_of_the_model(alias: str) -> None:
    layout = layout_from_config(alias)[0]
    spec, work = layout.spec, station_work(layout)
    routed = 3 * spec.d_model * spec.d_ff * spec.n_experts * spec.n_blocks
    total = sum(work.stages) + work.shared * spec.n_blocks + work.head + routed
    embedding = 0 if layout.tied_head else spec.vocab_size * spec.d_model
    parameters = sizes_of(layout, placement_of([range(spec.n_experts)], spec.n_blocks)).parameters
    assert total + embedding == parameters - spec.d_model  # all but the final norm


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("orin-nx-16gb", ("orin-nx-16gb",)),
        ("2xorin-nano-8gb, agx-orin-64gb", ("orin-nano-8gb", "orin-nano-8gb", "agx-orin-64gb")),
        ("2 x orin-nano-8gb", ("orin-nano-8gb",) * 2),
    ],
)
def test_devices_are_read_with_their_numbers(text: str, names: tuple[str, ...]) -> None:
    assert read_devices(text) == names


def _run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(main, ["plan", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "toaster"], "no modelled device is called 'toaster'; expected one of agx-orin-64gb"),
        (["--devices", "0xorin-nx-8gb"], "0 devices; expected 1 to 1000"),
        (["--devices", "orin-nx-8gb,,"], "'' is not a device"),
        (["--devices", "4xorin-nx-8gb", "--link", "string"], "no link is called 'string'"),
        (["--devices", "4xorin-nx-8gb", "--link", "wifi-6,wifi-6"], "2 links for 4 devices"),
        (["--devices", "4xorin-nx-8gb", "--bs", "abacus"], "no modelled base station is called 'abacus'"),
        (["--devices", "3xorin-nx-8gb", "--experts-per-device", "2"], "8 experts by 2 are for 4 devices, 3 are given"),
        (["--devices", "orin-nx-8gb", "--model", "nobody/nothing"], "a plan needs its config.json"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: list[str], message: str) -> None:
    code, _, err = _run("--model", "mixtral", *arguments)
    assert code in (1, 2)
    assert message in err


def test_the_table_fits_a_terminal_and_says_what_it_is() -> None:
    code, out, _ = _run("--model", "mixtral", "--devices", "2xagx-orin-64gb", "--precision", "int8")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    flat = " ".join(out.split())
    for words in ("all modelled", "agx-orin-64gb", "tokens/s in generation", "bottleneck", "Assumed: a question"):
        assert words in flat
    assert "Does not fit" in " ".join(_run("--model", "mixtral", "--devices", "orin-nx-8gb")[1].split())


def test_json_says_the_same_with_the_source_of_each_figure() -> None:
    code, out, _ = _run("--model", "qwen3-moe", "--devices", "2xagx-orin-32gb", "--precision", "int4", "--json")
    found = json.loads(out)
    assert (code, found["origin"], found["fits"]) == (0, "modelled", True)
    question = found["question"]
    assert question["seconds"] == pytest.approx(sum(question[f"{of}_ms"] for of in ("bs", "air", "device")) / 1000)
    assert found["tokens_per_s"] == pytest.approx(1 / found["generated_token"]["seconds"])
    assert any("IEEE 802.11ac" in line for line in found["sources"])
    assert any("technical brief" in line for line in found["sources"])


def test_it_needs_nothing_that_only_an_export_needs() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from wdmoe.bs.cli import main; "
        "r = CliRunner().invoke(main, ['plan', '--model', 'mixtral', '--devices', '4xagx-orin-32gb']); "
        "print(r.exit_code, *sorted({'onnx', 'onnxruntime', 'torch', 'tokenizers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "0"


def test_help_lists_it() -> None:
    assert "plan" in CliRunner().invoke(main, ["--help"]).stdout
