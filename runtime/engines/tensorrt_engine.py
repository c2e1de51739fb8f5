"""TensorRT, on a Jetson: weights resident on the GPU, one plan for all experts (fp16, int8) or one for each (int4).

Plans are built on the device by `prepare` (see `tensorrt_plans`); an expert of fp16 or int8 is a few addresses in one buffer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from wdmoe.runtime.cuda_driver import ALIGNMENT_BYTES, Bytes, Cuda, CudaDriver
from wdmoe.runtime.engines.numpy_engine import NumpyEngine
from wdmoe.runtime.engines.tensorrt_network import (
    MOST_TOKENS,
    OUT,
    ROWS,
    TOKEN_RANGES,
    ExpertNetwork,
    shared_logger,
    takes_int8_inputs,
)
from wdmoe.runtime.engines.tensorrt_plans import PlanStore, World, plans_of
from wdmoe.runtime.engines.tensorrt_weights import PIECE_BYTES, stored_network, weight_pieces
from wdmoe.runtime.errors import EngineError
from wdmoe.runtime.manifest import ExpertEntry
from wdmoe.runtime.memory import available_memory_bytes, forget_pages
from wdmoe.runtime.messages import Rows
from wdmoe.runtime.quantised import padded

_L4T_RELEASE = Path("/etc/nv_tegra_release")
_HALF_BYTES = 2
_PROBE_TOKENS = (1, 3, 70)  # of both profiles

Addresses = dict[str, int]  # tensor -> where it is


class TensorrtEngine:
    """Runs experts with TensorRT."""

    name = "tensorrt"
    # Rows, gate, up and their product are rounded to float16, and sums may be kept in it.
    tolerance = 1e-2

    @classmethod
    def open_world(cls) -> World:
        """Find TensorRT and the GPU.

        Raises:
            ImportError: TensorRT is not installed.
            EngineError: there is no GPU.
        """
        try:
            import tensorrt
        except OSError as error:  # the module is there, a shared library of it is not
            raise EngineError(f"engine tensorrt: {error}; see `wdmoe-device info`") from error
        l4t = _L4T_RELEASE.read_text(errors="replace").partition("\n")[0] if _L4T_RELEASE.exists() else ""
        return World(tensorrt, CudaDriver(), l4t)

    @classmethod
    def identity(cls) -> str:
        """Name library and machine; see `wdmoe.runtime.engines.engine_identity`."""
        return repr(sorted(cls.open_world().key.items()))

    @classmethod
    def prepare(cls, folder: Path, experts: Sequence[ExpertEntry], say: Callable[[str], None]) -> None:
        """Build what the slice needs and is not there.

        Raises:
            ImportError: TensorRT is not installed.
            EngineError: it cannot serve this slice.
        """
        world = cls.open_world()
        store, network = PlanStore(world, folder), stored_network(folder, experts)
        with store.lock(say):
            cls._prepare(world, store, network, experts, say)

    @classmethod
    def _prepare(
        cls,
        world: World,
        store: PlanStore,
        network: ExpertNetwork,
        experts: Sequence[ExpertEntry],
        say: Callable[[str], None],
    ) -> None:
        if network.precision == "int8":
            reason = _no_int8(world) or cls._try_int8(store, experts, say)
            if not reason:
                return
            say(f"engine tensorrt: serves int8 as float16, in twice the memory: {reason}")
            network = replace(network, precision="fp16")
        store.prepare(plans_of(network, experts), say)

    @classmethod
    def _try_int8(cls, store: PlanStore, experts: Sequence[ExpertEntry], say: Callable[[str], None]) -> str:
        """Build the int8 plan and compare one expert with numpy; return why int8 cannot be used, "" if it can.

        There are reports of int8 plans that do not build on Orin: what TensorRT says it can do is not enough.
        """
        network = stored_network(store.folder, experts)
        (plan,) = plans_of(network, experts)
        if known := store.probed(plan):
            return known
        try:
            store.prepare([plan], say)
            if known is None:
                cls._probe(store.folder, experts[:1], network)
                store.keep_probe(plan, "")
        except EngineError as error:
            store.keep_probe(plan, str(error))
            return str(error)
        return ""

    @classmethod
    def _probe(cls, folder: Path, experts: Sequence[ExpertEntry], network: ExpertNetwork) -> None:
        engine, oracle = cls(folder, experts, 1, network), NumpyEngine(folder, experts, 1)
        for tokens in _PROBE_TOKENS:
            rows = np.random.default_rng(tokens).standard_normal((tokens, network.d_model), np.float32)
            expected = oracle.run(experts[0].block, experts[0].expert, rows)
            got = engine.run(experts[0].block, experts[0].expert, rows)
            error = float(np.abs(got - expected).max() / np.abs(expected).max())
            if not error <= cls.tolerance:
                raise EngineError(f"the probe of int8 is off by {error:.1e} at {tokens} tokens")

    def __init__(
        self, folder: Path, experts: Sequence[ExpertEntry], threads: int, network: ExpertNetwork | None = None
    ) -> None:
        """Load experts whose plans `prepare` has built.

        Args:
            folder: of the slice.
            experts: what to load.
            threads: not used.
            network: what to serve them with; None: what `prepare` found.

        Raises:
            ImportError: TensorRT is not installed.
            EngineError: the plans are not there, or the weights do not fit into memory.
        """
        world = self.open_world()
        store, stored = PlanStore(world, folder), stored_network(folder, experts)
        if (
            network is None
            and stored.precision == "int8"
            and (_no_int8(world) or store.probed(plans_of(stored, experts)[0]) != "")
        ):
            stored = replace(stored, precision="fp16")
        network = network or stored
        self.version = f"{world.trt.__version__} ({network.precision})"
        self._cuda, self._network = world.cuda, network
        self._memory = _Memory(world.cuda)
        weakref.finalize(self, self._memory.close).atexit = False
        _check_room(world.cuda, network, len(experts))
        engines = [store.load(plan) for plan in plans_of(network, experts)]
        scratch_bytes = max(
            max(*store.scratch_bytes(engine), getattr(engine, "device_memory_size_v2", 0)) for engine in engines
        )
        # Experts run one after another: all contexts share one scratch, where each would allocate its own.
        scratch = self._memory.allocate(max(scratch_bytes, 1))
        self._contexts: dict[tuple[int, int], _Context] = {}
        shared = [_Context(world.trt, engine, scratch, scratch_bytes) for engine in engines]
        for number, entry in enumerate(experts):
            self._contexts[entry.block, entry.expert] = shared[number if len(shared) > 1 else 0]
        self._stream = self._memory.stream
        self._weights = self._load_weights(folder, experts) if network.precision != "int4" else {}
        self._rows_in = self._memory.pin(MOST_TOKENS * network.row_width * _HALF_BYTES)
        self._rows_out = self._memory.pin(MOST_TOKENS * network.d_model * _HALF_BYTES)
        # On a Jetson the GPU reads pinned memory where it is; elsewhere rows are copied to memory of its own.
        self._copies = not world.cuda.device.integrated
        self._addresses = {ROWS: self._rows_in.device_address, OUT: self._rows_out.device_address}
        if self._copies:
            pairs = ((ROWS, self._rows_in), (OUT, self._rows_out))
            self._addresses = {name: self._memory.allocate(pinned.view.nbytes) for name, pinned in pairs}

    def run(self, block: int, expert: int, rows: Rows) -> Rows:
        """Run one expert on rows; see `ExpertEngine`.

        Raises:
            EngineError: a value is beyond float16.
        """
        self._cuda.make_current()
        out = np.empty(rows.shape, np.float32)
        for start in range(0, len(rows), MOST_TOKENS):
            part = slice(start, start + MOST_TOKENS)
            self._run(block, expert, rows[part], out[part])
        if not np.isfinite(out).all():
            raise EngineError(
                f"engine tensorrt: expert {expert} of block {block} came to a value that float16 cannot hold; "
                "serve this slice with --engine onnxruntime"
            )
        return out

    def _run(self, block: int, expert: int, rows: Rows, out: Rows) -> None:
        count, network = len(rows), self._network
        staged = self._rows_in.view[: count * network.row_width * _HALF_BYTES]
        halves = staged.view(np.float16).reshape(count, network.row_width)
        with np.errstate(over="ignore"):  # becomes inf, and is found in the answer
            halves[:, : network.d_model] = rows
        halves[:, network.d_model :] = 0
        if self._copies:
            self._cuda.copy_to_device(self._addresses[ROWS], staged, self._stream)
        addresses = {**self._addresses, **self._weights.get((block, expert), {})}
        self._contexts[block, expert].execute((count, network.row_width), addresses, self._stream)
        answered = self._rows_out.view[: count * network.d_model * _HALF_BYTES]
        if self._copies:
            self._cuda.copy_to_host(answered, self._addresses[OUT], self._stream)
        self._cuda.synchronize(self._stream)
        out[:] = answered.view(np.float16).reshape(count, network.d_model)

    def _load_weights(self, folder: Path, experts: Sequence[ExpertEntry]) -> dict[tuple[int, int], Addresses]:
        """Copy weights from their files to where they stay; on the way is a buffer of a few MiB, never a whole expert.

        Memory of `cuMemAlloc`, on a Jetson as elsewhere: the GPU caches it, and neither mapped host memory (not cached by
        the GPU on Tegra) nor managed memory (looked after at every launch) is that.
        """
        tensors = self._network.weight_tensors()
        offsets: Addresses = {}
        size = 0
        for name, (dtype, shape) in tensors.items():
            offsets[name] = size
            size += padded(int(np.prod(shape)) * np.dtype(dtype).itemsize, ALIGNMENT_BYTES)
        stage = self._cuda.pin(PIECE_BYTES)
        weights: dict[tuple[int, int], Addresses] = {}
        try:
            for entry in experts:
                base, path = self._memory.allocate(size), folder / entry.weights
                weights[entry.block, entry.expert] = {name: base + offset for name, offset in offsets.items()}
                for name, offset, piece in weight_pieces(path, self._network):
                    self._upload(base + offsets[name] + offset, piece, stage.view)
                forget_pages(path)
        finally:
            self._cuda.unpin(stage)
        return weights

    def _upload(self, address: int, piece: Bytes, stage: Bytes) -> None:
        for start in range(0, len(piece), len(stage)):
            part = piece[start : start + len(stage)]
            stage[: len(part)] = part
            self._cuda.copy_to_device(address + start, stage[: len(part)], self._stream)
            self._cuda.synchronize(self._stream)  # before the stage is used again


@dataclass(slots=True)
class _Memory:
    """What an engine took of the GPU, to be given back together."""

    cuda: Cuda
    stream: int = field(init=False)
    _addresses: list[int] = field(default_factory=list)
    _pinned: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cuda.make_current()
        self.stream = self.cuda.make_stream()

    def allocate(self, size_bytes: int) -> int:
        """Take memory of the device."""
        self._addresses.append(self.cuda.allocate(size_bytes))
        return self._addresses[-1]

    def pin(self, size_bytes: int) -> Any:
        """Take pinned memory."""
        self._pinned.append(self.cuda.pin(size_bytes))
        return self._pinned[-1]

    def close(self) -> None:
        """Give everything back."""
        self.cuda.make_current()
        for address in self._addresses:
            self.cuda.free(address)
        for pinned in self._pinned:
            self.cuda.unpin(pinned)
        self.cuda.destroy_stream(self.stream)


class _Context:
    """One execution context; remembers its profile, for a change costs a call."""

    def __init__(self, trt: Any, engine: Any, scratch: int, scratch_bytes: int) -> None:
        self._engine, self._logger = engine, shared_logger(trt)
        self._context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._context is None:
            raise EngineError("engine tensorrt: no execution context; out of memory?")
        if hasattr(self._context, "set_device_memory"):
            self._context.set_device_memory(scratch, scratch_bytes)
        else:
            self._context.device_memory = scratch
        self._profile = 0

    def execute(self, shape: tuple[int, int], addresses: Addresses, stream: int) -> None:
        """Queue one call: rows of this shape, tensors at these addresses."""
        wanted = next(index for index, tokens in enumerate(TOKEN_RANGES) if shape[0] <= tokens.most)
        done = True
        if wanted != self._profile and (done := self._context.set_optimization_profile_async(wanted, stream)):
            self._profile = wanted
        done = done and self._context.set_input_shape(ROWS, shape)
        for name, address in addresses.items():
            done = done and self._context.set_tensor_address(name, address)
        if not (done and self._context.execute_async_v3(stream)):
            said = self._logger.current.last_error
            raise EngineError(f"engine tensorrt: TensorRT did not run {shape[0]} tokens: {said}")


def _no_int8(world: World) -> str | None:
    if takes_int8_inputs(world.trt):
        return None
    return f"TensorRT {world.trt.__version__} takes int8 scales only as constants (10.13 is the first that does not)"


def _check_room(cuda: Cuda, network: ExpertNetwork, n_experts: int) -> None:
    """Refuse what does not fit before anything is loaded."""
    each = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for dtype, shape in network.weight_tensors().values())
    free = cuda.free_bytes()
    if cuda.device.integrated:  # what the system would give back counts as well, and CUDA does not count it
        free = max(free, available_memory_bytes() or 0)
    if n_experts * each > free:
        raise EngineError(
            f"engine tensorrt: {n_experts} experts in {network.precision} take {n_experts * each / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free"
        )
