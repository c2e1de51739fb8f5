from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from wdmoe.device.cli import main
from wdmoe.profiles.device_profile import encode_profile, read_profile
from wdmoe.profiles.modelled import ExpertShape, modelled_profile
from wdmoe.runtime.engines import ENGINES


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    return result


def modelled(path: Path, device: str, precision: str = "fp16") -> Path:
    path.write_bytes(encode_profile(modelled_profile(device, precision, ExpertShape(4096, 14336))))
    return path


@pytest.mark.slow
def test_bench_writes_a_profile_that_show_and_diff_read(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "here.json"
    result = invoke("bench", "--bundle", bundle, "--engine", "numpy", "--seconds", "0.05", "--json", path)
    assert result.exit_code == 0, result.output
    profile = read_profile(path)
    assert profile.origin == "measured" and profile.points[-1].tokens == 1024 and profile.conditions is not None
    assert profile.conditions.weights_bytes is not None
    shown = invoke("profile", "show", path)
    assert shown.exit_code == 0 and "here.json: measured" in shown.stdout and "staging" in shown.stdout
    assert "no throttling noticed" in " ".join(shown.stdout.split())
    assert max(len(line.rstrip()) for line in shown.stdout.splitlines()) <= 80
    other = modelled(tmp_path / "nano.json", "orin-nano-8gb")
    compared = invoke("profile", "diff", path, other)
    assert compared.exit_code == 0 and "2: nano.json, modelled" in compared.stdout


def test_diff_shows_ratios_to_the_first_and_what_else_differs(tmp_path: Path) -> None:
    fast, slow = modelled(tmp_path / "agx.json", "agx-orin-64gb"), modelled(tmp_path / "nx.json", "orin-nx-16gb")
    result = invoke("profile", "diff", fast, slow)
    assert result.exit_code == 0, result.output
    first = next(line.split() for line in result.stdout.splitlines() if line.split()[:1] == ["1"])
    assert float(first[3]) == pytest.approx(2.0, abs=0.05)  # half the bandwidth
    assert "Jetson AGX Orin 64 GB" in result.stdout and "Jetson Orin NX 16 GB" in result.stdout
    assert "4096x14336" not in result.stdout  # the same in both


def test_a_modelled_profile_is_shown_with_its_sources_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    options = ["--device", "orin-nano-8gb", "--shape", "4096x14336", "--precision", "int4"]
    result = invoke("profile", "model", *options, "--json", path)
    assert result.exit_code == 0 and "orin-nano-8gb: modelled" in result.stdout and "data sheet" in result.stdout
    assert read_profile(path) == modelled_profile("orin-nano-8gb", "int4", ExpertShape(4096, 14336))
    printed = invoke("profile", "model", *options, "--json", "-")
    assert json.loads(printed.stdout)["origin"] == "modelled"


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plots`")
    out = tmp_path / "p.png"
    result = invoke("profile", "plot", modelled(tmp_path / "agx.json", "agx-orin-64gb"), "--out", out)
    assert result.exit_code == 0, result.output
    assert out.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_plot_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = invoke("profile", "plot", modelled(tmp_path / "agx.json", "agx-orin-64gb"), "--out", tmp_path / "p.png")
    assert result.exit_code == 1 and "pip install 'wdmoe[plots]'" in result.output


def test_info_names_the_machine_and_its_engines() -> None:
    result = invoke("info", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["hardware"] and found["engines"] == list(ENGINES)
    assert next(library for library in found["libraries"] if library["name"] == "numpy")["version"]
    assert invoke("info").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["profile", "diff", "a.json"], 2, "at least two"),
        (["profile", "show", "b.json"], 2, "b.json: not a device profile"),
        (["profile", "show", "none.json"], 2, "does not exist"),
        (["profile", "model", "--device", "orin-nx-8gb", "--shape", "big"], 2, "not D_MODELxD_FF"),
        (["bench", "--bundle", "nowhere"], 1, "no manifest.json and no device-K folders"),
        (["--threads", "2", "info"], 2, "--threads does not go before the command info"),
        (
            ["profile", "model", "--device", "orin-nx-8gb", "--shape", "64x96", "--json", "no/x.json"],
            2,
            "there is no folder no",
        ),
        (["bench", "--bundle", "nowhere", "--json", "no/x.json"], 2, "there is no folder no"),
        (["profile", "plot", "a.json", "--out", "no/x.png"], 2, "there is no folder no"),
        (["serve"], 2, "No such command 'serve'"),
    ],
)
def test_a_users_mistake_gets_a_message_and_an_exit_code(
    arguments: list[str], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    modelled(tmp_path / "a.json", "agx-orin-64gb")
    (tmp_path / "b.json").write_text("{}")
    result = invoke(*arguments)
    assert result.exit_code == code and words in result.output
