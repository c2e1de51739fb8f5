"""The base station's stages on a GPU: hidden states, keys and values stay there, between ONNX Runtime and our kernels.

Only what the policies and the sockets need comes to the host: router logits, the choice of experts, and rows for the wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import onnxruntime as ort
import torch

from wdmoe.bs.cuda import INSTALL
from wdmoe.bs.cuda.cutting import NormWeights, cut_stage
from wdmoe.bs.cuda.handoff import HandOff, Norm
from wdmoe.bs.dispatch import PackedRows, Partial
from wdmoe.bs.microbatch import KvCache, Microbatch, Result
from wdmoe.bs.routing import Floats, Ints, route
from wdmoe.bs.stages import Routed, head_result, rope_angles
from wdmoe.runtime.errors import EngineError
from wdmoe.runtime.manifest import BsManifest
from wdmoe.runtime.messages import Wire, pack_rows

Tensor = Any  # torch is not typed here
_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_ONNX_TYPES = {torch.float32: np.float32, torch.int64: np.int64}


@dataclass(frozen=True, slots=True)
class Prepared:
    """What every stage of a microbatch takes, on the GPU."""

    inputs: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Attended:
    """What attention leaves on the GPU; norm and router follow."""

    block: int
    residual: Tensor  # [n, d_model]


@dataclass(frozen=True, slots=True)
class Sums:
    """What the devices answered, not yet added to the residual: that is done with the norm of the next stage."""

    partials: Sequence[Partial]
    lost_share: Floats | None
    shared: Tensor | None  # [n, d_model] on the GPU


class CudaKeys:
    """Keys and values of one sequence on the GPU, for every block; how many are valid, the host's KV cache says."""

    def __init__(self, n_blocks: int, kv_dim: int, torch_device: str) -> None:
        self._both = torch.zeros((2, n_blocks, 0, kv_dim), dtype=torch.float32, device=torch_device)

    def past(self, block: int, length: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the first tokens: [1, length, kv_dim] each."""
        return self._both[0, block, None, :length], self._both[1, block, None, :length]

    def reserve(self, capacity: int) -> None:
        """Make room for tokens; what is held is copied."""
        held = self._both
        if capacity > held.shape[2]:
            self._both = held.new_zeros((2, held.shape[1], capacity, held.shape[3]))
            self._both[:, :, : held.shape[2]] = held

    def store(self, block: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Write one block's keys and values of new tokens, each [new, kv_dim]."""
        self._both[0, block, start : start + len(keys)] = keys
        self._both[1, block, start : start + len(values)] = values


class CudaStages:
    """The stages of a bundle on a GPU; see `StationStages`."""

    on = "cuda"

    def __init__(self, folder: Path, manifest: BsManifest, torch_device: Literal["cuda", "cpu"] = "cuda") -> None:
        """Cut the graphs and load what is left of them.

        Args:
            folder: of the base station.
            manifest: its manifest.
            torch_device: "cpu" does the same on the CPU, the kernels in Triton's interpreter, for tests.

        Raises:
            EngineError: ONNX Runtime cannot run a graph on the GPU.
            BundleError: a graph is not what wdmoe-export makes.
        """
        self._model, self._device = manifest.model, torch_device
        # A stream of our own, for ONNX Runtime takes the default one to mean that it is to make its own.
        self._stream = torch.cuda.Stream() if torch_device == "cuda" else None
        self._run_options = ort.RunOptions()
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)
            self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        cuts = [cut_stage(folder / name) for name in manifest.stages]
        self._sessions = [self._open(cut.graph, folder) for cut in cuts if cut.graph is not None]
        self._shared = [self._open(folder / name, folder) for name in manifest.shared]
        self._head = self._open(folder / manifest.head, folder)
        self._before = [self._norm(cut.before) for cut in cuts]
        self._after = [self._norm(cut.after) for cut in cuts]
        self._routers = [None if cut.router is None else self._tensor(cut.router) for cut in cuts]
        self._factors = [cut.factor for cut in cuts]
        self._hand_off = HandOff(torch_device, self._model.top_k, self._model.norm_top_k)
        self._keys: WeakKeyDictionary[KvCache, CudaKeys] = WeakKeyDictionary()

    def prepare(self, microbatch: Microbatch) -> Prepared:
        """Bring to the GPU what every stage of a microbatch takes."""
        self._enter()
        cos, sin = rope_angles(self._model.rope, microbatch.positions)
        arrays = {"cos": cos, "sin": sin, "mask": microbatch.mask, "lanes": microbatch.lanes, "back": microbatch.back}
        return Prepared({name: self._tensor(array) for name, array in arrays.items()})

    def attend(
        self, block: int, microbatch: Microbatch, prepared: Prepared, residual: Tensor | None, moe_out: Sums | None
    ) -> Attended:
        """Launch the kernels up to the end of attention; returns while they run."""
        self._enter()
        n, cache = len(microbatch.token_ids), microbatch.cache
        if cache is None:
            past = (torch.empty((len(microbatch.lanes), 0, self._model.kv_dim), device=self._device),) * 2
        else:
            past = self._keys_of(cache).past(block, cache.length)
        inputs = prepared.inputs | {"past_key": past[0], "past_value": past[1]}
        if block == 0:
            inputs["token_ids"] = self._tensor(microbatch.token_ids)
        else:
            inputs["summed"], inputs["normed"] = self._summed(block, residual, moe_out)
        widths = {"residual_out": self._model.d_model, "new_key": self._model.kv_dim, "new_value": self._model.kv_dim}
        out = self._run(self._sessions[block], inputs, {name: (n, width) for name, width in widths.items()})
        if cache is not None:
            self._keys_of(cache).store(block, cache.length, out["new_key"], out["new_value"])
        return Attended(block, out["residual_out"])

    def route(self, attended: Attended, owner: Ints, n_devices: int, wire: Wire) -> Routed:
        """Norm, choose experts and pack rows on the GPU; waits until the host has them."""
        self._enter()
        norm, router = self._after[attended.block], self._routers[attended.block]
        assert norm is not None
        packable: Wire = "fp16" if wire == "int8" else wire  # a scale for each row is the host's work
        handed = self._hand_off.route_and_pack(attended.residual, norm, router, owner, n_devices, packable)
        routing, packed = handed.routing, handed.packed
        if packed is None or packed.wire != wire:
            # As on a CPU: what float16 does not hold travels as float32, and what is no number is chosen as there.
            if packed is None:
                routing = route(handed.router_logits, self._model.top_k, self._model.norm_top_k)
            rows = PackedRows(*pack_rows(self.on_host(handed.hidden), wire))
            return Routed(attended.residual, handed.hidden, handed.router_logits, routing, rows)
        return Routed(attended.residual, handed.hidden, handed.router_logits, routing, packed)

    def combine(
        self, n_rows: int, partials: Sequence[Partial], lost_share: Floats | None, shared: Tensor | None
    ) -> Sums:
        """Keep the devices' sums: they are added where the next stage begins."""
        return Sums(partials, lost_share, shared)

    def shared(self, block: int, hidden: Tensor) -> Tensor:
        """Launch the shared expert of a block; returns while it runs."""
        self._enter()
        return self._run(self._shared[block], {"hidden": hidden}, {"shared_out": tuple(hidden.shape)})["shared_out"]

    def finish(self, microbatch: Microbatch, residual: Tensor, moe_out: Sums) -> Result:
        """Add and norm for the last time, and run the head on the rows that are asked for."""
        self._enter()
        _, hidden = self._summed(self._model.n_blocks, residual, moe_out)
        if microbatch.cache is not None:
            microbatch.cache.advance(len(microbatch.token_ids))

        def logits_of(rows: Ints) -> Floats:
            shape = (len(rows), self._model.vocab_size)
            return self.on_host(
                self._run(self._head, {"hidden": hidden[self._tensor(rows)]}, {"logits": shape})["logits"]
            )

        if not len(microbatch.head_rows):
            self.on_host(hidden[:1])  # nobody else waits for the sums to be read
        return head_result(microbatch, logits_of)

    def on_host(self, hidden: Tensor) -> Floats:
        """Copy rows to the host; waits for the GPU."""
        self._enter()
        rows: Floats = hidden.cpu().numpy()
        return rows

    def _enter(self) -> None:
        """Make our stream that of this thread: stages run on whichever thread has the time."""
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)

    def _summed(self, block: int, residual: Tensor | None, moe_out: Sums | None) -> tuple[Tensor, Tensor]:
        norm = self._before[block]
        assert residual is not None and moe_out is not None and norm is not None
        return self._hand_off.combine(
            residual, moe_out.partials, moe_out.lost_share, moe_out.shared, self._factors[block], norm
        )

    def _keys_of(self, cache: KvCache) -> CudaKeys:
        """Return the keys and values that belong to a KV cache; its own arrays stay empty, and take no memory."""
        if (keys := self._keys.get(cache)) is None:
            keys = self._keys[cache] = CudaKeys(self._model.n_blocks, self._model.kv_dim, self._device)
        keys.reserve(cache.capacity)
        return keys

    def _run(self, session: Any, inputs: dict[str, Tensor], outputs: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Run a graph on tensors where they are: bound, not copied."""
        binding = session.io_binding()
        found = {name: torch.empty(shape, dtype=torch.float32, device=self._device) for name, shape in outputs.items()}
        held = [(name, tensor.contiguous()) for name, tensor in inputs.items()]
        for name, tensor in held:
            kind = _ONNX_TYPES[tensor.dtype]
            binding.bind_input(name, self._device, 0, kind, tuple(tensor.shape), tensor.data_ptr())
        for name, tensor in found.items():
            binding.bind_output(name, self._device, 0, np.float32, tuple(tensor.shape), tensor.data_ptr())
        session.run_with_iobinding(binding, self._run_options)
        return found

    def _tensor(self, array: Any) -> Tensor:
        return torch.tensor(array, device=self._device)

    def _norm(self, norm: NormWeights | None) -> Norm | None:
        return None if norm is None else Norm(self._tensor(norm.weight), norm.epsilon)

    def _open(self, graph: Path | bytes, folder: Path) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised below
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder))
        choice: dict[str, str] = {}
        if self._stream is not None:
            with redirect_stdout(StringIO()):  # finds CUDA where pip installed it, and talks about it
                ort.preload_dlls()
            # A node that quietly ran on the CPU would copy its inputs there and back in every layer.
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            # TF32 would leave three digits of float32.
            choice = {"use_tf32": "0", "user_compute_stream": str(self._stream.cuda_stream)}
        name = graph.name if isinstance(graph, Path) else "a stage"
        try:
            return ort.InferenceSession(
                str(graph) if isinstance(graph, Path) else graph,
                options,
                providers=[(_PROVIDERS[self._device], choice)],
            )
        except Exception as error:  # ONNX Runtime's exceptions share no base below Exception
            raise EngineError(
                f"stages on {self._device}: onnxruntime {ort.__version__} refuses {name}: {error}; {INSTALL}"
            ) from error
