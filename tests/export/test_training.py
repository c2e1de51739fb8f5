"""Carving with training end to end, on tiny random models: what is written, going on after an interruption, refusals."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_dense

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.export.calibration_text import Windows, split_windows, windows_wanted
from wdmoe.export.carve import CarveShape, FfnWeights, carve_block
from wdmoe.export.carve_artefact import CarveArtefact, changed
from wdmoe.export.carving import CarveConfig, Carved, Progress, carve_checkpoint, plan_carving
from wdmoe.export.checkpoint import open_checkpoint
from wdmoe.export.dense import dense_model, overlapping_shape
from wdmoe.export.training import state as training_state
from wdmoe.export.training.end_to_end import started_student
from wdmoe.export.training.state import TrainingState
from wdmoe.export.training.steps import kept_tensors, perplexity
from wdmoe.export.training.student import Student, StudentShape, student_block
from wdmoe.export.training.torch_dense import last_hidden, load_dense
from wdmoe.runtime.errors import CheckpointError, EngineError

SHAPE = CarveShape(shared=16, experts=4, expert_neurons=12, experts_per_token=2)
ASKED: dict[str, Any] = {
    "experts": 4, "distil": "end-to-end", "tokens": 4096, "window": 32, "steps": 12, "rank": 4, "compiled": False,
    "torch_device": "cpu",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(out: Path, **options: Any) -> CarveConfig:
    return CarveConfig(out, (tiny_dense.text_file(out.parent / "text.txt"),), **{**ASKED, **options})


def carve(dense: Path, out: Path, **options: Any) -> Carved:
    return carve_checkpoint(plan_carving(dense, config_of(out, **options)))


def oracle(folder: Path) -> Any:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    return model.eval()


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def perplexity_of(model: Any, windows: Any) -> float:
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].flatten(0, 1)
    return math.exp(torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten()).item())


@pytest.mark.parametrize(
    "options",
    [
        {"family": "llama"},
        {"family": "llama", "tie_word_embeddings": True, "dtype": "bfloat16", "shards": 3},
        {"family": "qwen2", "num_key_value_heads": 4},
        {
            "family": "mistral",
            "dtype": "float16",
            "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
        },
    ],
    ids=["llama", "llama-tied-bfloat16", "qwen2", "mistral-head-dim-yarn"],
)
def test_the_dense_model_is_that_of_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = tiny_dense.tiny_dense(tmp_path / "dense", **options)
    model = load_dense(dense_model(open_checkpoint(folder), experts=4))
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 320, (2, 40)))
    with torch.no_grad():
        got = last_hidden(model, tokens).float()
        expected = oracle(folder).model(tokens).last_hidden_state
    assert (got - expected).norm() <= 0.02 * expected.norm()  # bfloat16


def test_training_brings_the_carved_model_nearer_to_held_out_text(tmp_path: Path) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", "llama")
    plan = plan_carving(dense, config_of(tmp_path / "moe", steps=30))
    figures = carve_checkpoint(plan).figures
    assert figures["trained_perplexity"] < 0.9 * figures["planned_perplexity"]
    held_out = torch.from_numpy(split_windows(plan.windows, 0, 4).held_out)
    carved = oracle(tmp_path / "moe")
    assert type(carved).__name__ == "Qwen2MoeForCausalLM"
    assert carved.config.num_experts == 4 and carved.config.moe_intermediate_size == 8
    # What training saw, in bfloat16, is what the checkpoint computes.
    assert perplexity_of(carved, held_out) == pytest.approx(figures["trained_perplexity"], rel=0.02)
    assert perplexity_of(oracle(dense), held_out) == pytest.approx(figures["dense_perplexity"], rel=0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"family": "llama", "tie_word_embeddings": True, "dtype": "bfloat16", "shards": 3},
        {"family": "qwen2"},
        {"family": "mistral", "dtype": "float16"},
    ],
    ids=["llama-tied-bfloat16", "qwen2", "mistral"],
)
def test_a_trained_checkpoint_loads_and_exports(tmp_path: Path, options: dict[str, Any]) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", **options)
    figures = carve(dense, tmp_path / "moe", steps=4, expert_neurons=16).figures
    assert all(math.isfinite(value) for value in figures.values()) and len(figures) == 3
    assert oracle(tmp_path / "moe").config.moe_intermediate_size == 16
    names = {path.name for path in (tmp_path / "moe").iterdir()}
    shards = {f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)}
    small = {"config.json", "model.safetensors.index.json", "carving.json", "tokenizer.json", "tokenizer_config.json"}
    assert names == shards | small | {"LICENSE"}
    config = ExportConfig(tmp_path / "bundle", experts_per_device=2)
    export_bundle(plan_export(tmp_path / "moe", "tiny", config), config)
    record = json.loads((tmp_path / "moe" / "carving.json").read_bytes())
    assert (record["recipe"]["distil"], record["recipe"]["steps"], record["figures"]) == ("end-to-end", 4, figures)


def started(tmp_path: Path, shape: StudentShape) -> Student:
    model = load_dense(dense_model(open_checkpoint(tiny_dense.tiny_dense(tmp_path / "dense", "llama")), experts=4))
    windows = torch.randint(256, (16, 32), generator=torch.Generator().manual_seed(1))
    return started_student(model, windows[:8], windows[8:], shape, 0, tmp_path, lambda _progress: None)


def test_the_checkpoint_computes_what_training_saw(tmp_path: Path) -> None:
    student = started(tmp_path, StudentShape(SHAPE, rank=12, compiled=False))
    own, block = student.blocks[0], student.dense.blocks[0]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        own.out["o"].zero_()
        block.o.zero_()  # no attention: the feed-forward part alone moves the residual stream
        rows = torch.randn(1, 16, 32, generator=generator)
        angles = torch.zeros(16, 4).bfloat16()
        after, _, _ = student_block(rows, block, own.tensors(), angles, angles, 1e-5, 4, 2, 2)

    artefact = CarveArtefact(SHAPE, (own.plan(),), (own.change(),))

    def weight(name: str, values: Any) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return changed(f"model.layers.0.{name}.weight", values.float().numpy(), artefact)

    gate, up = block.gate_up.chunk(2)
    ffn = FfnWeights(weight("mlp.gate_proj", gate), weight("mlp.up_proj", up), weight("mlp.down_proj", block.down))
    tensors = {name: torch.tensor(values) for name, values in carve_block(ffn, artefact.blocks[0], SHAPE).items()}
    norm = torch.tensor(weight("post_attention_layernorm", block.ffn_norm))
    inputs = (rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-5) * norm)[0]

    def expert(name: str, given: Any) -> Any:
        first, second = given @ tensors[f"{name}.gate_proj.weight"].T, given @ tensors[f"{name}.up_proj.weight"].T
        result: Any = (first * first.sigmoid() * second) @ tensors[f"{name}.down_proj.weight"].T
        return result

    expected = 0.5 * expert("shared_expert", inputs)
    # Routed as training routed: by rows of 16 bits, so that a near tie is not what this test tells apart.
    best = (inputs.bfloat16().float() @ tensors["gate.weight"].T).topk(2, -1)
    for place, gates in enumerate(best.values.softmax(-1).T):
        every = torch.stack([expert(f"experts.{one}", inputs) for one in range(SHAPE.experts)], 1)
        expected += gates[:, None] * every[torch.arange(16), best.indices[:, place]]
    got = (after - rows)[0]
    assert (got - expected).norm() <= 0.02 * expected.norm()


def test_what_is_recomputed_is_the_same(tmp_path: Path) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", "llama")
    carve(dense, tmp_path / "kept", steps=3, recompute=False)
    carve(dense, tmp_path / "recomputed", steps=3)
    assert content(tmp_path / "kept") == content(tmp_path / "recomputed")


class Killed(Exception):
    """In place of a signal."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Carved]:
    """A carving that nothing interrupted, beside what it was made from."""
    folder = tmp_path_factory.mktemp("whole")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made = carve(tiny_dense.tiny_dense(folder / "dense", "llama"), folder / "moe")
    torch.set_num_threads(before)
    return folder, made


