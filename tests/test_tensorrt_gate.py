"""The short form of scripts/bench/tensorrt_gate.py: the real builder takes small networks; nothing is run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "scripts" / "bench"
GATE, SCRATCH = BENCH / "tensorrt_gate.py", BENCH / "tensorrt_scratch.py"

pytestmark = [pytest.mark.tensorrt, pytest.mark.slow]


@pytest.fixture(autouse=True)
def builder() -> None:
    pytest.importorskip("tensorrt_rtx", reason="no TensorRT-RTX: pip install 'wdmoe[tensorrt-gate]'")


def test_networks_are_accepted_and_copy_no_weights() -> None:
    line = [sys.executable, str(GATE), "--shape", "576x256", "--shape", "2048x768", "--json", "-"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["networks"]) == 6 and result["passed"]
    assert result["scratch_over_weights"] <= 0.125
    assert all(result["networks"][f"{shape} fp16"]["plan_bytes"] < 1_000_000 for shape in ("576x256", "2048x768"))


def test_a_product_reserves_the_same_whatever_its_size() -> None:
    """Why a reserve is taken off before scratch is compared with weights."""
    line = [sys.executable, str(SCRATCH), "--only", "product", "--json", "-"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    found = {name: row["beyond_bytes"] for name, row in json.loads(done.stdout)["attempts"].items()}
    assert found["product 64x64"] == found["product 576x96"]
    assert min(found["product 64x64"]) > 64 * 64 * 2  # more than the weights
    assert found["product 2048x1024"] == found["product 4096x14336"]
    assert found["product as no_product"] == [0, 0]


def test_weights_that_are_dequantised_to_memory_are_noticed() -> None:
    """The check is worth something: a cast before the product, as it would be with float32 rows, costs a copy."""
    import tensorrt_rtx as trt

    from wdmoe.runtime.engines import tensorrt_network as ours

    network = ours.ExpertNetwork(4096, 4096, "int8")
    options = ours.BuildOptions(workspace_bytes=None, compute_capability="SM86")
    good = ours.build_plan(trt, network, options=options)

    class Casting:
        """A network definition whose rows are cast, there and back."""

        def __init__(self, definition: object) -> None:
            self._definition = definition

        def __getattr__(self, name: str) -> object:
            return getattr(self._definition, name)

        def add_input(self, name: str, dtype: object, shape: tuple[int, ...]) -> object:
            if name != ours.ROWS:
                return self._definition.add_input(name, dtype, shape)  # type: ignore[attr-defined]
            wide = self._definition.add_input(name, trt.DataType.FLOAT, shape)  # type: ignore[attr-defined]
            return self._definition.add_cast(wide, dtype).get_output(0)  # type: ignore[attr-defined]

    class CastingBuilder:
        def __init__(self, logger: object) -> None:
            self._builder = trt.Builder(logger)

        def __getattr__(self, name: str) -> object:
            return getattr(self._builder, name)

        def create_network(self, flags: int) -> Casting:
            return Casting(self._builder.create_network(flags))

        def build_serialized_network(self, definition: Casting, config: object) -> object:
            return self._builder.build_serialized_network(definition._definition, config)

    class Module:
        Builder = CastingBuilder

        def __getattr__(self, name: str) -> object:
            return getattr(trt, name)

    bad = ours.build_plan(Module(), network, options=options)
    figures = [
        ours.Scratch(made.scratch_bytes[0], network.activation_bytes(64), network.fp16_weight_bytes, 16_384_000)
        for made in (good, bad)
    ]
    assert not figures[0].excessive
    assert figures[1].excessive


def test_a_network_that_the_builder_refuses_is_an_error_with_its_words() -> None:
    import tensorrt_rtx as trt

    from wdmoe.runtime.engines.tensorrt_network import BuildOptions, ExpertNetwork, build_plan
    from wdmoe.runtime.errors import EngineError

    options = BuildOptions(workspace_bytes=1 << 20, compute_capability="SM86")
    with pytest.raises(EngineError, match=r"refuses an expert of 576 x 96 in fp16: .*workspace"):
        build_plan(trt, ExpertNetwork(576, 96, "fp16"), options=options)


def test_the_twin_knows_no_call_that_the_library_lacks() -> None:
    import tensorrt_rtx as trt
    import tensorrt_twin as twin

    classes = {
        twin._Builder: trt.Builder, twin._Config: trt.IBuilderConfig, twin._Context: trt.IExecutionContext,
        twin._Engine: trt.ICudaEngine, twin._Network: trt.INetworkDefinition, twin._Runtime: trt.Runtime,
        twin._Profile: trt.IOptimizationProfile, twin._TimingCache: trt.ITimingCache, twin._Layer: trt.IDequantizeLayer,
    }  # fmt: skip
    for ours, theirs in classes.items():
        names = {name for name in vars(ours) if not name.startswith("_")}
        assert names and names <= set(dir(theirs)), ours
    enums = (twin.DataType, twin.MatrixOperation, twin.ElementWiseOperation, twin.ActivationType, twin.MemoryPoolType,
             twin.ExecutionContextAllocationStrategy)  # fmt: skip
    for enum in enums:
        assert set(enum.__members__) <= set(dir(getattr(trt, enum.__name__)))
