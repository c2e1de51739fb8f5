"""The network of one expert, through TensorRT's network API: down_proj (silu(gate_proj x) * up_proj x), strongly typed.

TensorRT is handed in as a module, so that `tensorrt` (10.3 to 11) and `tensorrt_rtx` share the code. Rows go in and come out
as float16: a cast inside the network would keep int8 weights from being fused with their product, and all of them would be
dequantised to memory at every call (measured: 249 MB of scratch in place of 20 for a Mixtral expert).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from wdmoe.runtime.errors import EngineError
from wdmoe.runtime.quantised import GROUP, MATRICES, SCALE_SUFFIX, padded

BUILDER_VERSION = 1  # of what this module builds; part of a plan's key
ROWS, OUT = "rows", "out"
SCRATCH_LIMIT = 0.125  # scratch beyond activations and reserve, over the expert's weights in float16
WORKSPACE_BYTES = 512 << 20  # that a tactic may ask for while a plan is built

_ERRORS_KEPT = 20

Precision = Literal["fp16", "int8", "int4"]
Array = npt.NDArray[Any]
Tensors = dict[str, tuple[npt.DTypeLike, tuple[int, ...]]]  # name -> (type, shape)


@dataclass(frozen=True, slots=True)
class TokenRange:
    """The token counts of one optimization profile."""

    least: int
    best: int
    most: int


# Up to 64 tokens an expert is bound by its weights, so that all counts cost about the same; beyond, prompts are read.
TOKEN_RANGES = (TokenRange(1, 8, 64), TokenRange(65, 256, 1024))
MOST_TOKENS = TOKEN_RANGES[-1].most


@dataclass(frozen=True, slots=True)
class ExpertNetwork:
    """What a plan is built for."""

    d_model: int
    d_ff: int
    precision: Precision

    @property
    def row_width(self) -> int:
        """Columns of a row as it goes in: int4 wants whole groups, the columns behind d_model are zeros."""
        return padded(self.d_model, GROUP) if self.precision == "int4" else self.d_model

    @property
    def inner_width(self) -> int:
        """Width between the projections."""
        return padded(self.d_ff, GROUP) if self.precision == "int4" else self.d_ff

    @property
    def fp16_weight_bytes(self) -> int:
        """Size of the expert's weights in float16, whatever they are held as."""
        return 2 * 3 * self.d_model * self.d_ff

    def projections(self) -> dict[str, tuple[int, int]]:
        """Say (out, in) of each matrix, with padding."""
        inner, width = self.inner_width, self.row_width
        return dict(zip(MATRICES, ((inner, width), (inner, width), (self.d_model, inner)), strict=True))

    def weight_tensors(self) -> Tensors:
        """Say how TensorRT takes the weights: inputs of the network with fp16 and int8, constants with int4.

        float16 is taken as it is stored, [out, in]. int8 must be [in, out]: in the other layout TensorRT lays it out anew at
        every call. int4 is [in, out] with two columns a byte, the first in the low nibble.
        """
        tensors: Tensors = {}
        for name, (n_out, n_in) in self.projections().items():
            if self.precision == "fp16":
                tensors[name] = (np.float16, (n_out, n_in))
            elif self.precision == "int8":
                tensors[name] = (np.int8, (n_in, n_out))
                tensors[name + SCALE_SUFFIX] = (np.float16, (n_out,))
            else:
                tensors[name] = (np.uint8, (n_in, n_out // 2))
                tensors[name + SCALE_SUFFIX] = (np.float16, (n_in // GROUP, n_out))
        return tensors

    def activation_bytes(self, tokens: int) -> int:
        """Size of what lies between the projections: gate and up, of which one becomes their product."""
        return 2 * 2 * tokens * self.inner_width


@dataclass(frozen=True, slots=True)
class Scratch:
    """What a plan takes of memory besides weights and rows, for one range of tokens; bytes."""

    scratch_bytes: int
    activation_bytes: int
    fp16_weight_bytes: int
    reserve_bytes: int = 0  # what the kernels set aside whatever the shape

    @property
    def over_weights(self) -> float:
        """What is beyond activations and reserve, over the weights in float16."""
        beyond = self.scratch_bytes - self.activation_bytes - self.reserve_bytes
        return max(0, beyond) / self.fp16_weight_bytes

    @property
    def excessive(self) -> bool:
        """Whether weights must have been copied or dequantised to memory."""
        return self.over_weights > SCRATCH_LIMIT


def references(precision: Precision) -> tuple[ExpertNetwork, ExpertNetwork]:
    """Return two networks whose weights are small, the second with twice as many: what their scratch tells is the reserve."""
    return ExpertNetwork(2048, 128, precision), ExpertNetwork(2048, 256, precision)


def reserve_bytes(precision: Precision, small: Sequence[int], twice: Sequence[int]) -> list[int]:
    """Return what kernels set aside whatever the shape, for each range of tokens.

    It is what is left when weights shrink to nothing: were they copied, the second reference would take the copies twice.

    Args:
        precision: of the references.
        small: scratch of the first reference, for each range of tokens.
        twice: scratch of the second.
    """
    beyond = [
        [size - network.activation_bytes(tokens.most) for size, tokens in zip(sizes, TOKEN_RANGES, strict=True)]
        for network, sizes in zip(references(precision), (small, twice), strict=True)
    ]
    return [max(0, 2 * one - two) for one, two in zip(*beyond, strict=True)]


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What a plan depends on besides its network."""

    workspace_bytes: int | None = WORKSPACE_BYTES  # None: as much as there is
    compute_capability: str | None = None  # of TensorRT-RTX, for a GPU that is not here, for example "SM86"


@dataclass(frozen=True, slots=True)
class Built:
    """A plan, and what the builder learnt."""

    plan: bytes
    timing_cache: bytes
    scratch_bytes: tuple[int, ...]  # for each range of tokens, as the builder says; empty if it does not


@dataclass(slots=True)
class Log:
    """What TensorRT said."""

    errors: list[str] = field(default_factory=list)
    scratch_bytes: list[int] = field(default_factory=list)

    def add(self, is_error: bool, text: str) -> None:
        """Keep what is of use later."""
        if is_error:
            self.errors = [*self.errors[-_ERRORS_KEPT + 1 :], text]
        elif found := re.match(r"Total Activation Memory: (\d+) bytes", text):
            self.scratch_bytes.append(int(found[1]))

    @property
    def last_error(self) -> str:
        """What TensorRT complained about last."""
        return self.errors[-1] if self.errors else "it does not say why"


@cache
def shared_logger(trt: Any) -> Any:
    """Make a logger that hands what is said to its `current` log.

    NOTE: TensorRT keeps the first logger that a process gives it and calls that one for ever: it must never be freed.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.current = Log()

        def log(self, severity: Any, text: str) -> None:
            self.current.add(severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR), text)

    return Logger()


@cache
def shared_runtime(trt: Any) -> Any:
    """Make what reads plans; it must outlive every engine that came of it."""
    return trt.Runtime(shared_logger(trt))


def takes_int8_inputs(trt: Any) -> bool:
    """Say whether int8 weights and their scales may be inputs: from TensorRT 10.13 on, and in TensorRT-RTX."""
    if trt.__name__.startswith("tensorrt_rtx"):
        return True
    major, minor = (int(part) for part in trt.__version__.split(".")[:2])
    return (major, minor) >= (10, 13)


def build_plan(
    trt: Any,
    network: ExpertNetwork,
    constants: Mapping[str, Array] | None = None,
    timing_cache: bytes | None = None,
    options: BuildOptions | None = None,
) -> Built:
    """Build the plan of an expert.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        network: what to build.
        constants: the weights, as `ExpertNetwork.weight_tensors` says, with int4; None with the others.
        timing_cache: of earlier builds on the same machine, empty at first; None: none is kept (TensorRT-RTX has none).
        options: see there.

    Raises:
        EngineError: TensorRT refuses the network.
    """
    options = options or BuildOptions()
    logger = shared_logger(trt)
    log = logger.current = Log()
    builder = trt.Builder(logger)
    # Networks of TensorRT 11 are strongly typed whatever the flags; 10 wants to be told.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    definition = builder.create_network(0 if flag is None else 1 << int(flag))
    _define(trt, definition, network, constants)
    config = builder.create_builder_config()
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.compute_capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, options.compute_capability), 0)
    for tokens in TOKEN_RANGES:
        profile = builder.create_optimization_profile()
        profile.set_shape(ROWS, *((n, network.row_width) for n in (tokens.least, tokens.best, tokens.most)))
        config.add_optimization_profile(profile)
    if timing_cache is not None:
        # A cache that was made elsewhere is not taken; then this build starts from nothing.
        config.set_timing_cache(config.create_timing_cache(timing_cache), ignore_mismatch=False)
    plan = builder.build_serialized_network(definition, config)
    if plan is None:
        raise EngineError(
            f"engine tensorrt: TensorRT {trt.__version__} refuses {_described(network)}: {log.last_error}"
        )
    learnt = config.get_timing_cache() if timing_cache is not None else None
    return Built(
        bytes(plan),
        b"" if learnt is None else bytes(learnt.serialize()),
        tuple(log.scratch_bytes[-len(TOKEN_RANGES) :]),
    )


def _define(trt: Any, definition: Any, network: ExpertNetwork, constants: Mapping[str, Array] | None) -> None:
    """Add the layers of an expert."""
    half = trt.DataType.HALF
    rows = definition.add_input(ROWS, half, (-1, network.row_width))
    tensors = network.weight_tensors()
    if (constants is None) == (network.precision == "int4"):
        raise ValueError(f"constants are for int4 and only for it, this is {network.precision}")

    def given(name: str, dtype: Any, shape: Sequence[int]) -> Any:
        """Return a tensor of weights: an input, or a constant that the caller keeps alive until the plan is built."""
        if constants is None:
            return definition.add_input(name, dtype, tuple(shape))
        array = constants[name]
        if array.dtype != tensors[name][0] or array.shape != tensors[name][1]:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, expected {tensors[name]}")
        weights = trt.Weights(dtype, array.ctypes.data, math.prod(shape))
        return definition.add_constant(tuple(shape), weights).get_output(0)

    def project(values: Any, name: str) -> Any:
        """Multiply values [n, in] by a matrix."""
        n_out, n_in = network.projections()[name]
        if network.precision == "fp16":
            weight, turned = given(name, half, (n_out, n_in)), trt.MatrixOperation.TRANSPOSE
        else:
            integer = trt.DataType.INT8 if network.precision == "int8" else trt.DataType.INT4
            scale = given(name + SCALE_SUFFIX, half, tensors[name + SCALE_SUFFIX][1])
            dequantised = definition.add_dequantize(given(name, integer, (n_in, n_out)), scale, half)
            if network.precision == "int8":
                dequantised.axis = 1  # a scale for each column; with int4, blocks follow from the scales' shape
            weight, turned = dequantised.get_output(0), trt.MatrixOperation.NONE
        return definition.add_matrix_multiply(values, trt.MatrixOperation.NONE, weight, turned).get_output(0)

    def product(left: Any, right: Any) -> Any:
        return definition.add_elementwise(left, right, trt.ElementWiseOperation.PROD).get_output(0)

    gate, up = project(rows, "gate_proj"), project(rows, "up_proj")
    sigmoid = definition.add_activation(gate, trt.ActivationType.SIGMOID).get_output(0)
    out = project(product(product(gate, sigmoid), up), "down_proj")
    out.name = OUT
    definition.mark_output(out)


def _described(network: ExpertNetwork) -> str:
    return f"an expert of {network.d_model} x {network.d_ff} in {network.precision}"
