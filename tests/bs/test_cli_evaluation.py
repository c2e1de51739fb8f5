"""`wdmoe-bs run` over several data sets, resumed, and `wdmoe-bs quality`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from wdmoe.bs.cli import main

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

Command = Callable[..., Result]


@pytest.fixture
def command(bundle: Path, address: str, tmp_path: Path) -> Command:
    """Run `wdmoe-bs` over four devices and a folder of invented rows."""
    rows: dict[str, list[dict[str, Any]]] = {
        "arc_easy/test.jsonl": [{"query": f"What is {n}?", "choices": list("abc"), "gold": n % 3} for n in range(3)],
        "boolq/validation.jsonl": [
            {"query": f"Passage: P{n}.\nQuestion: is it {n}?", "choices": ["no", "yes"], "gold": n} for n in range(2)
        ],
        "lambada/test.jsonl": [{"context": "ice can", "continuation": "melt"}],
        # Longer than the 256 positions of the model.
        "openbookqa/test.jsonl": [{"query": "Q", "choices": ["x" * 300, "b", "c", "d"], "gold": 0}],
    }
    for file, lines in rows.items():
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text("\n".join(json.dumps(line) for line in lines))
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2/test.txt").write_text(" = Ice = \n Ice floats . \n" * 20)

    def run(name: str, *arguments: str) -> Result:
        station = ["--bundle", str(bundle), "--listen", address, "--wait", "20", "--data-dir", str(tmp_path)]
        return CliRunner().invoke(main, [name, *station, *arguments])

    return run


def read(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(entry["dataset"], entry["policy"]): entry for entry in json.loads(path.read_text())["results"]}


def test_several_data_sets_run_in_one_go_with_a_table_each(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    sets = [f"--dataset={name}" for name in ("piqa-sample", "boolq", "lambada", "wikitext2")]
    done = command("run", *sets, "--limit", "2", "--json", str(path))
    assert done.exit_code == 0, done.output
    assert "piqa-sample 2 rows, boolq 2 rows, lambada 1 rows, wikitext2 2 rows; under exact, wlr" in done.stderr
    assert max(len(line.rstrip()) for line in done.stdout.splitlines()) <= 80
    for title in (
        "piqa-sample: 2 rows (bundled sample), 4 devices over loopback (fp16)",
        "boolq: 2 rows (local rows, local variant), 4 devices over loopback (fp16)",
        "local variant: passages lack the title",
        "lambada: 1 rows (local rows), 4 devices",
        "ppl: perplexity of a word (lambada: of the last one); bits: of a byte of text; vs exact: paired",
    ):
        assert title in " ".join(done.stdout.split())
    assert done.stdout.count("(token, device)") == 1  # the columns are explained once, for all tables
    results = read(path)
    assert list(results) == [
        (dataset, policy) for dataset in ("piqa-sample", "boolq", "lambada", "wikitext2") for policy in ("exact", "wlr")
    ]
    assert results["boolq", "wlr"]["variant"] == "passages lack the title that SuperGLUE puts before them"
    assert results["piqa-sample", "wlr"]["accuracy_minus_exact_points"] is not None
    text = results["wikitext2", "wlr"]
    assert text["accuracy"] == {} and text["accuracy_minus_exact_points"] is None
    assert text["perplexity_over_exact"] == pytest.approx(
        text["metrics"]["word_perplexity"] / results["wikitext2", "exact"]["metrics"]["word_perplexity"]
    )


def test_what_is_finished_is_kept_and_not_run_again(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    wanted = ["--dataset", "arc_easy", "--dataset", "openbookqa", "--json", str(path)]
    broken = command("run", *wanted)
    assert broken.exit_code == 1 and "openbookqa/0: a choice of 301 tokens does not fit" in broken.output
    first = read(path)
    assert list(first) == [("arc_easy", "exact"), ("arc_easy", "wlr")]

    (tmp_path / "openbookqa/test.jsonl").write_text(json.dumps({"query": "Q", "choices": list("abcd"), "gold": 0}))
    again = command("run", *wanted)
    assert again.exit_code == 0, again.output
    for policy in ("exact", "wlr"):
        assert f"{path}: arc_easy under {policy} is there already" in again.stderr
        assert "arc_easy: 3 rows" in again.stdout and "openbookqa: 1 rows" in again.stdout
    both = read(path)
    assert {pair: both[pair] for pair in first} == first and len(both) == 4
    assert both["openbookqa", "exact"]["stderr"] == {"acc": None, "acc_norm": None}

    # What is not asked for stays in the file; with nothing left to do nothing changes.
    only = command("run", "--dataset", "openbookqa", "--json", str(path))
    assert only.exit_code == 0 and "openbookqa under wlr is there already" in only.stderr
    assert read(path) == both


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            ["--limit", "2"],
            "piqa-sample under exact is run again: it answered 1 rows, and 2 others are asked about now",
        ),
        (["--limit", "1", "--wire", "fp32"], "nothing of it is used again: wire was 'fp16' and is 'fp32'"),
        (["--limit", "1", "--in-flight", "7"], "nothing of it is used again: in flight was 1 and is 7"),
    ],
)
def test_what_has_changed_is_run_again_and_told(
    command: Command, tmp_path: Path, change: list[str], reason: str
) -> None:
    path = tmp_path / "result.json"
    wanted = ["--dataset", "piqa-sample", "--policy", "exact", "--json", str(path)]
    assert command("run", *wanted, "--limit", "1").exit_code == 0
    (before,) = read(path).values()
    done = command("run", *wanted, *change)
    assert done.exit_code == 0 and reason in done.stderr
    (after,) = read(path).values()
    assert after["wall_s"] != before["wall_s"] and after["rows"] == int(change[1])


@pytest.mark.parametrize("content", ["{}", "[1]", "not JSON", '{"format": "wdmoe-quality", "version": 1}'])
def test_a_file_that_is_no_result_is_left_alone(command: Command, tmp_path: Path, content: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    done = command("run", "--dataset", "piqa-sample", "--limit", "1", "--json", str(path))
    assert done.exit_code == 2 and "is not a result of wdmoe-bs run" in done.output
    assert path.read_text() == content


def test_a_result_of_another_version_is_replaced(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text('{"format": "wdmoe-run", "version": 1}')
    done = command("run", "--dataset", "piqa-sample", "--limit", "1", "--policy", "exact", "--json", str(path))
    assert done.exit_code == 0 and "it has version 1 of the format, expected 5" in done.stderr
    assert list(read(path)) == [("piqa-sample", "exact")]


def test_quality_holds_each_policy_against_the_bar(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    sets = ["--dataset", "piqa-sample", "--dataset", "boolq", "--rows", "3", "--tokens", "40", "--wire", "fp32"]
    done = command("quality", "--policy", "wlr", "--policy", "exact", *sets, "--json", str(path))
    assert done.exit_code == 0, done.output
    assert max(len(line.rstrip()) for line in done.stdout.splitlines()) <= 80
    assert "exact misses the quality bar" in done.stdout  # five rows are too few
    assert "local variant of wikitext2" in done.stdout and "local variant of boolq" in done.stdout
    report = json.loads(path.read_text())
    assert (report["format"], report["bar"]["rows"]) == ("wdmoe-quality", 5000)
    exact, wlr = report["results"]
    assert (exact["policy"], wlr["policy"]) == ("exact", "wlr")
    assert exact["perplexity"]["ratio"] == pytest.approx(1.0, abs=1e-5) and exact["perplexity"]["tokens"] == 40
    assert abs(exact["divergence"]["mean_nats"]) < 1e-9 < wlr["divergence"]["mean_nats"]
    assert [c["reached"] for c in exact["criteria"]] == [True, True, True, False] and not exact["passed"]
    assert exact["accuracy"]["interval_points"] == [0.0, 0.0]
    assert [(d["dataset"], d["rows"]) for d in wlr["datasets"]] == [("piqa-sample", 3), ("boolq", 2)]
    assert wlr["dropped_share"] > 0 == exact["dropped_share"]


def test_quality_can_be_measured_on_modelled_devices(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    line = ["quality", "--policy", "bottleneck:budget=0.3", "--dataset", "piqa-sample", "--rows", "2", "--tokens", "20"]
    line += ["--clock", "virtual", "--devices", "agx-orin-64gb,orin-nx-16gb,orin-nano-8gb,orin-nano-8gb"]
    line += ["--link", "wifi-6", "--channel", "orthogonal", "--bandwidth", "per-block", "--json", str(path)]
    done = command(*line)
    assert done.exit_code == 0, done.output
    report = json.loads(path.read_text())
    assert report["clock"]["kind"] == "virtual" and report["clock"]["bandwidth"] == "per-block"
    assert report["results"][0]["divergence"]["mean_nats"] > 0 and report["results"][0]["dropped_share"] > 0


def test_quality_needs_sets_with_right_and_wrong_answers(command: Command) -> None:
    done = command("quality", "--dataset", "wikitext2")
    assert done.exit_code == 2 and "--dataset wikitext2 has no acc for each row" in done.output
