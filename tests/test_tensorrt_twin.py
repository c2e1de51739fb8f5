"""The twin of TensorRT enforces the rules it is there for: a test of the engine against it can fail."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_twin import MemoryCuda
from tensorrt_twin import TensorRTTwin

from wdmoe.runtime.engines.tensorrt_network import OUT, ROWS, ExpertNetwork, build_plan, shared_logger
from wdmoe.runtime.errors import EngineError

NETWORK = ExpertNetwork(16, 8, "fp16")


class Rig:
    """One context with everything set as it should be."""

    def __init__(self) -> None:
        self.twin = TensorRTTwin(MemoryCuda())
        self.cuda = self.twin.cuda
        self.cuda.make_current()
        logger = shared_logger(self.twin)
        engine = self.twin.Runtime(logger).deserialize_cuda_engine(build_plan(self.twin, NETWORK).plan)
        self.log = logger.current
        assert engine is not None
        self.context = engine.create_execution_context(self.twin.ExecutionContextAllocationStrategy.USER_MANAGED)
        size = max(engine.get_device_memory_size_for_profile_v2(index) for index in (0, 1))
        self.context.set_device_memory(self.cuda.allocate(size), size)
        self.stream = self.cuda.make_stream()
        self.addresses = {
            name: self.cuda.allocate(1 << 16) for name in (ROWS, OUT, "gate_proj", "up_proj", "down_proj")
        }

    def set_addresses(self, *left_out: str) -> None:
        for name, address in self.addresses.items():
            if name not in left_out:
                assert self.context.set_tensor_address(name, address)


def test_work_is_done_when_its_stream_is_waited_for() -> None:
    rig = Rig()
    rig.set_addresses()
    for address in rig.addresses.values():
        rig.cuda.device_memory[address][:] = 0
    out = rig.cuda.device_memory[rig.addresses[OUT]]
    out[:] = 7
    assert rig.context.set_input_shape(ROWS, (3, 16)) and rig.context.execute_async_v3(rig.stream)
    assert (out == 7).all()
    rig.cuda.synchronize(rig.stream)
    assert (out[: 3 * 16 * 2] == 0).all() and (out[3 * 16 * 2 :] == 7).all()


def test_rules_of_shapes_and_addresses_are_enforced() -> None:
    rig = Rig()
    assert not rig.context.execute_async_v3(rig.stream)  # no shape
    assert not rig.context.set_input_shape(ROWS, (65, 16))  # that is the other profile
    assert not rig.context.set_input_shape("gate_proj", (8, 16))
    assert rig.context.set_input_shape(ROWS, (64, 16))
    rig.set_addresses("up_proj")
    assert not rig.context.execute_async_v3(rig.stream)
    assert not rig.context.set_tensor_address("up_proj", rig.addresses["up_proj"] + 64)
    assert not rig.context.set_tensor_address("side_proj", rig.addresses["up_proj"])
    assert rig.context.set_tensor_address("up_proj", rig.addresses["up_proj"])
    assert rig.context.set_optimization_profile_async(1, rig.stream)
    assert not rig.context.execute_async_v3(rig.stream)  # the shape went with the profile
    assert rig.context.set_input_shape(ROWS, (65, 16)) and rig.context.execute_async_v3(rig.stream)
    assert not rig.context.execute_async_v3(rig.cuda.make_stream())
    assert not rig.context.set_optimization_profile_async(2, rig.stream)
    words = " | ".join(rig.log.errors)
    for rule in ("shape of rows is not set", "outside profile 0", "no address for ['up_proj']", "not aligned to 256"):
        assert rule in words


def test_memory_that_is_not_there_is_not_touched() -> None:
    rig = Rig()
    pinned = rig.cuda.pin(100)
    with pytest.raises(AssertionError, match="illegal memory access"):
        rig.cuda.copy_to_device(rig.addresses[ROWS] + (1 << 16) - 50, pinned.view, rig.stream)
    with pytest.raises(AssertionError, match="illegal memory access"):
        rig.cuda.copy_to_device(rig.addresses[ROWS], np.zeros(100, np.uint8), rig.stream)  # not pinned
    with pytest.raises(AssertionError, match="device memory is too small"):
        rig.context.set_device_memory(rig.addresses[ROWS], 10)


def test_the_builder_refuses_what_the_documentation_rules_out() -> None:
    old = TensorRTTwin(__version__="10.3.0")
    with pytest.raises(EngineError, match="the scale must be a constant"):
        build_plan(old, ExpertNetwork(16, 8, "int8"))
    with pytest.raises(ValueError, match="constants are for int4"):
        build_plan(old, ExpertNetwork(16, 8, "int4"))


def test_a_plan_of_another_version_is_not_taken() -> None:
    plan = build_plan(TensorRTTwin(), NETWORK).plan
    other = TensorRTTwin(__version__="10.3.0")
    assert other.Runtime(shared_logger(other)).deserialize_cuda_engine(plan) is None
    assert "was built for" in shared_logger(other).current.errors[-1]