@pytest.mark.parametrize(
    ("phase", "done"),
    [
        ("calibrating", 2), ("planning", 1), ("fitting", 1), ("judging", 0), ("training", 0), ("training", 3),
        ("training", 4), ("training", 9), ("training", 12), ("writing", 0), ("writing", 1), ("writing", 2),
    ],
)  # fmt: skip
def test_an_interrupted_training_goes_on_and_ends_the_same(
    tmp_path: Path, whole: tuple[Path, Carved], phase: str, done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_state, "SAVE_EVERY_STEPS", 4)
    folder, expected = whole
    plan = plan_carving(folder / "dense", config_of(tmp_path / "moe"))

    def kill(now: Progress) -> None:
        if (now.phase, now.done) == (phase, done):
            raise Killed

    with pytest.raises(Killed):
        carve_checkpoint(plan, on_progress=kill)
    assert not plan.config.out.exists()
    seen: list[Progress] = []
    made = carve_checkpoint(plan, on_progress=seen.append)
    if phase in ("training", "writing"):  # at most the steps since the last kept one are done again
        assert {"calibrating", "planning", "fitting"}.isdisjoint(now.phase for now in seen)
        kept = 12 if phase == "writing" else done // 4 * 4
        assert [now.done for now in seen if now.phase == "training"] == list(range(kept, 13))
    assert content(plan.config.out) == content(folder / "moe")
    assert made.figures == expected.figures


