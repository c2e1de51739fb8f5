"""The short form of scripts/bench/precision.py: what int8 and int4 cost a tiny model, and that a finished part is kept."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from inprocess import open_system
from tiny import tiny_checkpoint

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))
from scripts.bench import precision
from wdmoe.runtime.manifest import Precision

PRECISION = ROOT / "scripts" / "bench" / "precision.py"


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "same"), [("float16", True), ("float32", False)])
def test_a_precision_of_the_same_numbers_reads_the_text_and_is_not_asked_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, same: bool
) -> None:
    (tmp_path / "data" / "wikitext2").mkdir(parents=True)
    (tmp_path / "data" / "wikitext2" / "test.txt").write_text(" = Kettle = \n\n A kettle boils water . It is loud .\n")
    checkpoint = tiny_checkpoint(tmp_path / dtype, "qwen2_moe", max_position_embeddings=512, dtype=dtype)
    bundles = {one: precision.export(checkpoint, "tiny", tmp_path, one) for one in (precision.REFERENCE, "fp16")}
    found = precision.same_numbers(bundles["fp16"], bundles["fp32"])
    assert found == same

    asked: Counter[str] = Counter()

    @contextmanager
    def counting(bundle: Path, **options: Any) -> Iterator[Any]:
        with open_system(bundle, **options) as system:
            run = system.pipeline.run

            def counted(*given: Any) -> Any:
                asked[bundle.name] += 1
                return run(*given)

            system.pipeline.run = counted  # type: ignore[assignment,method-assign]
            yield system

    monkeypatch.setattr(precision, "open_system", counting)
    told: list[Precision] = ["fp16"] if found else []
    settings = precision.Asked(bundles, frozenset(told), tmp_path / "data", 2, 40, 1, "numpy")
    text = precision.answer_set(settings, "wikitext2")
    assert asked == {"fp32": 1, "fp16": 1}
    assert (text.likelihoods["fp16"] == text.likelihoods["exact"]) == same
    asked.clear()
    part = next(iter(precision.answer_set(settings, "piqa-sample").parts.values()))
    assert asked == ({"fp32": 2} if same else {"fp32": 2, "fp16": 2})
    assert (part.policies["fp16"].divergence.total == 0) == same and part.policies["fp16"].divergence.positions > 0


@pytest.mark.slow
def test_precisions_are_compared_and_what_was_done_is_used_again(tmp_path: Path) -> None:
    (tmp_path / "data" / "wikitext2").mkdir(parents=True)
    (tmp_path / "data" / "wikitext2" / "test.txt").write_text(" = Kettle = \n\n A kettle boils water . It is loud .\n")
    checkpoint = tiny_checkpoint(tmp_path / "tiny", "qwen2_moe", max_position_embeddings=512)
    target = tmp_path / "precision.json"

    line = [sys.executable, str(PRECISION), "--data-dir", str(tmp_path / "data"), "--model", str(checkpoint)]
    line += ["--dataset", "piqa-sample", "--rows", "2", "--tokens", "40", "--precision", "int8", "--precision", "int4"]
    done = subprocess.run([*line, "--json", "-"], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode in (0, 1), done.stderr
    result = json.loads(done.stdout)
    assert result["passed"] == (done.returncode == 0)
    int8, int4 = result["precisions"]["int8"], result["precisions"]["int4"]
    assert int8["tokens"] == int4["tokens"] == 40
    assert (int8["rows"], int8["reached"]["points"]) == (2, None)  # too few to be judged
    assert 0 < int8["mean_kl_nats"] < int4["mean_kl_nats"]
    assert int8["perplexity_ratio"] == pytest.approx(1, abs=0.02)

    kept = target.with_name("precision.json.unfinished")
    first = subprocess.Popen([*line, "--json", str(target)], stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 200
    while not kept.exists() and first.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.01)
    first.kill()
    first.wait()
    again = subprocess.run([*line, "--json", str(target)], capture_output=True, text=True, timeout=200, check=False)
    assert "nothing of it is used again" not in again.stderr
    resumed = json.loads(target.read_text())["precisions"]
    assert resumed == result["precisions"]
    assert not list(tmp_path.glob("*.unfinished"))
