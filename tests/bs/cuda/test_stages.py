"""The stages on a GPU against those on the CPU, through the whole loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import inprocess
import numpy as np
import pytest
from inprocess import run_sequence

from wdmoe.bs.policies import Exact, parse_policy
from wdmoe.bs.questions import Choice, Question
from wdmoe.bs.scoring import DistributedScorer
from wdmoe.runtime.manifest import BsManifest, read_manifest

PROMPT = list(b"How does one keep bread fresh?")
DROPS = (
    "ser:t=0.9"  # which looks at no latency: those measured in two runs differ, and with them what other policies drop
)
Opened = Callable[..., Any]


@pytest.fixture
def opened(torch_device: str) -> Opened:
    """Open a system whose stages are on the GPU."""
    from wdmoe.bs.cuda.stages import CudaStages

    def make(folder: Path, manifest: BsManifest) -> CudaStages:
        return CudaStages(folder, manifest, torch_device)  # type: ignore[arg-type]

    return partial(inprocess.open_system, make_stages=make)


def test_a_prompt_and_its_continuation_are_those_of_the_cpu(any_bundle: Path, opened: Opened) -> None:
    with inprocess.open_system(any_bundle) as system:
        tokens, expected = inprocess.greedy(system, PROMPT[:9], 3)
    with opened(any_bundle) as system:
        ours, logits = inprocess.greedy(system, PROMPT[:9], 3)
    assert ours == tokens
    np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_questions_in_lanes_are_scored_as_on_the_cpu(bundle: Path, opened: Opened) -> None:
    questions = [
        Question(f"q/{n}", (Choice(tuple(b"Bread " * (1 + n)), tuple(b"box")), Choice(tuple(b"Bread"), tuple(b"bag"))))
        for n in range(2)
    ]
    with inprocess.open_system(bundle) as system:
        expected = DistributedScorer(system.pipeline, Exact(), 1, None, batch=2).score(questions)
    with opened(bundle) as system:
        assert system.pipeline.stages_on == "cuda"
        ours = DistributedScorer(system.pipeline, Exact(), 1, None, batch=2).score(questions)
    for answer, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(answer.log_likelihoods, other.log_likelihoods, atol=5e-5)


@pytest.mark.parametrize(("wire", "policy", "tolerance"), [
    ("fp16", "exact", 2e-2), ("int8", "exact", 0.3), ("fp16", DROPS, 2e-2), ("fp32", DROPS, 1e-4),
])  # fmt: skip
def test_other_wires_and_policies_answer_as_on_the_cpu(
    bundle: Path, opened: Opened, wire: Any, policy: str, tolerance: float
) -> None:
    chosen = parse_policy(policy)
    with inprocess.open_system(bundle, wire=wire) as system:
        expected = run_sequence(system, PROMPT[:8], chosen)
        exact = run_sequence(system, PROMPT[:8], Exact())
    assert (policy == "exact") == np.array_equal(expected, exact)
    with opened(bundle, wire=wire) as system:
        ours = run_sequence(system, PROMPT[:8], chosen)
    np.testing.assert_allclose(ours, expected, atol=tolerance)


def test_a_conversation_goes_on_after_its_cache_was_cut_and_grew(bundle: Path, opened: Opened) -> None:
    from wdmoe.bs.microbatch import KvCache, pack_sequence

    def logits(system: inprocess.System) -> np.ndarray:
        model = system.manifest.model
        cache = KvCache(model.n_blocks, model.kv_dim, 8)
        for tokens in (PROMPT[:8], PROMPT[8:12]):
            ((_, result, _),) = system.pipeline.run([pack_sequence("talk", tokens, cache, None)], Exact())
            cache.truncate(6)
            cache.reserve(20)
        assert result.logits is not None
        return result.logits

    with inprocess.open_system(bundle) as system:
        expected = logits(system)
    with opened(bundle) as system:
        np.testing.assert_allclose(logits(system), expected, atol=2e-5)


def test_a_stage_that_is_none_is_refused_by_its_file(bundle: Path, tmp_path: Path, torch_device: str) -> None:
    onnx = pytest.importorskip("onnx")
    from wdmoe.bs.cuda.cutting import cut_stage
    from wdmoe.runtime.errors import BundleError

    name = read_manifest(bundle / "bs", BsManifest).stages[1]
    weights = Path(name).with_suffix(".safetensors")
    (tmp_path / weights).write_bytes((bundle / "bs" / weights).read_bytes())
    model = onnx.load(str(bundle / "bs" / name), load_external_data=False)
    for node in model.graph.node:
        node.output[:] = ["renamed" if output == "router_logits" else output for output in node.output]
    onnx.save(model, str(tmp_path / name))
    with pytest.raises(BundleError, match=f"{name}.*not a stage"):
        cut_stage(tmp_path / name)
