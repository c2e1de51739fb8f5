"""The kernels run on a GPU where there is one, else in Triton's interpreter, which must be asked for before they load."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

INTERPRETED = "TRITON_INTERPRET"


def has_gpu() -> bool:
    if find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


if not has_gpu():
    os.environ.setdefault(INTERPRETED, "1")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def torch_device(request: pytest.FixtureRequest) -> str:
    """Where to run: one of the two skips."""
    for library in ("torch", "triton", "onnx", "onnxruntime"):
        pytest.importorskip(library, reason=f"{library} is not installed; WDMOE_EXTRAS=cuda-test scripts/test has it")
    interpreted = os.environ.get(INTERPRETED) == "1"
    if request.param == "cuda" and (interpreted or not has_gpu()):
        pytest.skip("no GPU, or TRITON_INTERPRET is set")
    if request.param == "cpu" and not interpreted:
        pytest.skip("there is a GPU; TRITON_INTERPRET=1 runs the kernels on the CPU")
    device: str = request.param
    return device
