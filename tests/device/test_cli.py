from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from wdmoe.device.cli import main
from wdmoe.device.config import DeviceConfig
from wdmoe.device.main import _command
from wdmoe.profiles.modelled import ExpertShape


def test_help_shows_defaults_and_an_example() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    assert "[default: tcp://127.0.0.1:5555]" in text and "wdmoe-device --bundle wdmoe/" in text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--bundle", "nowhere"], 1, "no manifest.json and no device-K folders"),
        (["--bs", "10.0.0.1:5555"], 2, "expected tcp://HOST:PORT"),
        (["--bs", "tcp://127.0.0.1:99999"], 2, "a port from 1 to 65535"),
        (["--bs", "tcp://127.0.0.1"], 2, "expected tcp://HOST:PORT"),
        (["--threads", "0"], 2, "--threads"),
        (["--engine", "gpu"], 2, "--engine"),
        (["--surprise"], 2, "No such option"),
        (["--emulate", "orin-mega"], 2, "orin-nano-8gb"),
        (["--emulate", "orin-nx-8gb", "--link", "string"], 2, "wifi-5ghz-far"),
        (["--emulate", "orin-nx-8gb", "--cost-shape", "4096"], 2, "'4096' is not D_MODELxD_FF"),
        (["--emulate", "orin-nx-8gb", "--channel", "c"], 2, "--channel is of an emulated link; give --link as well"),
        (["--link", "wifi-6"], 2, "--link is for an emulated device; give --emulate as well"),
    ],
)
def test_a_users_mistake_gets_a_message_and_an_exit_code(
    arguments: list[str], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code and words in result.output
    assert "Traceback" not in result.output


def test_a_damaged_folder_is_refused_before_anything_is_loaded(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "device-0"
    shutil.copytree(bundle / "device-0", folder)
    weights = next(path for path in folder.glob("*.safetensors") if path.name != "golden.safetensors")
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    result = CliRunner().invoke(main, ["--bundle", str(folder)])
    assert result.exit_code == 1 and weights.name in result.output and "copy the folder again" in result.output


def test_a_name_for_several_devices_is_refused(bundle: Path) -> None:
    result = CliRunner().invoke(main, ["--bundle", str(bundle), "--name", "kitchen"])
    assert result.exit_code == 2 and "--name is for one device" in result.output


def test_a_config_is_checked_when_it_is_built() -> None:
    with pytest.raises(ValueError, match="expected 1 to 64 letters"):
        DeviceConfig(name="")


def test_a_slice_that_the_emulated_device_could_not_hold_is_refused(bundle: Path) -> None:
    options = ["--emulate", "orin-nano-8gb", "--cost-shape", "16384x53248"]
    result = CliRunner().invoke(main, ["--bundle", str(bundle / "device-0"), *options])
    assert result.exit_code == 1 and "orin-nano-8gb cannot hold this slice: 4 experts" in result.output
    assert "--cost-precision int4" in result.output and "Traceback" not in result.output
    assert "engine" not in result.output  # before any is built


def test_a_device_that_has_not_enrolled_is_told_before_its_engines_are_built(bundle: Path, tmp_path: Path) -> None:
    options = ["--bs", "tcp://192.0.2.1:5555", "--keys", str(tmp_path)]
    result = CliRunner().invoke(main, ["--bundle", str(bundle / "device-0"), *options])
    assert result.exit_code == 1 and "wdmoe-device --enrol TOKEN" in result.output
    assert "engine" not in result.output and "measured" not in result.output


def test_the_processes_of_a_whole_bundle_are_told_what_to_emulate() -> None:
    config = DeviceConfig(
        emulate="orin-nx-8gb", link="wifi-6", seed=3, cost_shape=ExpertShape(64, 96), cost_precision="int4"
    )
    line = " ".join(_command(config))
    assert "--emulate orin-nx-8gb --seed 3 --link wifi-6 --cost-shape 64x96 --cost-precision int4" in line
    assert "--emulate" not in _command(DeviceConfig())
    shared = _command(DeviceConfig(emulate="orin-nx-8gb", link="wifi-6", channel=Path("c")))
    assert shared[-2:] == ["--channel", "c"]
