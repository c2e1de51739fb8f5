from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from wdmoe.device.cli import main
from wdmoe.device.config import DeviceConfig


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
        (["--threads", "0"], 2, "--threads"),
        (["--engine", "gpu"], 2, "--engine"),
        (["--surprise"], 2, "No such option"),
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
