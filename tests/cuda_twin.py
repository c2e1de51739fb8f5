"""A GPU in memory. A broken rule is an AssertionError where the real thing would crash or corrupt memory.

Queued work is done when its stream is waited for, not before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from wdmoe.runtime.cuda_driver import ALIGNMENT_BYTES, Bytes, CudaDevice, Pinned

ORIN = CudaDevice("Orin", "8.7", 16, 8 << 30, integrated=True, driver="12.6")
DESKTOP = CudaDevice("RTX A6000", "8.6", 84, 48 << 30, integrated=False, driver="12.6")


class MemoryCuda:
    """A GPU whose memory is numpy arrays at their true addresses."""

    def __init__(self, device: CudaDevice = ORIN, free_bytes: int = 1 << 30) -> None:
        self.device, self._free_bytes = device, free_bytes
        self.device_memory: dict[int, Bytes] = {}
        self.pinned: dict[int, Bytes] = {}
        self.queues: dict[int, list[Callable[[], None]]] = {}
        self._kept: dict[int, Bytes] = {}  # what views are of
        self._thread = threading.local()

    def make_current(self) -> None:
        self._thread.current = True

    def free_bytes(self) -> int:
        self._on_thread()
        return self._free_bytes - sum(len(memory) for memory in self.device_memory.values())

    def allocate(self, size_bytes: int) -> int:
        self._on_thread()
        return self._aligned(size_bytes, self.device_memory)

    def free(self, address: int) -> None:
        self._on_thread()
        del self.device_memory[address], self._kept[address]

    def pin(self, size_bytes: int) -> Pinned:
        self._on_thread()
        address = self._aligned(size_bytes, self.pinned)
        return Pinned(self.pinned[address], address)

    def unpin(self, pinned: Pinned) -> None:
        self._on_thread()
        del self.pinned[pinned.view.ctypes.data], self._kept[pinned.view.ctypes.data]

    def make_stream(self) -> int:
        self._on_thread()
        stream = 1000 + len(self.queues)
        self.queues[stream] = []
        return stream

    def destroy_stream(self, stream: int) -> None:
        assert not self.queues.pop(stream), "a stream is destroyed with work in it"

    def copy_to_device(self, address: int, source: Bytes, stream: int) -> None:
        self._on_thread()
        self.view(source.ctypes.data, source.nbytes, self.pinned)
        target = self.view(address, source.nbytes, self.device_memory)
        self.queues[stream].append(lambda: np.copyto(target, source))

    def copy_to_host(self, target: Bytes, address: int, stream: int) -> None:
        self._on_thread()
        self.view(target.ctypes.data, target.nbytes, self.pinned)
        source = self.view(address, target.nbytes, self.device_memory)
        self.queues[stream].append(lambda: np.copyto(target, source))

    def synchronize(self, stream: int) -> None:
        self._on_thread()
        queue = self.queues[stream]
        while queue:
            queue.pop(0)()

    def view(self, address: int, size_bytes: int, memory: dict[int, Bytes] | None = None) -> Bytes:
        """Return what lies at an address of the device."""
        regions = {**self.device_memory, **self.pinned} if memory is None else memory
        for start, region in regions.items():
            if start <= address and address + size_bytes <= start + len(region):
                return region[address - start : address - start + size_bytes]
        raise AssertionError(f"illegal memory access: {size_bytes} bytes at {address:#x}")

    def _aligned(self, size_bytes: int, regions: dict[int, Bytes]) -> int:
        raw = np.full(size_bytes + ALIGNMENT_BYTES, 0xA5, np.uint8)  # nobody may count on zeros
        start = -raw.ctypes.data % ALIGNMENT_BYTES
        address = raw.ctypes.data + start
        regions[address], self._kept[address] = raw[start : start + size_bytes], raw
        return address

    def _on_thread(self) -> None:
        assert getattr(self._thread, "current", False), "this thread has no CUDA context"
