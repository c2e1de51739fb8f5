"""Where the stages are: asked for by name, and refused by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from wdmoe.bs.cli import main
from wdmoe.bs.stages import Stages, open_stages
from wdmoe.runtime.errors import EngineError
from wdmoe.runtime.manifest import BsManifest, read_manifest

ort = pytest.importorskip("onnxruntime")
without_cuda = pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="this onnxruntime has CUDA"
)


@without_cuda
def test_cuda_without_its_libraries_is_refused_with_what_to_install(bundle: Path) -> None:
    manifest = read_manifest(bundle / "bs", BsManifest)
    with pytest.raises(EngineError, match=r"stages on cuda: .*pip install 'wdmoe\[bs,cuda-bs\]'"):
        open_stages(bundle / "bs", manifest, 1, "cuda", print)


@without_cuda
def test_auto_takes_the_cpu_and_says_why(bundle: Path) -> None:
    said: list[str] = []
    stages = open_stages(bundle / "bs", read_manifest(bundle / "bs", BsManifest), 1, "auto", said.append)
    assert isinstance(stages, Stages) and stages.on == "cpu"
    assert len(said) == 1 and said[0].startswith("stages on the CPU; stages on cuda: ")


def test_stages_in_virtual_time_are_not_put_on_a_gpu(bundle: Path) -> None:
    line = ["run", "--bundle", str(bundle / "bs"), "--dataset", "piqa-sample", "--clock", "virtual"]
    modelled = ["--devices", "orin-nano-8gb", "--link", "wifi-5ghz", "--stages-on", "cuda"]
    done = CliRunner().invoke(main, [*line, *modelled])
    assert done.exit_code == 2 and "--stages-on is for real time" in done.output


def test_the_cpu_path_imports_neither_torch_nor_triton() -> None:
    code = "import sys, wdmoe.bs.pipeline, wdmoe.bs.station; print(*{'torch', 'triton', 'onnx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == ""
