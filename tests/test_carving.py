"""scripts/carving on a tiny random model: training sees what the checkpoint computes, and goes on where it stopped."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

torch = pytest.importorskip("torch")
sys.path.append(str(Path(__file__).parents[1]))

from scripts.carving.dense import Block, Dense
from scripts.carving.distil import distil
from scripts.carving.planning import SoftPlan, calibrate, plan_softly
from scripts.carving.student import Student, student_block
from wdmoe.export.carve import CarveShape, FfnWeights, carve_block
from wdmoe.export.carve_artefact import CarveArtefact, changed

HIDDEN, NEURONS, HEADS, KV_HEADS, VOCABULARY = 32, 48, 4, 2, 40
SHAPE = CarveShape(shared=16, experts=4, expert_neurons=12, experts_per_token=2)


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_options: function)


def dense_model() -> Dense:
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Any:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).bfloat16()

    kv = HIDDEN // HEADS * KV_HEADS
    sizes = {"qkv": (HIDDEN + 2 * kv, HIDDEN), "o": (HIDDEN, HIDDEN), "gate_up": (2 * NEURONS, HIDDEN)}
    sizes["down"] = (HIDDEN, NEURONS)
    blocks = tuple(
        Block(
            **{name: matrix(*size) for name, size in sizes.items()},
            input_norm=torch.ones(HIDDEN),
            ffn_norm=torch.ones(HIDDEN),
        )
        for _ in range(2)
    )
    return Dense(blocks, matrix(VOCABULARY, HIDDEN), torch.ones(HIDDEN), 1e-5, 10_000.0, HEADS, KV_HEADS)


def tokens(windows: int) -> Any:
    return torch.randint(VOCABULARY, (windows, 32), generator=torch.Generator().manual_seed(1))


def planned(model: Dense) -> list[SoftPlan]:
    torch.manual_seed(0)
    seen = calibrate(model, tokens(8))
    generator = torch.Generator().manual_seed(0)
    return [plan_softly(one, block.down, SHAPE, generator) for one, block in zip(seen, model.blocks, strict=True)]


def test_the_checkpoint_computes_what_training_saw() -> None:
    model = dense_model()
    student = Student(model, planned(model), SHAPE)
    own, block = student.blocks[0], model.blocks[0]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        own.out["o"].zero_()
        block.o.zero_()  # no attention: the feed-forward part alone moves the residual stream
        rows = torch.randn(1, 16, HIDDEN, generator=generator)
        angles = torch.zeros(16, HIDDEN // HEADS // 2).bfloat16()
        after, _, _ = student_block(rows, block, own.tensors(), angles, angles, 1e-5, HEADS, KV_HEADS, 2)

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


@pytest.mark.slow
def test_training_goes_on_where_it_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.carving.distil.SAVE_EVERY_STEPS", 2)
    model = dense_model()
    plans = planned(model)
    students = []
    for state in (None, tmp_path / "state"):
        torch.manual_seed(0)
        student = Student(model, plans, SHAPE)
        if state is None:
            distil(student, tokens(8), 4, None, lambda _line: None)
        else:
            with pytest.raises(KeyboardInterrupt):  # after step 2 is saved, as step 3 begins
                distil(cast(Student, _Interrupted(student, 3)), tokens(8), 4, state, lambda _line: None)
            torch.manual_seed(0)
            student = Student(model, plans, SHAPE)
            distil(student, tokens(8), 4, state, lambda _line: None)
        students.append(student.state_dict())
    for name, values in students[0].items():
        torch.testing.assert_close(students[1][name], values, rtol=1e-4, atol=1e-6, msg=name)


class _Interrupted:
    """A student that is interrupted when it is called for the n-th time."""

    def __init__(self, student: Student, call: int) -> None:
        self._student, self._left = student, call

    def __getattr__(self, name: str) -> object:
        return getattr(self._student, name)

    def __call__(self, batch: Any) -> object:
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt
        return self._student(batch)
