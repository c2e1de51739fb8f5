"""The few calls of CUDA that an engine needs besides TensorRT's own: memory, copies, one stream.

They go to the driver's library, `libcuda.so.1`, through ctypes. It comes with the driver under the same name on JetPack 6 and 7,
its functions keep their names and arguments across versions, and it needs nothing else: cuda-python is on no Jetson by itself,
and `libcudart` has another name with each major version, where the toolkit is there at all. The driver's primary context is
the one that TensorRT uses.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from wdmoe.runtime.errors import EngineError

ALIGNMENT_BYTES = 256  # that TensorRT wants of every address
Bytes = npt.NDArray[np.uint8]

_LIBRARY = "libcuda.so.1"
_SM_COUNT, _INTEGRATED, _SM_MAJOR, _SM_MINOR = 16, 18, 75, 76  # CUdevice_attribute
_PORTABLE_AND_MAPPED = 0x01 | 0x02  # CU_MEMHOSTALLOC_*
_NON_BLOCKING = 0x01  # CU_STREAM_NON_BLOCKING: does not wait for the default stream
_SIGNATURES: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuDriverGetVersion": [c_void_p],
    "cuDeviceGet": [c_void_p, c_int],
    "cuDeviceGetName": [c_char_p, c_int, c_int],
    "cuDeviceGetAttribute": [c_void_p, c_int, c_int],
    "cuDeviceTotalMem_v2": [c_void_p, c_int],
    "cuDevicePrimaryCtxRetain": [c_void_p, c_int],
    "cuCtxSetCurrent": [c_void_p],
    "cuMemGetInfo_v2": [c_void_p, c_void_p],
    "cuMemAlloc_v2": [c_void_p, c_size_t],
    "cuMemFree_v2": [c_uint64],
    "cuMemHostAlloc": [c_void_p, c_size_t, c_uint],
    "cuMemHostGetDevicePointer_v2": [c_void_p, c_void_p, c_uint],
    "cuMemFreeHost": [c_void_p],
    "cuMemcpyHtoDAsync_v2": [c_uint64, c_void_p, c_size_t, c_void_p],
    "cuMemcpyDtoHAsync_v2": [c_void_p, c_uint64, c_size_t, c_void_p],
    "cuStreamCreate": [c_void_p, c_uint],
    "cuStreamDestroy_v2": [c_void_p],
    "cuStreamSynchronize": [c_void_p],
    "cuGetErrorString": [c_int, c_void_p],
}


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """The GPU."""

    name: str
    sm: str  # compute capability, for example "8.7"
    sm_count: int
    memory_bytes: int
    integrated: bool  # whether it shares the memory of the CPU, as on a Jetson
    driver: str  # the newest CUDA that the driver runs, for example "12.6"


@dataclass(frozen=True, slots=True)
class Pinned:
    """Host memory that stays where it is; the device reaches it as well, by an address of its own."""

    view: Bytes
    device_address: int


class Cuda(Protocol):
    """One GPU. Copies are queued on a stream: what they touch must stay as it is until `synchronize`."""

    device: CudaDevice

    def make_current(self) -> None:
        """Let the calling thread use the GPU; the other calls come after it, on the same thread."""
        ...

    def free_bytes(self) -> int:
        """Return the memory that is not taken."""
        ...

    def allocate(self, size_bytes: int) -> int:
        """Return the address of new memory of the device, a multiple of `ALIGNMENT_BYTES`."""
        ...

    def free(self, address: int) -> None:
        """Give memory of the device back."""
        ...

    def pin(self, size_bytes: int) -> Pinned:
        """Allocate host memory for copies."""
        ...

    def unpin(self, pinned: Pinned) -> None:
        """Give it back."""
        ...

    def make_stream(self) -> int:
        """Make a queue of work."""
        ...

    def destroy_stream(self, stream: int) -> None:
        """Give it back."""
        ...

    def copy_to_device(self, address: int, source: Bytes, stream: int) -> None:
        """Queue a copy; `source` is pinned."""
        ...

    def copy_to_host(self, target: Bytes, address: int, stream: int) -> None:
        """Queue a copy; `target` is pinned."""
        ...

    def synchronize(self, stream: int) -> None:
        """Wait until all that was queued is done."""
        ...


class _Library:
    """The driver's library, opened, and what it says of the first GPU."""

    def __init__(self, library: str) -> None:
        """Open the driver; takes no memory of the GPU.

        Raises:
            EngineError: there is none, or no GPU.
        """
        try:
            self._functions = ctypes.CDLL(library)
        except OSError as error:
            raise EngineError(f"no CUDA driver ({error}); on a Jetson it comes with JetPack") from error
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._functions, name)
            function.argtypes, function.restype = arguments, c_int
        self._call("cuInit", 0)
        number, version, memory = c_int(), c_int(), c_size_t()
        self._call("cuDeviceGet", ctypes.byref(number), 0)
        self._number = number.value
        self._call("cuDriverGetVersion", ctypes.byref(version))
        self._call("cuDeviceTotalMem_v2", ctypes.byref(memory), self._number)
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, len(text), self._number)
        self.device = CudaDevice(
            name=text.value.decode(errors="replace"),
            sm=f"{self._attribute(_SM_MAJOR)}.{self._attribute(_SM_MINOR)}",
            sm_count=self._attribute(_SM_COUNT),
            memory_bytes=memory.value,
            integrated=bool(self._attribute(_INTEGRATED)),
            driver=f"{version.value // 1000}.{version.value % 1000 // 10}",
        )

    def _attribute(self, attribute: int) -> int:
        value = c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, self._number)
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._functions, name)(*arguments)
        if status != 0:
            text = c_char_p()
            self._functions.cuGetErrorString(status, ctypes.byref(text))
            said = text.value.decode(errors="replace") if text.value else "unknown"
            raise EngineError(f"CUDA: {name} failed: {said} (error {status})")


