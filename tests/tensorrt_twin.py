"""TensorRT in memory: the calls that the engine makes, the rules that their documentation states, the right answers.

A broken rule makes the call fail as the real one does, with a line in the log.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import json
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda_twin import MemoryCuda

from wdmoe.runtime.cuda_driver import ALIGNMENT_BYTES
from wdmoe.runtime.engines.tensorrt_engine import TensorrtEngine
from wdmoe.runtime.engines.tensorrt_plans import World

Array = npt.NDArray[Any]


class _Value:
    """A tensor of a network."""

    def __init__(self, number: int, dtype: DataType, shape: tuple[int, ...], constant: bool) -> None:
        self.number, self.dtype, self.shape, self.constant = number, dtype, shape, constant
        self.name = ""


class _Layer:
    def __init__(self, output: _Value, operation: dict[str, Any]) -> None:
        self._output, self._operation = output, operation

    def get_output(self, index: int) -> _Value:
        assert index == 0
        return self._output

    @property
    def axis(self) -> int:
        return int(self._operation["axis"])

    @axis.setter
    def axis(self, axis: int) -> None:
        self._operation["axis"] = axis


class DataType(Enum):
    FLOAT, HALF, INT8, INT4 = "float32", "float16", "int8", "int4"


class MatrixOperation(Enum):
    NONE, TRANSPOSE = "none", "transpose"


class ElementWiseOperation(Enum):
    PROD = "prod"


class ActivationType(Enum):
    SIGMOID = "sigmoid"


class NetworkDefinitionCreationFlag(IntEnum):
    EXPLICIT_BATCH, STRONGLY_TYPED = 0, 1


class MemoryPoolType(Enum):
    WORKSPACE = "workspace"


class ExecutionContextAllocationStrategy(Enum):
    STATIC, USER_MANAGED = 0, 2


class _Severity(Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = _Severity

    def __init__(self) -> None:
        pass

    def log(self, severity: Any, text: str) -> None:
        raise NotImplementedError


@dataclass
class Weights:
    """Values that the caller keeps alive; read when the plan is built."""

    dtype: DataType
    address: int
    count: int

    def read(self, shape: tuple[int, ...]) -> Array:
        size = self.count // 2 if self.dtype is DataType.INT4 else self.count * np.dtype(self.dtype.value).itemsize
        raw = np.array(np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address)))
        if self.dtype is DataType.INT4:
            nibbles = np.stack([raw & 15, raw >> 4], axis=1).reshape(-1).astype(np.int8)
            signed: Array = np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.float32)
            return signed.reshape(shape)
        values: Array = raw.view(self.dtype.value).astype(np.float32)
        return values.reshape(shape)


class _Network:
    def __init__(self, twin: TensorRTTwin, flags: int) -> None:
        self.twin, self.typed = twin, bool(flags & 2) or twin.version >= (11, 0)
        self.operations: list[dict[str, Any]] = []
        self.inputs: dict[str, _Value] = {}
        self.outputs: list[_Value] = []
        self.problem: str | None = None

    def add_input(self, name: str, dtype: DataType, shape: tuple[int, ...]) -> _Value:
        assert name not in self.inputs, "each tensor must have a unique name"
        value = self._value({"do": "input", "name": name}, dtype, shape, False)
        self.inputs[name] = value
        return value

    def add_constant(self, shape: tuple[int, ...], weights: Weights) -> _Layer:
        assert weights.count == int(np.prod(shape))
        values = weights.read(shape).astype("<f4")
        operation = {"do": "constant", "shape": shape, "values": base64.b64encode(values.tobytes()).decode()}
        return self._layer(operation, weights.dtype, shape, True)

    def add_matrix_multiply(self, a: _Value, op_a: MatrixOperation, b: _Value, op_b: MatrixOperation) -> _Layer:
        if (a.dtype, b.dtype) != (DataType.HALF, DataType.HALF):
            self.problem = f"matrix multiply of {a.dtype} and {b.dtype} in a strongly typed network"
        turned = op_b is MatrixOperation.TRANSPOSE
        n_in, n_out = b.shape[::-1] if turned else b.shape
        if a.shape[1] != n_in or op_a is not MatrixOperation.NONE:
            self.problem = f"matrix multiply of {a.shape} and {b.shape}"
        operation = {"do": "multiply", "of": [a.number, b.number], "turned": turned}
        return self._layer(operation, DataType.HALF, (a.shape[0], n_out), False)

    def add_dequantize(self, value: _Value, scale: _Value, dtype: DataType) -> _Layer:
        if not scale.constant and (value.dtype is DataType.INT4 or self.twin.version < (10, 13)):
            self.problem = "the scale must be a constant"
        if value.dtype is DataType.INT4 and not value.constant:
            self.problem = "INT4 must be a constant"
        if value.dtype is DataType.INT4 and scale.shape != (value.shape[0] // 128, value.shape[1]):
            self.problem = f"blocks of {value.shape} by scales {scale.shape}"
        operation = {"do": "dequantize", "of": [value.number, scale.number], "axis": 0}
        return self._layer(operation, dtype, value.shape, False)

    def add_elementwise(self, a: _Value, b: _Value, operation: ElementWiseOperation) -> _Layer:
        assert operation is ElementWiseOperation.PROD and a.shape == b.shape
        return self._layer({"do": "product", "of": [a.number, b.number], "width": a.shape[1]}, a.dtype, a.shape, False)

    def add_activation(self, value: _Value, kind: ActivationType) -> _Layer:
        assert kind is ActivationType.SIGMOID
        return self._layer({"do": "sigmoid", "of": [value.number]}, value.dtype, value.shape, False)

    def mark_output(self, value: _Value) -> None:
        self.outputs.append(value)

    def _value(self, operation: dict[str, Any], dtype: DataType, shape: tuple[int, ...], constant: bool) -> _Value:
        self.operations.append(operation)
        return _Value(len(self.operations) - 1, dtype, shape, constant)

    def _layer(self, operation: dict[str, Any], dtype: DataType, shape: tuple[int, ...], constant: bool) -> _Layer:
        return _Layer(self._value(operation, dtype, shape, constant), operation)


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(self, name: str, least: Any, best: Any, most: Any) -> None:
        assert all(a <= b <= c for a, b, c in zip(least, best, most, strict=True))
        self.shapes[name] = [least, best, most]


class _TimingCache:
    def __init__(self, content: bytes) -> None:
        self.known: dict[str, Any] = json.loads(content) if content else {"timed": []}

    def serialize(self) -> bytes:
        return json.dumps(self.known).encode()


class _Config:
    def __init__(self) -> None:
        self.profiles: list[_Profile] = []
        self.cache: _TimingCache | None = None
        self.pools: dict[MemoryPoolType, int] = {}

    def set_memory_pool_limit(self, pool: MemoryPoolType, size_bytes: int) -> None:
        self.pools[pool] = size_bytes

    def add_optimization_profile(self, profile: _Profile) -> None:
        self.profiles.append(profile)

    def create_timing_cache(self, content: bytes) -> _TimingCache:
        return _TimingCache(content)

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return True

    def get_timing_cache(self) -> _TimingCache | None:
        return self.cache


class _Builder:
    def __init__(self, twin: TensorRTTwin, logger: ILogger) -> None:
        self._twin, self._logger = twin, logger

    def create_network(self, flags: int) -> _Network:
        return _Network(self._twin, flags)

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
        twin = self._twin
        problem = network.problem or (None if network.typed else "the network is not strongly typed")
        if twin.refuses and any(value.dtype.value == twin.refuses for value in network.inputs.values()):
            problem = f"could not find any implementation for {twin.refuses}"
        dynamic = {name for name, value in network.inputs.items() if -1 in value.shape}
        if any(set(profile.shapes) != dynamic for profile in config.profiles) or not config.profiles:
            problem = "a dynamic input has no profile"
        if problem is not None:
            self._logger.log(ILogger.Severity.ERROR, problem)
            return None
        shape = str([(name, value.dtype.value, value.shape) for name, value in network.inputs.items()])
        known = config.cache.known["timed"] if config.cache is not None else []
        if shape not in known:
            known.append(shape)
            twin.timed += 1
        twin.built += 1
        plan = {
            "for": [twin.__version__, twin.cuda.device.name],
            "inputs": {name: [value.dtype.value, value.shape] for name, value in network.inputs.items()},
            "outputs": {value.name: value.number for value in network.outputs},
            "profiles": [profile.shapes for profile in config.profiles],
            "operations": network.operations,
        }
        return json.dumps(plan).encode()


class _Engine:
    def __init__(self, twin: TensorRTTwin, plan: dict[str, Any], logger: ILogger) -> None:
        self.twin, self.plan, self.logger = twin, plan, logger

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        most = self.plan["profiles"][index]["rows"][2][0]
        inner = max(operation["width"] for operation in self.plan["operations"] if operation["do"] == "product")
        copied = sum(int(np.prod(shape)) * 2 for name, (_, shape) in self.plan["inputs"].items() if name != "rows")
        return int(most) * int(inner) * 4 + self.twin.reserve_bytes + (copied if self.twin.copies_weights else 0)

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> _Context:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return _Context(self)


class _Context:
    """Executes on one stream at a time."""

    def __init__(self, engine: _Engine) -> None:
        self._engine, self._cuda = engine, engine.twin.cuda
        self._profile = 0
        self._shape: tuple[int, ...] | None = None
        self._addresses: dict[str, int] = {}
        self._has_memory = False
        self._busy_on: int | None = None

    def set_device_memory(self, address: int, size_bytes: int) -> None:
        sizes = [
            self._engine.get_device_memory_size_for_profile_v2(index)
            for index in range(len(self._engine.plan["profiles"]))
        ]
        assert size_bytes >= max(sizes), "device memory is too small for this engine"
        assert address % ALIGNMENT_BYTES == 0
        self._cuda.view(address, size_bytes, self._cuda.device_memory)
        self._has_memory = True

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if not 0 <= index < len(self._engine.plan["profiles"]) or stream not in self._cuda.queues:
            return self._fail(f"no profile {index}")
        self._profile, self._shape = index, None  # shapes are forgotten with the profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        ranges = self._engine.plan["profiles"][self._profile].get(name)
        if ranges is None:
            return self._fail(f"{name} is no dynamic input")
        least, _, most = ranges
        if not all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
            return self._fail(f"shape {shape} of {name} is outside profile {self._profile}")
        self._shape = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in {*self._engine.plan["inputs"], *self._engine.plan["outputs"]}:
            return self._fail(f"no tensor {name}")
        if address % ALIGNMENT_BYTES:
            return self._fail(f"address {address:#x} of {name} is not aligned to 256 bytes")
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        plan = self._engine.plan
        assert stream in self._cuda.queues, "not a stream that was made; the default one synchronises the device"
        assert self._has_memory, "no device memory was set"
        if self._busy_on not in (None, stream):
            return self._fail("one context on two streams at a time")
        if self._shape is None:
            return self._fail("the shape of rows is not set")
        if unset := {*plan["inputs"], *plan["outputs"]} - set(self._addresses):
            return self._fail(f"no address for {sorted(unset)}")
        addresses, shape = dict(self._addresses), self._shape
        self._busy_on = stream

        def work() -> None:
            self._busy_on = None
            self._compute(addresses, shape)

        self._cuda.queues[stream].append(work)
        return True

    def _compute(self, addresses: dict[str, int], shape: tuple[int, ...]) -> None:
        plan = self._engine.plan
        values: list[Array] = []
        for operation in plan["operations"]:
            values.append(self._value(operation, values, addresses, shape))
        for name, number in plan["outputs"].items():
            half = values[number].astype(np.float16)
            target = self._cuda.view(addresses[name], half.nbytes)
            target[:] = np.ascontiguousarray(half).view(np.uint8).reshape(-1)

    def _value(
        self, operation: dict[str, Any], values: list[Array], addresses: dict[str, int], shape: tuple[int, ...]
    ) -> Array:
        of = [values[number] for number in operation.get("of", ())]
        with np.errstate(over="ignore", invalid="ignore"):
            match operation["do"]:
                case "input":
                    name = operation["name"]
                    dtype, declared = self._engine.plan["inputs"][name]
                    size = shape if name == "rows" else tuple(declared)
                    raw = self._cuda.view(addresses[name], int(np.prod(size)) * np.dtype(dtype).itemsize)
                    typed: Array = raw.view(dtype).reshape(size)
                    return typed.astype(np.float32)
                case "constant":
                    raw_constant = np.frombuffer(base64.b64decode(operation["values"]), "<f4")
                    return raw_constant.reshape(operation["shape"])
                case "dequantize":
                    value, scale = of
                    if scale.ndim == 2:
                        return _half(value * np.repeat(scale, 128, axis=0))
                    return _half(value * (scale[None, :] if operation["axis"] == 1 else scale[:, None]))
                case "multiply":
                    return _half(of[0] @ (of[1].T if operation["turned"] else of[1]))
                case "product":
                    return _half(of[0] * of[1])
                case "sigmoid":
                    return _half(1 / (1 + np.exp(-of[0])))
                case other:
                    raise AssertionError(other)

    def _fail(self, text: str) -> bool:
        self._engine.logger.log(ILogger.Severity.ERROR, text)
        return False


def _half(values: Array) -> Array:
    return values.astype(np.float16).astype(np.float32)


class _Runtime:
    def __init__(self, twin: TensorRTTwin, logger: ILogger) -> None:
        self._twin, self._logger = twin, logger

    def deserialize_cuda_engine(self, content: Any) -> _Engine | None:
        try:
            plan = json.loads(bytes(content))
        except ValueError:
            self._logger.log(ILogger.Severity.ERROR, "the plan is damaged")
            return None
        if plan["for"] != [self._twin.__version__, self._twin.cuda.device.name]:
            self._logger.log(ILogger.Severity.ERROR, f"the plan was built for {plan['for']}")
            return None
        return _Engine(self._twin, plan, self._logger)


@dataclass(eq=False)
class TensorRTTwin:
    """The module `tensorrt`; its fields are what a test may look at and what may go wrong."""

    cuda: MemoryCuda = field(default_factory=MemoryCuda)
    __version__: str = "10.16.2.10"
    refuses: str = ""  # a type of inputs that no kernel takes
    copies_weights: bool = False  # every call lays weights out anew
    reserve_bytes: int = 0  # scratch of kernels whatever the shape
    built: int = 0
    timed: int = 0  # layers whose tactics were timed because no cache knew them

    __name__ = "tensorrt"
    DataType = DataType
    MatrixOperation = MatrixOperation
    ElementWiseOperation = ElementWiseOperation
    ActivationType = ActivationType
    NetworkDefinitionCreationFlag = NetworkDefinitionCreationFlag
    MemoryPoolType = MemoryPoolType
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    ILogger = ILogger
    Weights = Weights

    @property
    def version(self) -> tuple[int, int]:
        major, minor = self.__version__.split(".")[:2]
        return int(major), int(minor)

    def Builder(self, logger: Any) -> _Builder:  # noqa: N802 - the library's name
        return _Builder(self, logger)

    def Runtime(self, logger: Any) -> _Runtime:  # noqa: N802
        return _Runtime(self, logger)


def rewrap(path: Path, content: bytes) -> None:
    """Put other content into a file of `engines/` under its own key, so that nothing but the answers can tell."""
    header = json.loads(path.read_bytes().partition(b"\n")[0])
    header |= {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_bytes(json.dumps(header).encode() + b"\n" + content)


def swap_plans(folder: Path) -> None:
    """Give the first expert of a slice the plan of the second."""
    mine, other = sorted((folder / "engines").glob("*.plan"))[:2]
    rewrap(mine, other.read_bytes().partition(b"\n")[2])


class TwinEngine(TensorrtEngine):
    """The engine in a world of this module; `twin` is the world's."""

    twin = TensorRTTwin()

    @classmethod
    def open_world(cls) -> World:
        cls.twin.cuda.make_current()
        return World(cls.twin, cls.twin.cuda, "# R36 (release), REVISION: 4.7")
