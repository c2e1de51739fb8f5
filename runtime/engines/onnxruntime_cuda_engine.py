"""ONNX Runtime on a CUDA GPU: one session for all experts of a slice, their weights bound as inputs that stay on the GPU.

Weights are held as they are stored, so that fp16 takes half of what ONNX Runtime's CPU engine takes. The graph is made here: the
stubs of a bundle are for the CPU and would keep a float32 copy. It computes in float16 with float32 sums, and fp32 bundles in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from wdmoe.runtime.cuda_driver import find_device
from wdmoe.runtime.errors import EngineError
from wdmoe.runtime.manifest import ExpertEntry
from wdmoe.runtime.messages import Rows
from wdmoe.runtime.quantised import GROUP, MATRICES, SCALE_SUFFIX, StoredMatrix, expert_matrices, padded
from wdmoe.runtime.tensor_file import map_tensors

_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
# TF32 would leave three digits of float32.
_PROVIDER_OPTIONS = {"cuda": {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}, "cpu": {}}
_INSTALL = "install it with: pip install 'wdmoe[cuda]', where no onnxruntime without CUDA is installed"
_OPSET = 17
_IR_VERSION = 8
_INT8_BLOCKS = (128, 64, 32, 16)  # weights of a row that MatMulNBits gives a scale; the largest that divides a row

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Matrix:
    """How a matrix [rows, columns] enters the graph."""

    rows: int
    columns: int
    width: int  # columns with padding
    bits: int | None  # of a weight, where it is an integer
    block: int  # weights that share a scale, where it is
    dtype: npt.DTypeLike

    @classmethod
    def of(cls, matrix: StoredMatrix) -> _Matrix:
        """Describe a matrix as it is stored."""
        if matrix.scale is None:
            return cls(matrix.rows, matrix.columns, matrix.columns, None, 0, matrix.stored.dtype)
        if matrix.stored.ndim == 3:
            return cls(matrix.rows, matrix.columns, padded(matrix.columns, GROUP), 4, GROUP, np.uint8)
        width = matrix.stored.shape[1]
        return cls(
            matrix.rows, matrix.columns, width, 8, next(size for size in _INT8_BLOCKS if width % size == 0), np.uint8
        )

    def inputs(self, matrix: StoredMatrix) -> tuple[Array, ...]:
        """Return what is bound for it: the weights, and of integers their scales [rows, blocks]."""
        if matrix.scale is None:
            return (np.ascontiguousarray(matrix.stored),)
        blocks = self.width // self.block
        packed = matrix.stored.reshape(self.rows, blocks, -1)
        scales = matrix.scale.reshape(self.rows, -1)
        return np.ascontiguousarray(packed), np.ascontiguousarray(np.broadcast_to(scales, (self.rows, blocks)))


class OnnxruntimeCudaEngine:
    """Runs experts with ONNX Runtime's CUDA provider, if it really can."""

    name = "onnxruntime-cuda"
    tolerance = (
        5e-3  # float16 between the projections; NOTE: what exceeds 65504 there is infinite, and refused as an answer
    )
    _TOLERANCE_FP32 = 1e-4

    def __init__(
        self, folder: Path, experts: Sequence[ExpertEntry], threads: int, torch_device: Literal["cuda", "cpu"] = "cuda"
    ) -> None:
        """Load experts, and run one.

        Args:
            folder: of the slice.
            experts: what to load.
            threads: not used.
            torch_device: "cpu" does the same on the CPU, for tests.

        Raises:
            EngineError: a library is missing, there is no GPU that it runs on, or the weights do not fit on it.
        """
        try:
            import onnx  # noqa: F401 - makes the graph
            import onnxruntime as ort
        except ImportError as error:
            raise EngineError(f"engine {self.name}: {error}; {_INSTALL}") from error
        if _PROVIDERS[torch_device] not in ort.get_available_providers():
            raise EngineError(f"engine {self.name}: onnxruntime {ort.__version__} is built without CUDA; {_INSTALL}")
        self.version = f"{ort.__version__} ({_PROVIDERS[torch_device]})"
        self._session: Any = None
        self._bindings: dict[tuple[int, int], Any] = {}
        shapes: tuple[_Matrix, ...] = ()
        try:
            for entry in experts:
                path = folder / entry.weights
                matrices = expert_matrices(map_tensors(path), path)
                if self._session is None:
                    shapes = tuple(map(_Matrix.of, matrices))
                    self._session = self._open(shapes, torch_device)
                    if shapes[0].dtype == np.float32:
                        self.tolerance = self._TOLERANCE_FP32
                if tuple(map(_Matrix.of, matrices)) != shapes:
                    raise EngineError(f"engine {self.name}: {path} has another shape or precision than the others")
                self._bindings[entry.block, entry.expert] = self._bind(shapes, matrices, torch_device)
            # The list of providers says what was compiled, not what runs: only a node that ran tells.
            if experts:
                self.run(experts[0].block, experts[0].expert, np.zeros((1, shapes[0].columns), np.float32))
        except EngineError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions share no base below Exception
            raise EngineError(f"engine {self.name}: onnxruntime {ort.__version__} cannot run here: {error}") from error

    @classmethod
    def identity(cls) -> str:
        """Name the library and the GPU; see `wdmoe.runtime.engines.engine_identity`."""
        import onnxruntime as ort

        try:
            gpu = find_device()
        except EngineError:
            return f"{ort.__version__}, no GPU"
        return f"{ort.__version__}, {gpu.name}, driver for CUDA {gpu.driver}"

    def run(self, block: int, expert: int, rows: Rows) -> Rows:
        """Run one expert on rows; see `ExpertEngine`."""
        binding = self._bindings[block, expert]
        binding.bind_cpu_input("rows", np.ascontiguousarray(rows))
        binding.bind_output("out", "cpu")
        self._session.run_with_iobinding(binding)
        result: Rows = binding.get_outputs()[0].numpy()
        return result

    def _open(self, shapes: Sequence[_Matrix], torch_device: str) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised below
        if torch_device != "cpu":
            if hasattr(ort, "preload_dlls"):  # finds CUDA where pip installed it
                with redirect_stdout(StringIO()):  # says what it does not find, which the session says as well
                    ort.preload_dlls()
            # A node that quietly ran on the CPU would copy its weights there at every call.
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        provider = _PROVIDERS[torch_device]
        providers = [(provider, _PROVIDER_OPTIONS[torch_device])]
        session = ort.InferenceSession(expert_model(shapes), options, providers=providers)
        if session.get_providers()[0] != provider:
            raise EngineError(f"engine {self.name}: {provider} cannot be loaded (CUDA or cuDNN is missing, or no GPU)")
        return session

    def _bind(self, shapes: Sequence[_Matrix], matrices: Sequence[StoredMatrix], torch_device: str) -> Any:
        import onnxruntime as ort

        binding = self._session.io_binding()
        for name, shape, matrix in zip(MATRICES, shapes, matrices, strict=True):
            for suffix, array in zip(("", SCALE_SUFFIX), shape.inputs(matrix), strict=False):
                binding.bind_ortvalue_input(
                    name + suffix, ort.OrtValue.ortvalue_from_numpy(array.view(np.ndarray), torch_device, 0)
                )
        return binding