def test_an_interruption_before_the_folder_has_its_name_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", "llama")
    carve(dense, tmp_path / "whole", steps=2)

    def kill(*_paths: Path) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("wdmoe.export.carving._give_name", kill)
        with pytest.raises(Killed):
            carve(dense, tmp_path / "moe", steps=2)
    seen: list[Progress] = []
    carve_checkpoint(plan_carving(dense, config_of(tmp_path / "moe", steps=2)), on_progress=seen.append)
    assert seen == []
    assert content(tmp_path / "moe") == content(tmp_path / "whole")
    assert carve(dense, tmp_path / "moe", steps=2).already_there


def test_an_unfinished_training_is_not_thrown_away_for_another(tmp_path: Path) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", "llama")
    plan = plan_carving(dense, config_of(tmp_path / "moe"))

    def kill(now: Progress) -> None:
        if now.phase == "training" and now.done == 11:
            raise Killed

    with pytest.raises(Killed):
        carve_checkpoint(plan, on_progress=kill)
    before = content(tmp_path / "moe.partial")
    for options in ({"steps": 13}, {"distil": "layer"}):
        with pytest.raises(CheckpointError, match=r"unfinished training of another carving .*asked for"):
            carve(dense, tmp_path / "moe", **options)
    assert content(tmp_path / "moe.partial") == before
    state = tmp_path / "moe.partial" / "state-000010.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="missing or damaged"):
        carve_checkpoint(plan)


def test_a_slow_training_is_kept_after_a_minute(tmp_path: Path) -> None:
    seconds = [0.0]
    with TrainingState(tmp_path / "state", {"distil": "end-to-end"}, 100, lambda: seconds[0]) as state:
        tensors = {"values": torch.ones(3)}
        state.keep(1, lambda: tensors)
        assert state.step is None
        seconds[0] = 60.0
        state.keep(2, lambda: tensors)
        assert state.step == 2
        state.keep(3, lambda: tensors)
        assert state.step == 2
        state.keep(10, lambda: tensors)
        state.keep(11, lambda: tensors)
    with TrainingState(tmp_path / "state", {"distil": "end-to-end"}, 100) as state:
        step, kept = state.load()
        assert step == 10 and torch.equal(kept["values"], torch.ones(3))
        with pytest.raises(CheckpointError, match="another carving is writing there"):
            TrainingState(tmp_path / "state", {"distil": "end-to-end"}, 100)


