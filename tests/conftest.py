from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """Let Ctrl-C mean what it means in a terminal: whoever runs the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", params=tiny.FAMILIES)
def any_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of each family, exported for four devices; the checkpoint lies beside it."""
    return exported(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def experiments_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `short_experiments.short_result` keeps what it ran."""
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2-MoE, exported for four devices."""
    return exported(tmp_path_factory.mktemp("qwen"), "qwen2_moe")


def exported(folder: Path, family: str) -> Path:
    checkpoint = tiny.tiny_checkpoint(folder / "checkpoint", family)
    config = ExportConfig(out=folder / "bundle")
    return export_bundle(plan_export(checkpoint, family, config), config).out