def expert_model(shapes: Sequence[_Matrix]) -> bytes:
    """Make the graph of an expert whose weights are inputs.

    Args:
        shapes: of gate, up and down projection.
    """
    from onnx import TensorProto, helper

    gate = shapes[0]
    computed = TensorProto.FLOAT if gate.dtype == np.float32 else TensorProto.FLOAT16
    nodes: list[Any] = [helper.make_node("Cast", ["rows"], ["in"], to=computed)]
    inputs = [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n", gate.columns])]
    constants: list[Any] = []

    def project(source: str, name: str, shape: _Matrix, target: str) -> None:
        if shape.bits is None:
            inputs.append(helper.make_tensor_value_info(name, computed, [shape.rows, shape.columns]))
            nodes.append(helper.make_node("Gemm", [source, name], [target], transB=1))
            return
        blocks = shape.width // shape.block
        packed = [shape.rows, blocks, shape.block * shape.bits // 8]
        inputs.append(helper.make_tensor_value_info(name, TensorProto.UINT8, packed))
        inputs.append(helper.make_tensor_value_info(name + SCALE_SUFFIX, computed, [shape.rows, blocks]))
        if shape.width > shape.columns:
            pads = [0, 0, 0, shape.width - shape.columns]
            constants.append(helper.make_tensor(f"{name}_pads", TensorProto.INT64, [4], pads))
            nodes.append(helper.make_node("Pad", [source, f"{name}_pads"], [f"{name}_rows"]))
            source = f"{name}_rows"
        nodes.append(helper.make_node(
            "MatMulNBits", [source, name, name + SCALE_SUFFIX], [target], domain="com.microsoft",
            K=shape.width, N=shape.rows, bits=shape.bits, block_size=shape.block,
        ))  # fmt: skip

    project("in", MATRICES[0], shapes[0], "gate")
    project("in", MATRICES[1], shapes[1], "up")
    nodes += [
        helper.make_node("Sigmoid", ["gate"], ["gate_sigmoid"]),
        helper.make_node("Mul", ["gate", "gate_sigmoid"], ["gate_silu"]),
        helper.make_node("Mul", ["gate_silu", "up"], ["inner"]),
    ]
    project("inner", MATRICES[2], shapes[2], "down")
    nodes.append(helper.make_node("Cast", ["down"], ["out"], to=TensorProto.FLOAT))
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", shapes[2].rows])]
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "expert", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="wdmoe")
    serialised: bytes = model.SerializeToString()
    return serialised