def test_a_rate_that_is_too_high_is_told(tmp_path: Path) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", "llama")
    with pytest.raises(CheckpointError, match="no longer a number; begin again with a lower --rate than 1e"):
        carve(dense, tmp_path / "moe", rate=1e30)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_before_anything_is_written(tmp_path: Path) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", "llama")
    with pytest.raises(EngineError, match=r"sees no NVIDIA GPU here.*--torch-device cpu"):
        carve(dense, tmp_path / "moe", torch_device="cuda")
    assert not (tmp_path / "moe.partial").exists()


def test_a_compiler_that_is_missing_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _name: None)
    dense = tiny_dense.tiny_dense(tmp_path / "dense", "llama")
    with pytest.raises(EngineError, match=r"needs a C.. compiler.*give --no-compile"):
        carve(dense, tmp_path / "moe", compiled=True)
    assert not (tmp_path / "moe.partial").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch itself, as it compiles
def test_compiled_training_differs_by_rounding_alone(tmp_path: Path) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", "llama")
    plain = carve(dense, tmp_path / "plain", steps=4).figures
    compiled = carve(dense, tmp_path / "compiled", steps=4, compiled=True).figures
    assert compiled == pytest.approx(plain, rel=0.01)


def test_too_little_text_is_told(tmp_path: Path) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", "llama")
    with pytest.raises(CheckpointError, match=r"leaves 32 tokens to plan 4 experts by.* at least 64"):
        plan_carving(dense, config_of(tmp_path / "moe", tokens=160))


def test_too_little_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", "llama")
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match="choose another --out"):
        carve(dense, tmp_path / "moe")


def test_windows_serve_one_purpose_each() -> None:
    ids = np.arange(windows_wanted(10, 4))[:, None].repeat(512, axis=1)
    split = split_windows(Windows(ids), 0, 8)
    parts = [set(part[:, 0].tolist()) for part in (split.plan, split.fit, split.train, split.held_out)]
    assert [len(part) for part in parts[:2]] == [29, 29] and len(parts[3]) == 17
    assert set.union(*parts) == set(range(len(ids))) and sum(map(len, parts)) == len(ids)
    many = split_windows(Windows(np.zeros((4000, 8), np.int64)), 0, 8)
    assert [len(part) for part in (many.plan, many.fit, many.held_out)] == [32, 32, 32]
    assert len(many.train) == 4000 - 96


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"top_k": 1}, "--top-k 1 of --experts 8: .*at least 2"),
        ({"top_k": 8}, "not all of them"),
        ({"shared": 1536}, "give --shared 512 --expert-neurons 256"),
        ({"expert_neurons": 1025}, "none in common"),
    ],
)
def test_experts_that_cannot_be_are_refused(asked: dict[str, int], message: str) -> None:
    options: dict[str, Any] = {"experts": 8, "top_k": 2, "shared": None, "expert_neurons": None, **asked}
    with pytest.raises(ValueError, match=message):
        overlapping_shape(1536, **options)


def test_two_thirds_of_a_block_work_on_a_token_if_nothing_else_is_said() -> None:
    assert overlapping_shape(1536, 8, 2, None, None) == CarveShape(512, 8, 256, 2)  # as the model that ships
    assert overlapping_shape(1536, 16, 4, None, None) == CarveShape(512, 16, 128, 4)
    assert overlapping_shape(1536, 8, 2, 768, None) == CarveShape(768, 8, 128, 2)
    assert overlapping_shape(8192, 8, 2, None, None) == CarveShape(2728, 8, 1360, 2)
    assert overlapping_shape(48, 4, 2, None, None) == CarveShape(16, 4, 8, 2)


def test_a_student_read_from_its_file_is_the_student(tmp_path: Path) -> None:
    shape = StudentShape(SHAPE, rank=40, compiled=False)  # more than the sides of most matrices
    student = started(tmp_path, shape)
    other = Student(student.dense, None, shape)
    other.load_state_dict({name.removeprefix("student."): values for name, values in kept_tensors(student).items()})
    windows = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(3))
    expected, found = (
        perplexity(lambda batch, own=own: own(batch)[0], student.dense.head, windows)  # type: ignore[misc]
        for own in (student, other)
    )
    assert found == expected
