"""A trace holds what the routers said: the same choices, counts and boundaries; and damaged files are refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from wdmoe.bs.cli import main
from wdmoe.bs.config import StationConfig
from wdmoe.bs.microbatch import pack_questions
from wdmoe.bs.policies import Exact, Sensitivity
from wdmoe.bs.questions import Choice, Question
from wdmoe.bs.routing import Routing, route
from wdmoe.bs.trace import Recorder, TraceInfo, read_trace, write_trace
from wdmoe.bs.virtual import in_this_process, open_virtual_station
from wdmoe.runtime.errors import DataError

INFO = TraceInfo("wdmoe-trace", 1, "0", "m", "b" * 64, 2, True, {"invented": 3}, {"invented": "0" * 64})


def recorded(logits: list[list[np.ndarray]]) -> Recorder:
    recorder = Recorder(len(logits[0]), INFO.top_k)
    for question in logits:
        for block, rows in enumerate(question):
            recorder.on_router(block, rows)
    return recorder


def invented(seed: int = 0) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [[3 * rng.standard_normal((tokens, 8), np.float32) for _ in range(4)] for tokens in (5, 1, 30)]


def test_what_is_read_routes_as_what_was_recorded(tmp_path: Path) -> None:
    logits = invented()
    write_trace(tmp_path / "t.npz", recorded(logits).trace(INFO, np.zeros((4, 8), np.int64)))
    trace = read_trace(tmp_path / "t.npz")
    assert trace.info == INFO and trace.starts.tolist() == [0, 5, 6, 36] and trace.n_questions == 3
    counts = np.zeros((4, 8), np.int64)
    for question, blocks in enumerate(logits):
        for block, rows in enumerate(blocks):
            expected, got = route(rows, 2, True), trace.routing(block, question)
            np.testing.assert_array_equal(got.experts, expected.experts)
            np.testing.assert_allclose(got.weights, expected.weights, rtol=2e-3)
            counts[block] += np.bincount(expected.experts.ravel(), minlength=8)
    np.testing.assert_array_equal(trace.counts, counts)
    assert trace.routing(0).experts.shape == (36, 2)
    assert not (tmp_path / "t.npz.partial").exists()


def test_norms_are_kept_and_traces_of_version_1_are_read(tmp_path: Path) -> None:
    norms = np.random.default_rng(0).random((4, 8), np.float32)
    for version, known in ((1, None), (2, None), (2, norms)):
        info = msgspec.structs.replace(INFO, version=version)
        write_trace(tmp_path / "t.npz", recorded(invented()).trace(info, np.zeros((4, 8), np.int64), known))
        read = read_trace(tmp_path / "t.npz").norms
        np.testing.assert_array_equal(np.zeros(0) if read is None else read, np.zeros(0) if known is None else known)
    write_trace(tmp_path / "t.npz", recorded(invented()).trace(INFO, np.zeros((4, 8), np.int64), norms[:3]))
    with pytest.raises(DataError, match=r"norms are float32 \(3, 8\)"):
        read_trace(tmp_path / "t.npz")
    info = msgspec.structs.replace(INFO, version=3)
    write_trace(tmp_path / "t.npz", recorded(invented()).trace(info, np.zeros((4, 8), np.int64)))
    with pytest.raises(DataError, match="version 3, expected wdmoe-trace 1 to 2"):
        read_trace(tmp_path / "t.npz")


def test_what_blocks_mind_is_kept_for_simulations(tmp_path: Path) -> None:
    known = {"weight": tuple(Sensitivity(0.5 + block, 0.25) for block in range(4))}
    info = msgspec.structs.replace(INFO, sensitivity=known)
    write_trace(tmp_path / "t.npz", recorded(invented()).trace(info, np.zeros((4, 8), np.int64)))
    assert read_trace(tmp_path / "t.npz").sensitivity(2) == {"weight": Sensitivity(2.5, 0.25)}
    assert recorded(invented()).trace(INFO, np.zeros((4, 8), np.int64)).sensitivity(2) is None

    short = msgspec.structs.replace(INFO, sensitivity={"weight": known["weight"][:3]})
    write_trace(tmp_path / "t.npz", recorded(invented()).trace(short, np.zeros((4, 8), np.int64)))
    with pytest.raises(DataError, match="its sensitivity does not speak of 4 blocks"):
        read_trace(tmp_path / "t.npz")


def test_a_question_that_was_broken_off_is_left_out() -> None:
    logits = invented()
    recorder = recorded([logits[0], logits[1][:2], logits[2]])  # the second failed after two blocks
    trace = recorder.trace(INFO, np.zeros((4, 8), np.int64))
    assert trace.starts.tolist() == [0, 5, 35] and (trace.counts.sum(axis=1) == 2 * 35).all()
    with pytest.raises(DataError, match="nothing was recorded"):
        Recorder(4, 2).trace(INFO, np.zeros((4, 8), np.int64))


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    good = recorded(invented()).trace(INFO, np.zeros((4, 8), np.int64))
    path = tmp_path / "t.npz"
    np.save(tmp_path / "array.npy", good.counts)
    for content in (b"", b"PK", b"text", (tmp_path / "array.npy").read_bytes(), None):
        if content is not None:
            path.write_bytes(content)
        else:
            np.savez(path, counts=good.counts)
        with pytest.raises(DataError, match="is not a trace") as refused:
            read_trace(path)
        assert "pickle" not in str(refused.value)
    with pytest.raises(DataError, match=r"none.npz is not a trace .*No such file"):
        read_trace(tmp_path / "none.npz")
    for field, value, reason in (
        ("starts", np.array([0, 5]), "starts do not ascend from 0 to 36"),
        ("counts", good.counts[:1], "counts has shape"),
        ("probabilities", good.probabilities.astype(np.float32), "probabilities are float32"),
    ):
        arrays = {name: getattr(good, name) for name in ("probabilities", "starts", "counts", "placement")}
        write_trace(path, type(good)(INFO, **(arrays | {field: value})))
        with pytest.raises(DataError, match=reason):
            read_trace(path)


def test_the_pipeline_tells_the_recorder_what_it_routes_by(bundle: Path) -> None:
    question = Question("q", (Choice(tuple(b"Q: bread\nA:"), tuple(b" box")),))
    with open_virtual_station(StationConfig(bundle, threads=1), in_this_process(bundle), lambda _: None) as station:
        model = station.manifest.model
        recorder = Recorder(model.n_blocks, model.top_k)
        station.pipeline.on_router = recorder.on_router
        sent = []
        for _ in range(2):
            ((_, _, record),) = station.pipeline.run([pack_questions([question], None)], Exact())
            sent.append([block.pairs for block in record.blocks])
        info = TraceInfo("wdmoe-trace", 1, "0", "m", "b", model.top_k, model.norm_top_k, {}, {})
        placement = np.array([[holders[0] for holders in block] for block in station.manifest.placement])
        trace = recorder.trace(info, placement)
    assert trace.starts.tolist() == [0, 14, 28]

    def pairs(routing: Routing, owner: np.ndarray) -> int:
        return sum(len(set(devices)) for devices in owner[routing.experts].tolist())

    got = [[pairs(trace.routing(b, q), placement[b]) for b in range(trace.n_blocks)] for q in range(2)]
    assert got == sent


def test_the_command_writes_a_trace(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    options = ["trace", "--bundle", str(bundle), "--dataset", "piqa-sample", "--limit", "2", "--out"]
    done = CliRunner().invoke(main, [*options, str(tmp_path / "t.npz")])
    assert done.exit_code == 0, done.output
    trace = read_trace(tmp_path / "t.npz")
    assert trace.n_questions == 2 and trace.info.datasets == {"piqa-sample": 2}
    assert trace.info.version == 2 and trace.norms is None  # the bundle was given no text
    assert trace.counts.sum() == trace.probabilities.shape[1] * trace.n_blocks * trace.info.top_k
    done = CliRunner().invoke(main, [*options, str(tmp_path / "none/t.npz")])
    assert done.exit_code == 2 and "there is no folder" in done.stderr
