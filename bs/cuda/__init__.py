"""The base station's stages on a CUDA GPU; nothing outside this package imports torch or Triton."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from wdmoe.runtime.errors import EngineError

if TYPE_CHECKING:
    from wdmoe.bs.stages import StationStages
    from wdmoe.runtime.manifest import BsManifest

__all__ = ["open_cuda_stages"]

_NEEDED = ("onnxruntime", "onnx", "torch", "triton")
INSTALL = "pip install 'wdmoe[bs,cuda-bs]', where no onnxruntime without CUDA is installed"


def open_cuda_stages(folder: Path, manifest: BsManifest) -> StationStages:
    """Load the stages of a bundle onto the GPU.

    Raises:
        EngineError: there is none, or something that they need is missing.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]  # importing torch takes seconds
    if missing:
        raise EngineError(f"stages on cuda: {', '.join(missing)} missing; {INSTALL}")
    provider = "CUDAExecutionProvider"
    onnxruntime = import_module("onnxruntime")
    if provider not in onnxruntime.get_available_providers():
        raise EngineError(f"stages on cuda: onnxruntime {onnxruntime.__version__} is built without CUDA; {INSTALL}")
    torch = import_module("torch")
    if not torch.cuda.is_available():
        raise EngineError(
            f"stages on cuda: torch {torch.__version__} finds no GPU; nvidia-smi says whether there is one"
        )
    stages: StationStages = import_module("wdmoe.bs.cuda.stages").CudaStages(folder, manifest)
    return stages
