"""The TensorRT engine in a world of memory: right answers, the calls in order, plans that are kept and refused."""

from __future__ import annotations

import gc
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_twin import DESKTOP, ORIN, MemoryCuda
from tensorrt_twin import TensorRTTwin, TwinEngine, swap_plans
from tiny import tiny_checkpoint

from wdmoe.device.loading import self_check
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.runtime.engines.numpy_engine import NumpyEngine
from wdmoe.runtime.engines.tensorrt_engine import TensorrtEngine
from wdmoe.runtime.engines.tensorrt_plans import PlanStore
from wdmoe.runtime.errors import EngineError
from wdmoe.runtime.manifest import DeviceManifest, Precision, read_manifest

PRECISIONS: tuple[Precision, ...] = ("fp16", "int8", "int4")
# Neither a multiple of int8's padding nor of int4's groups; and large enough that weights matter beside activations.
WIDTHS: dict[str, Any] = {
    "hidden_size": 328,
    "intermediate_size": 200,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One device folder of each precision; nobody writes into them."""
    folder = tmp_path_factory.mktemp("tensorrt")
    checkpoint = tiny_checkpoint(folder / "c", "mixtral", **WIDTHS)
    made: dict[str, Path] = {}
    every: tuple[Precision, ...] = ("fp32", *PRECISIONS)
    for precision in every:
        config = ExportConfig(folder / precision, precision=precision)
        made[precision] = export_bundle(plan_export(checkpoint, "tiny", config), config).out / "device-1"
    return made


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> TensorRTTwin:
    return use(monkeypatch, TensorRTTwin())


def use(monkeypatch: pytest.MonkeyPatch, twin: TensorRTTwin) -> TensorRTTwin:
    monkeypatch.setattr(TwinEngine, "twin", twin)
    return twin


@pytest.fixture
def said() -> list[str]:
    return []


class Slice:
    """A copy of a device folder, to be written into."""

    def __init__(self, source: Path, folder: Path) -> None:
        shutil.copytree(source, folder)
        self.folder, self.manifest = folder, read_manifest(folder, DeviceManifest)
        self.said: list[str] = []

    def open(self) -> TwinEngine:
        TwinEngine.prepare(self.folder, self.manifest.experts, self.said.append)
        return TwinEngine(self.folder, self.manifest.experts, 1)

    @property
    def engines(self) -> Path:
        return self.folder / "engines"

    def files(self, suffix: str) -> list[Path]:
        return sorted(path for path in self.engines.iterdir() if path.name.endswith(suffix))


@pytest.fixture
def fp16(slices: dict[str, Path], tmp_path: Path) -> Slice:
    return Slice(slices["fp16"], tmp_path / "slice")


@pytest.fixture
def int8(slices: dict[str, Path], tmp_path: Path) -> Slice:
    return Slice(slices["int8"], tmp_path / "slice")


@pytest.fixture
def int4(slices: dict[str, Path], tmp_path: Path) -> Slice:
    return Slice(slices["int4"], tmp_path / "slice")


def rows_of(tokens: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(tokens).standard_normal((tokens, WIDTHS["hidden_size"]), np.float32)


def assert_right(engine: TensorrtEngine, part: Slice, tokens: int, bound: float = 4e-3) -> None:
    oracle = NumpyEngine(part.folder, part.manifest.experts, 1)
    for entry in part.manifest.experts:
        expected = oracle.run(entry.block, entry.expert, rows_of(tokens))
        got = engine.run(entry.block, entry.expert, rows_of(tokens))
        assert np.abs(got - expected).max() < bound * np.abs(expected).max()


@pytest.mark.parametrize("device", [ORIN, DESKTOP], ids=["shared memory", "memory of its own"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_experts_are_right_at_every_number_of_tokens(
    slices: dict[str, Path], precision: str, device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, TensorRTTwin(MemoryCuda(device)))
    part = Slice(slices[precision], tmp_path / "slice")
    engine = part.open()
    assert engine.version == f"10.16.2.10 ({precision})"
    assert self_check(engine, part.folder, part.manifest).passed
    for tokens in (1, 64, 65, 3, 1024, 1025, 2049, 8):  # back and forth between profiles, and in pieces
        assert_right(engine, part, tokens)


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_library_itself_gives_right_answers(slices: dict[str, Path], precision: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt", reason="no TensorRT on this machine")
    part = Slice(slices[precision], tmp_path / "slice")
    try:
        TensorrtEngine.open_world()
    except EngineError as error:
        pytest.skip(str(error))
    TensorrtEngine.prepare(part.folder, part.manifest.experts, part.said.append)
    engine = TensorrtEngine(part.folder, part.manifest.experts, 1)
    assert self_check(engine, part.folder, part.manifest).passed
    for tokens in (1, 64, 65, 1024, 1025):
        assert_right(engine, part, tokens, 1e-2)


def test_one_plan_and_no_copy_serve_all_experts_of_fp16(twin: TensorRTTwin, fp16: Slice) -> None:
    engine = fp16.open()
    assert twin.built == 1 and len(fp16.files(".plan")) == 1
    weights_bytes = sum(entry.size_bytes for name, entry in fp16.manifest.files.items() if len(name) > 70)
    held = sum(len(memory) for memory in twin.cuda.device_memory.values())
    scratch_bytes = 1024 * 200 * 2 * 2  # gate and up, which all experts share
    assert weights_bytes < held < 1.01 * weights_bytes + scratch_bytes
    del engine


def test_memory_of_the_device_is_given_back_with_the_engine(twin: TensorRTTwin, int8: Slice) -> None:
    engine = int8.open()
    assert twin.cuda.device_memory and twin.cuda.pinned and twin.cuda.queues
    del engine
    assert not twin.cuda.device_memory and not twin.cuda.pinned and not twin.cuda.queues


def test_an_engine_may_be_used_by_another_thread(twin: TensorRTTwin, fp16: Slice) -> None:
    engine, answers = fp16.open(), []
    thread = threading.Thread(target=lambda: answers.append(engine.run(0, 2, rows_of(5))))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(answers[0], engine.run(0, 2, rows_of(5)))


def test_a_value_beyond_float16_is_an_error_with_a_way_out(twin: TensorRTTwin, fp16: Slice) -> None:
    engine = fp16.open()
    with pytest.raises(EngineError, match=r"expert 2 of block 0 .* float16 cannot hold; .*--engine onnxruntime"):
        engine.run(0, 2, 1e4 * rows_of(2))
    assert_right(engine, fp16, 2)


def test_float32_is_left_to_engines_that_compute_in_it(
    twin: TensorRTTwin, slices: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match="this slice is fp32; export with --precision fp16"):
        Slice(slices["fp32"], tmp_path / "slice").open()


def test_what_does_not_fit_is_refused_before_anything_is_loaded(fp16: Slice, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = use(monkeypatch, TensorRTTwin(MemoryCuda(DESKTOP, free_bytes=1_000_000)))
    with pytest.raises(EngineError, match=r"4 experts in fp16 take 0\.0 GB, 0\.0 GB are free"):
        fp16.open()
    assert not twin.cuda.device_memory and not twin.cuda.queues


# int8: where the version allows it and a probe passes, else float16


@pytest.mark.parametrize("version", ["10.3.0.26", "11.4.1.1"])
def test_int8_is_served_as_float16_where_scales_must_be_constants(
    int8: Slice, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, TensorRTTwin(__version__=version))
    engine = int8.open()
    old = version.startswith("10.3")
    assert engine.version.endswith("(fp16)" if old else "(int8)")
    assert any("takes int8 scales only as constants" in line for line in int8.said) == old
    assert self_check(engine, int8.folder, int8.manifest).passed


def test_int8_that_does_not_build_is_served_as_float16_and_not_tried_again(twin: TensorRTTwin, int8: Slice) -> None:
    twin.refuses = "int8"
    engine = int8.open()
    assert engine.version.endswith("(fp16)") and self_check(engine, int8.folder, int8.manifest).passed
    assert "could not find any implementation for int8" in int8.said[-3]
    twin.refuses = ""
    assert int8.open().version.endswith("(fp16)") and twin.built == 1


def test_int8_that_answers_wrong_in_the_probe_is_served_as_float16(twin: TensorRTTwin, int8: Slice) -> None:
    class WrongInInt8(TwinEngine):
        def run(self, block: int, expert: int, rows: Any) -> Any:
            out = super().run(block, expert, rows)
            return 1.5 * out if self.version.endswith("(int8)") else out

    WrongInInt8.prepare(int8.folder, int8.manifest.experts, int8.said.append)
    engine = WrongInInt8(int8.folder, int8.manifest.experts, 1)
    assert engine.version.endswith("(fp16)") and self_check(engine, int8.folder, int8.manifest).passed
    assert any("the probe of int8 is off by" in line for line in int8.said)


# Plans are kept, and only what is known to be right for this machine is used


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_second_start_builds_nothing(
    slices: dict[str, Path], precision: str, twin: TensorRTTwin, tmp_path: Path
) -> None:
    part = Slice(slices[precision], tmp_path / "slice")
    assert_right(part.open(), part, 3)
    built, part.said = twin.built, []
    assert_right(part.open(), part, 3)
    assert twin.built == built and part.said == []


def test_int4_builds_a_plan_for_each_expert_with_one_timing_cache(twin: TensorRTTwin, int4: Slice) -> None:
    int4.open()
    assert (twin.built, twin.timed) == (4, 1) and len(int4.files(".plan")) == 4
    assert "built block_01_expert_03-328x200-int4.plan" in int4.said[-1] and "4 of 4" in int4.said[-1]


def test_an_interrupted_build_goes_on_where_it_was(twin: TensorRTTwin, int4: Slice) -> None:
    class Cut(Exception):
        pass

    def cut(line: str) -> None:
        if "2 of 4" in line:
            raise Cut

    with pytest.raises(Cut):
        TwinEngine.prepare(int4.folder, int4.manifest.experts, cut)
    assert twin.built == 2
    with pytest.raises(
        EngineError, match=r"block_01_expert_02-328x200-int4.plan is not built; run `wdmoe-device build`"
    ):
        TwinEngine(int4.folder, int4.manifest.experts, 1)
    assert_right(int4.open(), int4, 2)
    assert twin.built == 4 and "building 2 of 4 plans" in int4.said[0]


def test_two_processes_do_not_build_in_one_folder_at_a_time(twin: TensorRTTwin, int4: Slice) -> None:
    """A replica is a second process with the same folder."""
    said: list[str] = []
    with PlanStore(TwinEngine.open_world(), int4.folder).lock(said.append):
        other = threading.Thread(
            target=TwinEngine.prepare, args=(int4.folder, int4.manifest.experts, said.append), daemon=True
        )
        other.start()
        while not said:
            other.join(0.01)
        assert "another process builds in" in said[0] and twin.built == 0
    other.join(60)
    assert twin.built == 4 and "4 of 4" in said[-1]


def test_a_folder_of_the_same_kind_of_machine_is_used_and_of_another_refused_by_name(
    fp16: Slice, slices: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, TensorRTTwin())
    fp16.open()
    copy = Slice(slices["fp16"], tmp_path / "other")
    shutil.copytree(fp16.engines, copy.engines)
    same = use(monkeypatch, TensorRTTwin(MemoryCuda(replace(ORIN, memory_bytes=ORIN.memory_bytes + 5_000_000))))
    assert_right(copy.open(), copy, 2)
    assert same.built == 0
    larger = use(monkeypatch, TensorRTTwin(MemoryCuda(replace(ORIN, sm_count=14))))
    assert_right(copy.open(), copy, 2)
    assert larger.built == 1 and "refused" in copy.said[0] and "made for sm_count 16, this is 14" in copy.said[0]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), "its content has changed"),
        (lambda raw: raw[:-7], "its first line says"),
        (lambda raw: b"\x00" + raw[1:], "its first line is damaged"),
        (lambda raw: b"", "its first line is damaged"),
        (lambda raw: raw.replace(b"wdmoe-plan 1", b"wdmoe-plan 9", 1), "its format is 'wdmoe-plan 9'"),
        (lambda raw: raw.replace(b'"weights": "', b'"weights": "0', 1), "it was made for weights '0"),
    ],
)
def test_a_damaged_or_foreign_plan_is_refused_by_name_and_built_anew(
    twin: TensorRTTwin, int4: Slice, damage: Any, words: str
) -> None:
    int4.open()
    path = int4.files(".plan")[1]
    path.write_bytes(damage(path.read_bytes()))
    int4.said.clear()
    assert_right(int4.open(), int4, 2)
    assert twin.built == 5 and path.name in int4.said[0] and words in int4.said[0]
    assert not int4.files(".partial")


def test_a_timing_cache_that_is_damaged_is_not_used(twin: TensorRTTwin, int4: Slice) -> None:
    int4.open()
    (int4.engines / "timing.cache").write_bytes(b"{}\nnonsense")
    int4.files(".plan")[0].unlink()
    assert_right(int4.open(), int4, 2)
    assert (twin.built, twin.timed) == (5, 2)
    assert any("refused" in line and "timing.cache" in line for line in int4.said)


def test_a_plan_for_other_weights_in_the_right_wrapping_fails_the_self_check(twin: TensorRTTwin, int4: Slice) -> None:
    """Nothing but the answers can tell: the self-check is what stands between this and wrong text."""
    int4.open()
    swap_plans(int4.folder)
    check = self_check(int4.open(), int4.folder, int4.manifest)
    assert twin.built == 4 and not check.passed and check.max_error > 0.1


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(twin: TensorRTTwin, fp16: Slice) -> None:
    fp16.engines.write_text("a file in the way")
    with pytest.raises(EngineError, match=r"engines.* cannot be (read|written) \(Not a directory\)"):
        fp16.open()


# Scratch


def test_scratch_that_holds_the_weights_is_refused_with_the_figures(twin: TensorRTTwin, fp16: Slice) -> None:
    twin.copies_weights = True
    with pytest.raises(
        EngineError,
        match=r"takes 0\.4 MB of scratch for 64 tokens, .*: what is beyond is 1\.00 of the expert's 0\.4 MB in float16",
    ):
        fp16.open()
    assert not fp16.files(".plan")
    built = twin.built
    with pytest.raises(EngineError, match=r"found before; `wdmoe-device build --again` tries anew"):
        fp16.open()
    assert twin.built == built


def test_int8_whose_weights_are_copied_is_served_as_float16(twin: TensorRTTwin, int8: Slice) -> None:
    twin.copies_weights = True
    with pytest.raises(EngineError, match=r"experts-328x200-fp16\.plan takes"):  # this twin copies those as well
        int8.open()
    assert any(
        "serves int8 as float16, in twice the memory: engine tensorrt: experts-328x200-int8" in t for t in int8.said
    )


def test_what_kernels_reserve_whatever_the_shape_is_not_taken_for_a_copy(twin: TensorRTTwin, fp16: Slice) -> None:
    twin.reserve_bytes = 8 << 20  # twenty times the weights of this expert
    assert_right(fp16.open(), fp16, 2)
    assert twin.built == 3  # with the references, whose figures are kept
    fp16.open()
    assert twin.built == 3


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever happened, a world that is done with holds no memory of the device."""
    yield
    gc.collect()
    twin = TwinEngine.twin
    assert not twin.cuda.device_memory and not twin.cuda.queues
