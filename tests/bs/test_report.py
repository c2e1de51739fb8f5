"""`wdmoe-bs run --report`: a page that stands alone and hides nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from wdmoe.bs.cli import main


def test_the_page_stands_alone_and_says_what_is_modelled(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    pytest.importorskip("matplotlib", reason="needs the extra `plots`")
    path = tmp_path / "r.html"
    options = ["run", "--bundle", str(bundle), "--clock", "virtual", "--dataset", "piqa-sample", "--limit", "2"]
    devices = ["--devices", ",".join(["orin-nx-8gb"] * 4), "--link", "wifi-6"]
    done = CliRunner().invoke(main, [*options, *devices, "--report", str(path), "--json", "-"])
    assert done.exit_code == 0, done.output
    page = path.read_text()
    assert not re.search(r'(src|href)="(?!#)|url\((?!#)|@import', page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and page.count("<svg") == 4
    assert "<strong>modelled</strong>" in page and page.count("ms (modelled)") >= 4
    assert [left.name for left in tmp_path.iterdir()] == ["r.html"]