def find_device(library: str = _LIBRARY) -> CudaDevice:
    """Describe the first GPU without taking any of its memory.

    Raises:
        EngineError: there is no driver, or no GPU.
    """
    return _Library(library).device


class CudaDriver(_Library):
    """The first GPU of this machine; see `Cuda`."""

    def __init__(self, library: str = _LIBRARY) -> None:
        """Open the driver and take the GPU's primary context.

        Raises:
            EngineError: there is none, or no GPU.
        """
        super().__init__(library)
        self._context = c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._number)
        self.make_current()

    def make_current(self) -> None:
        """Let the calling thread use the GPU; see `Cuda`."""
        self._call("cuCtxSetCurrent", self._context)

    def free_bytes(self) -> int:
        """Return the memory that is not taken; see `Cuda`."""
        free, total = c_size_t(), c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate(self, size_bytes: int) -> int:
        """Return the address of new memory of the device; see `Cuda`."""
        address = c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), size_bytes)
        return address.value

    def free(self, address: int) -> None:
        """Give memory of the device back."""
        self._call("cuMemFree_v2", address)

    def pin(self, size_bytes: int) -> Pinned:
        """Allocate host memory for copies."""
        host, address = c_void_p(), c_uint64()
        self._call("cuMemHostAlloc", ctypes.byref(host), size_bytes, _PORTABLE_AND_MAPPED)
        self._call("cuMemHostGetDevicePointer_v2", ctypes.byref(address), host, 0)
        assert host.value is not None
        view = np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(host.value))
        return Pinned(view, address.value)

    def unpin(self, pinned: Pinned) -> None:
        """Give it back."""
        self._call("cuMemFreeHost", pinned.view.ctypes.data)

    def make_stream(self) -> int:
        """Make a queue of work."""
        stream = c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        assert stream.value is not None
        return stream.value

    def destroy_stream(self, stream: int) -> None:
        """Give it back."""
        self._call("cuStreamDestroy_v2", stream)

    def copy_to_device(self, address: int, source: Bytes, stream: int) -> None:
        """Queue a copy; see `Cuda`."""
        self._call("cuMemcpyHtoDAsync_v2", address, source.ctypes.data, source.nbytes, stream)

    def copy_to_host(self, target: Bytes, address: int, stream: int) -> None:
        """Queue a copy; see `Cuda`."""
        self._call("cuMemcpyDtoHAsync_v2", target.ctypes.data, address, target.nbytes, stream)

    def synchronize(self, stream: int) -> None:
        """Wait until all that was queued is done."""
        self._call("cuStreamSynchronize", stream)
