"""Where a command may write is asked before any work, and what cannot be written is a message."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from wdmoe.bs.cli import main as bs
from wdmoe.device.cli import main as device
from wdmoe.export.cli import main as export
from wdmoe.runtime.errors import OutputError
from wdmoe.runtime.outputs import written_whole

RUN = ("run", "--bundle", "nowhere", "--dataset", "piqa-sample")
MODEL = ("profile", "model", "--device", "orin-nx-8gb", "--shape", "64x64")
SIMULATE = ("simulate", "--trace", "nowhere", "--devices", "orin-nx-8gb")
COMMANDS = [
    (bs, RUN, "--json"),
    (bs, RUN, "--trace"),
    (bs, RUN, "--report"),
    (bs, ("quality", "--bundle", "nowhere"), "--json"),
    (bs, ("generate", "--bundle", "nowhere", "--prompt", "Tea"), "--json"),
    (bs, SIMULATE, "--json"),
    (bs, SIMULATE, "--plot"),
    (bs, ("trace", "--bundle", "nowhere", "--dataset", "piqa-sample"), "--out"),
    (device, ("bench", "--bundle", "nowhere"), "--json"),
    (device, MODEL, "--json"),
    (device, ("profile", "plot", __file__), "--out"),
    (export, ("calibrate", str(Path(__file__).parent), "--text", __file__), "--counts"),
]


@pytest.mark.parametrize(
    ("main", "command", "option"), COMMANDS, ids=lambda value: value if str(value) == value else ""
)
def test_a_missing_folder_is_told_before_any_work(
    main: object, command: tuple[str, ...], option: str, tmp_path: Path
) -> None:
    path = tmp_path / "no" / "r.json"
    done = CliRunner().invoke(main, [*command, option, str(path)])  # type: ignore[arg-type]
    assert done.exit_code == 2, done.output
    assert f"Invalid value for '{option}'" in done.stderr and f"there is no folder {path.parent}" in done.stderr
    done = CliRunner().invoke(main, [*command, option, str(tmp_path)])  # type: ignore[arg-type]
    assert done.exit_code == 2 and "is a directory" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [MODEL])
def test_a_folder_that_went_meanwhile_is_a_message(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wdmoe.runtime.outputs.NewFile.convert", lambda self, value, *_: Path(value))
    done = CliRunner().invoke(device, [*arguments, "--json", str(tmp_path / "no" / "r.json")])
    assert done.exit_code == 1 and done.stderr.startswith("Error: cannot write ")
    assert "modelled" in done.stdout  # what was worked out is not lost


def test_a_file_is_whole_or_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("before")
    with pytest.raises(OutputError, match=f"cannot write {path}: No space left"), written_whole(path) as partial:
        partial.write_text("half")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "before" and [left.name for left in tmp_path.iterdir()] == ["r.json"]
    with written_whole(path) as partial:
        partial.write_text("after")
    assert path.read_text() == "after" and [left.name for left in tmp_path.iterdir()] == ["r.json"]
