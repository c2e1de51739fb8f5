"""From the residual on the GPU to packed rows in the host's memory, and from the devices' sums to the next residual."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from wdmoe.bs.cuda.kernels import combine_kernel, pack_kernel, route_kernel
from wdmoe.bs.dispatch import Partial
from wdmoe.bs.routing import Floats, Ints, Routing
from wdmoe.runtime.errors import EngineError
from wdmoe.runtime.messages import Wire

Tensor = Any  # torch is not typed here
_GPU_WAIT_S = 60.0  # as long as a worker waits for a job: a stage of 8,192 rows takes far less
_POLLED_S = 2e-3  # from then on the wait is a long one, and the processor is left to others
_FEW_ROWS = 256
_SHARED_ROWS, _CHUNK, _COUNTED_ROWS, _LEAST_EXPERTS = 16, 64, 128, 16
_WIRE_TYPES = {"fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Norm:
    """A root-mean-square norm: weights [d_model] float32 on the GPU, and epsilon."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True, slots=True)
class PackedByDevice:
    """Rows in the host's memory, for each device those that the model's own choice sends there.

    The memory is given back when nobody holds a row any more, be it a socket that has not sent it yet.
    """

    rows: npt.NDArray[Any]  # [pairs, d_model] as they travel
    places: Ints  # [n_devices, n], where each row of the microbatch lies for each device; -1: nowhere
    wire: Wire

    def of(self, device: int, wanted: Ints) -> npt.NDArray[Any]:
        """Return rows of the microbatch for a device; a copy only where a plan leaves rows out or sends others.

        Args:
            device: which.
            wanted: [m] rows of the microbatch, ascending.
        """
        at = self.places[device, wanted]
        if (at < 0).any():
            at = np.where(at < 0, self.places[:, wanted].max(axis=0), at)  # every row lies somewhere
        first, last = int(at[0]), int(at[-1])
        together = last - first == len(at) - 1 and bool((np.diff(at) == 1).all())
        found: npt.NDArray[Any] = self.rows[first : last + 1] if together else self.rows[at]
        return found


@dataclass(frozen=True, slots=True)
class Handed:
    """What the host gets of a stage, and what stays on the GPU."""

    hidden: Tensor  # [n, d_model] on the GPU
    router_logits: Floats  # [n, n_experts]
    routing: Routing
    packed: PackedByDevice | None  # None: float16 does not hold some number of it


