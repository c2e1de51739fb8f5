"""The calls of the CUDA driver, against a library of the same functions that a C compiler makes here."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest
from cuda_twin import MemoryCuda

from wdmoe.runtime.cuda_driver import ALIGNMENT_BYTES, Cuda, CudaDriver, find_device
from wdmoe.runtime.errors import EngineError

# The types are those of cuda.h. Device memory is host memory with a tag in its address, so that the two cannot be mixed up.
SOURCE = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#define TAG 0x4000000000000000ull
typedef uint64_t CUdeviceptr;
static void *current = 0, *stream_made = 0;
static int context, live = 0;
int cuInit(unsigned flags) { return flags == 0 ? 0 : 1; }
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 40 + ordinal; return 0; }
int cuDeviceGetName(char *name, int len, int dev) { if (dev != 40) return 101; strncpy(name, "Orin", len); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int dev) { *bytes = 8ull << 30; return dev == 40 ? 0 : 101; }
int cuDeviceGetAttribute(int *v, int attribute, int dev) {
  if (dev != 40) return 101;
  switch (attribute) {
    case 16: *v = 16; return 0;  /* multiprocessors */
    case 18: *v = 1; return 0;   /* integrated */
    case 75: *v = 8; return 0;
    case 76: *v = 7; return 0;
  }
  return 1;
}
int cuDevicePrimaryCtxRetain(void **ctx, int dev) { *ctx = &context; return dev == 40 ? 0 : 101; }
int cuCtxSetCurrent(void *ctx) { current = ctx; return ctx == &context ? 0 : 201; }
int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) { *free_bytes = 5ull << 30; *total = 8ull << 30; return current ? 0 : 201; }
int cuMemAlloc_v2(CUdeviceptr *p, size_t bytes) {
  if (bytes > 1ull << 30) return 2;
  *p = (CUdeviceptr)(uintptr_t)aligned_alloc(512, (bytes + 511) / 512 * 512) | TAG; live++; return 0;
}
static void *host(CUdeviceptr p) { return p & TAG ? (void *)(uintptr_t)(p & ~TAG) : 0; }
int cuMemFree_v2(CUdeviceptr p) { if (!host(p)) return 1; free(host(p)); live--; return 0; }
int cuMemHostAlloc(void **p, size_t bytes, unsigned flags) {
  if (flags != 3) return 1;
  *p = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096); live++; return 0;
}
int cuMemHostGetDevicePointer_v2(CUdeviceptr *p, void *h, unsigned flags) { *p = (CUdeviceptr)(uintptr_t)h | TAG; return (int)flags; }
int cuMemFreeHost(void *h) { free(h); live--; return 0; }
int cuMemcpyHtoDAsync_v2(CUdeviceptr d, const void *s, size_t n, void *stream) {
  if (stream != stream_made || !host(d)) return 1;
  memcpy(host(d), s, n); return 0;
}
int cuMemcpyDtoHAsync_v2(void *d, CUdeviceptr s, size_t n, void *stream) {
  if (stream != stream_made || !host(s)) return 1;
  memcpy(d, host(s), n); return 0;
}
int cuStreamCreate(void **stream, unsigned flags) { if (flags != 1) return 1; *stream = stream_made = malloc(1); return 0; }
int cuStreamDestroy_v2(void *stream) { if (stream != stream_made) return 1; free(stream); return 0; }
int cuStreamSynchronize(void *stream) { return stream == stream_made ? 0 : 1; }
int cuGetErrorString(int error, const char **text) { *text = error == 2 ? "out of memory" : "other"; return 0; }
int stub_live(void) { return live; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "stub.c").write_text(SOURCE)
    out = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-o", out, folder / "stub.c"], check=True, timeout=60)
    return str(out)


def round_trip(cuda: Cuda) -> None:
    """Every member of the seam does this."""
    cuda.make_current()
    stream = cuda.make_stream()
    data = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
    there, back, address = cuda.pin(5000), cuda.pin(5000), cuda.allocate(6000)
    assert address % ALIGNMENT_BYTES == 0 and there.device_address % ALIGNMENT_BYTES == 0
    there.view[:] = data
    cuda.copy_to_device(address + 512, there.view[:4000], stream)
    cuda.copy_to_host(back.view[1000:5000], address + 512, stream)
    cuda.synchronize(stream)
    np.testing.assert_array_equal(back.view[1000:], data[:4000])
    assert cuda.free_bytes() > 0
    cuda.free(address)
    for pinned in (there, back):
        cuda.unpin(pinned)
    cuda.destroy_stream(stream)


def test_copies_arrive(library: str) -> None:
    driver = CudaDriver(library)
    round_trip(driver)
    assert driver._functions.stub_live() == 0


def test_copies_arrive_in_the_twin() -> None:
    round_trip(MemoryCuda())


def test_the_device_is_described(library: str) -> None:
    device = CudaDriver(library).device
    assert (device.name, device.sm, device.sm_count, device.memory_bytes) == ("Orin", "8.7", 16, 8 << 30)
    assert device.integrated and device.driver == "12.6"


def test_an_error_names_the_call_and_what_the_driver_says(library: str) -> None:
    driver = CudaDriver(library)
    with pytest.raises(EngineError, match=r"cuMemAlloc_v2 failed: out of memory \(error 2\)"):
        driver.allocate(2 << 30)


def test_a_machine_without_a_driver_is_told_so() -> None:
    with pytest.raises(EngineError, match="no CUDA driver"):
        CudaDriver("libcuda-that-is-not-there.so.1")


def test_a_gpu_is_described_without_taking_its_context(library: str) -> None:
    device = find_device(library)
    assert (device.name, device.sm, device.memory_bytes, device.driver) == ("Orin", "8.7", 8 << 30, "12.6")
    with pytest.raises(EngineError, match="no CUDA driver"):
        find_device("libcuda-that-is-not-there.so.1")
