"""`wdmoe-bs run --report`: a page that stands alone, hides nothing and takes nothing it is given for HTML."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from wdmoe.bs import experiment
from wdmoe.bs.cli import main
from wdmoe.bs.diagnosis import Finding
from wdmoe.bs.report import render_report
from wdmoe.bs.scoring import DistributedScorer
from wdmoe.runtime.errors import WdmoeError

DEVICES = ("--devices", ",".join(["orin-nx-8gb"] * 4), "--link", "wifi-6")


def run(bundle: Path, *options: str) -> Result:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    pytest.importorskip("matplotlib", reason="needs the extra `plots`")
    station = ["run", "--bundle", str(bundle), "--clock", "virtual", "--dataset", "piqa-sample", "--limit", "2"]
    return CliRunner().invoke(main, [*station, *DEVICES, *options])


def test_the_page_stands_alone_and_says_what_is_modelled(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    done = run(bundle, "--report", str(path), "--json", "-")
    assert done.exit_code == 0, done.output
    page = path.read_text()
    assert not re.search(r'(src|href)="(?!#)|url\((?!#)|@import', page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and page.count("<svg") == 4
    assert "loss none" in page and not re.search(r"\b(inf|nan)\b", page)
    assert "<strong>modelled</strong>" in page and page.count("ms (modelled)") >= 4
    assert [left.name for left in tmp_path.iterdir()] == ["r.html"]


class Elements(HTMLParser):
    """The elements of a page, and the names of their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names |= {tag, *(name for name, _ in attrs)}


def test_hostile_names_stay_text(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&$x$"
    pages: list[tuple[Any, ...]] = []
    monkeypatch.setattr("wdmoe.bs.report.write_report", lambda path, *page: pages.append(page))
    assert run(bundle, "--report", str(tmp_path / "r.html"), "--json", "-").exit_code == 0
    ((head, runs, _, _),) = pages
    head["model"] |= dict.fromkeys(("name", "family", "bundle_id", "expert_precision"), hostile)
    head |= {"command": hostile, "clock": head["clock"] | {"links": [hostile], "channel": hostile}}
    for device in head["devices"]:
        device |= {"name": hostile, "hardware": hostile, "engine": hostile, "emulated": None}
    device = replace(runs[0].summary.devices[0], name=hostile)
    runs = [
        replace(
            run,
            summary=replace(run.summary, devices=(device,)),
            evaluation=replace(run.evaluation, dataset=hostile, judge=hostile, source=hostile, variant=hostile),
        )
        for run in runs
    ]
    findings = [Finding("air", hostile, hostile, hostile, {}, hostile, hostile)]
    page = render_report(head, runs, findings, [(hostile, hostile)])
    elements = Elements()
    elements.feed(page)
    assert "&lt;script&gt;" in page
    assert not elements.names & {"script", "img", "onerror", "src"}


def test_a_report_of_a_run_that_breaks_off_says_what_is_missing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, kept = tmp_path / "r.html", tmp_path / "r.json"
    options = ("--policy", "exact", "--policy", "wlr", "--report", str(page), "--json", str(kept))

    class Breaking(DistributedScorer):
        def __init__(self, pipeline: Any, policy: Any, *rest: Any) -> None:
            if policy.describe() == "wlr":
                raise WdmoeError("the power went")
            super().__init__(pipeline, policy, *rest)

    with monkeypatch.context() as broken:
        broken.setattr(experiment, "DistributedScorer", Breaking)
        done = run(bundle, *options)
    assert done.exit_code == 1 and "the power went" in done.stderr
    broken_off = page.read_text()
    assert "<strong>Not finished</strong>: piqa-sample under wlr." in broken_off

    assert run(bundle, *options).exit_code == 0
    whole = page.read_text()
    assert "Not finished" not in whole
    assert [r["policy"] for r in json.loads(kept.read_bytes())["results"]] == ["exact", "wlr"]

    # What was read back from the file is shown as what was just run.
    def exact_rows(text: str) -> list[str]:
        return [row for row in re.findall("<tr>.*?</tr>", text) if "<td>exact</td>" in row and "device-" in row]

    assert len(exact_rows(whole)) == 4 and exact_rows(whole) == exact_rows(broken_off)


def test_nothing_done_is_no_report(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise WdmoeError("the power went")

    monkeypatch.setattr(experiment, "DistributedScorer", fail)
    assert run(bundle, "--report", str(tmp_path / "r.html")).exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_extra_is_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = ["--dataset", "piqa-sample", "--bundle", str(tmp_path / "none"), "--report", str(tmp_path / "r.html")]
    done = CliRunner().invoke(main, ["run", *options])
    assert done.exit_code == 1 and "--report needs matplotlib" in done.stderr
    assert "pip install 'wdmoe[plots]'" in done.stderr and "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == []


def test_a_page_with_no_place_is_refused_before_anything_runs(bundle: Path, tmp_path: Path) -> None:
    done = run(bundle, "--report", str(tmp_path / "no" / "r.html"))
    assert done.exit_code == 2 and "there is no folder" in done.stderr
    done = run(bundle, "--report", str(tmp_path / "r"), "--json", str(tmp_path / "r"))
    assert done.exit_code == 2 and "both name" in done.stderr