class HandOff:
    """The kernels with the memory they share; belongs to one thread at a time, on the current stream."""

    def __init__(self, torch_device: str, top_k: int, normalise: bool, few_rows: int = _FEW_ROWS) -> None:
        """Make the flag.

        Args:
            torch_device: "cuda"; "cpu" runs the kernels in Triton's interpreter, for tests.
            top_k: experts of a token.
            normalise: whether the chosen weights are scaled to sum to one.
            few_rows: up to here a program of the router takes one row; beyond, programs share what they read of it.
        """
        self._few_rows = few_rows
        self._device, self._top_k, self._normalise = torch_device, top_k, normalise
        self._done = torch.zeros(1, dtype=torch.int32, device=torch_device)
        self._flag = self.on_host((1,), torch.int32)
        self._flag[0] = 0
        self._seen: npt.NDArray[np.int32] = self._flag.numpy()
        self._turn = 0
        self._owners: dict[bytes, Tensor] = {}

    def on_host(self, shape: Sequence[int], dtype: Tensor) -> Tensor:
        """Take memory that both can reach; torch keeps what is given back, so that this costs no call of the driver."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=self._device != "cpu")

    def route_and_pack(
        self, residual: Tensor, norm: Norm, router: Tensor, owner: Ints, n_devices: int, wire: Wire
    ) -> Handed:
        """Norm, choose experts, and put the rows where the sockets find them; returns when they are there.

        Args:
            residual: [n, d_model] float32 on the GPU.
            norm: before the experts.
            router: [n_experts, d_model] float32 on the GPU.
            owner: [n_experts], the device of each expert.
            n_devices: how many there are.
            wire: fp16 or fp32.

        Raises:
            EngineError: the GPU has not finished in a minute.
        """
        n, d_model = residual.shape
        n_experts, top_k = router.shape[0], self._top_k
        logits = self.on_host((n, n_experts), torch.float32)
        experts, weights = self.on_host((n, top_k), torch.int64), self.on_host((n, top_k), torch.float32)
        misfits = self.on_host((n,), torch.int32)
        packed = self.on_host((n * min(top_k, n_devices), d_model), _WIRE_TYPES[wire])
        hidden = torch.empty_like(residual)
        device_block = _power_of_two(n_devices)
        used = torch.empty((n, device_block), dtype=torch.int32, device=self._device)
        width_block = _power_of_two(d_model)
        rows = 1 if n <= self._few_rows else _SHARED_ROWS
        route_kernel[(-(-n // rows),)](
            residual, norm.weight, router, hidden, logits, experts, weights, self._owner(owner), used,
            n, d_model, n_experts, norm.epsilon,
            top_k=top_k, normalise=self._normalise, rows=rows, width_block=width_block,
            expert_block=max(_LEAST_EXPERTS, _power_of_two(n_experts)), device_block=device_block, chunk=_CHUNK,
        )  # fmt: skip
        self._turn = self._turn % (2**31 - 1) + 1
        pack_kernel[(n,)](
            hidden, used, packed, misfits, self._done, self._flag, self._turn, n, d_model, n_devices,
            width_block=width_block, device_block=device_block, row_block=_COUNTED_ROWS,
        )  # fmt: skip
        self.wait(self._turn)
        routing = Routing(experts.numpy(), weights.numpy())
        held = None
        if wire == "fp32" or not misfits.numpy().any():
            held = PackedByDevice(packed.numpy(), _places(routing.experts, owner, n_devices), wire)
        return Handed(hidden, logits.numpy(), routing, held)

    def combine(
        self,
        residual: Tensor,
        partials: Sequence[Partial],
        lost_share: Floats | None,
        shared: Tensor | None,
        factor: float,
        norm: Norm,
    ) -> tuple[Tensor, Tensor]:
        """Add the devices' sums to the residual in the order given, and norm it: next residual and normed rows.

        Args:
            residual: [n, d_model] float32 on the GPU.
            partials: of each device, which rows it speaks of and its weighted sums.
            lost_share: [n], share of each token's gate weight that was skipped; None: nothing was.
            shared: [n, d_model] float32 on the GPU, output of the shared expert.
            factor: of what is added to the residual.
            norm: of the stage that follows.
        """
        n, d_model = residual.shape
        places = self.on_host((max(1, len(partials)), n), torch.int32)
        sums = self.on_host((max(1, sum(len(rows) for rows, _ in partials)), d_model), torch.float32)
        lost = self.on_host((n,), torch.float32)
        lost.numpy()[:] = 0.0 if lost_share is None else lost_share
        place, into, at = places.numpy(), sums.numpy(), 0
        place[:] = -1
        for k, (rows, values) in enumerate(partials):
            place[k, rows] = np.arange(at, at + len(rows))
            into[at : at + len(rows)] = values
            at += len(rows)
        summed, normed = torch.empty_like(residual), torch.empty_like(residual)
        combine_kernel[(n,)](
            sums, places, lost, residual if shared is None else shared, residual, norm.weight, summed, normed,
            n, d_model, len(partials), factor, norm.epsilon,
            has_shared=shared is not None, width_block=_power_of_two(d_model),
        )  # fmt: skip
        self._keep = (sums, places, lost)  # until the next call: by then the rows that it led to are out
        return summed, normed

    def wait(self, turn: int) -> None:
        """Wait until the flag says that a turn is written; others may have the interpreter meanwhile.

        Raises:
            EngineError: the GPU has not finished in a minute.
        """
        seen = self._seen
        started_s = time.perf_counter()
        while seen[0] != turn:
            waited_s = time.perf_counter() - started_s
            if waited_s > _GPU_WAIT_S:
                raise EngineError(f"stages on {self._device}: the GPU has not finished in {_GPU_WAIT_S:g} s")
            time.sleep(0 if waited_s < _POLLED_S else 50e-6)

    def _owner(self, owner: Ints) -> Tensor:
        """Bring the table of devices to the GPU, once for each table."""
        key = owner.tobytes()
        if (known := self._owners.get(key)) is None:
            known = self._owners[key] = torch.tensor(owner, dtype=torch.int32, device=self._device)
        return known


def _places(experts: Ints, owner: Ints, n_devices: int) -> Ints:
    """Say where `pack_kernel` put each row for each device: [n_devices, n], -1 where it did not."""
    used = np.zeros((n_devices, len(experts)), np.bool_)
    used[owner[experts].T, np.arange(len(experts))] = True
    order = np.cumsum(used).reshape(used.shape) - 1  # by device, then row
    result: Ints = np.where(used, order, -1)
    return result


def _power_of_two(n: int) -> int:
    """Return the least power of two from n up."""
    return 1 << max(0, n - 1).bit_length()
