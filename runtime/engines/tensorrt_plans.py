"""The plans of a slice, in its folder `engines/`: built once on the device that runs them, kept with what they depend on.

A file is one line of JSON (the key, the size and SHA-256 of what follows) and the plan. It is used only by a machine and a
library that have the same key; a file that is not is refused by name and built anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from wdmoe.runtime.cuda_driver import Cuda
from wdmoe.runtime.engines.tensorrt_network import (
    BUILDER_VERSION,
    TOKEN_RANGES,
    BuildOptions,
    ExpertNetwork,
    Scratch,
    build_plan,
    references,
    reserve_bytes,
    shared_logger,
    shared_runtime,
)
from wdmoe.runtime.engines.tensorrt_weights import int4_constants
from wdmoe.runtime.errors import EngineError
from wdmoe.runtime.manifest import ExpertEntry
from wdmoe.runtime.memory import forget_pages

FOLDER = "engines"
_FORMAT = "wdmoe-plan 1"
_HEADER_LIMIT_BYTES = 65_536
_LOCK_WAIT_S, _LOCK_POLL_S = 7200.0, 0.2  # another process may build a hundred plans
_MEMORY_STEP_BYTES = 256 << 20  # two boards of a kind differ by what their firmware takes

Key = Mapping[str, Any]  # plain JSON values
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class World:
    """TensorRT and the machine it runs on."""

    trt: Any  # the module
    cuda: Cuda
    l4t: str  # the line that names the release of Linux for Tegra; "" off a Jetson
    options: BuildOptions = field(default_factory=BuildOptions)

    @property
    def key(self) -> dict[str, Any]:
        """What everything that is built here depends on."""
        device = self.cuda.device
        return {
            "library": f"{self.trt.__name__} {self.trt.__version__}",
            "device": device.name,
            "sm": device.sm,
            "sm_count": device.sm_count,
            "memory": round(device.memory_bytes / _MEMORY_STEP_BYTES) * _MEMORY_STEP_BYTES,
            "integrated": device.integrated,
            "driver": device.driver,
            "l4t": self.l4t,
            "builder": BUILDER_VERSION,
            "workspace_bytes": self.options.workspace_bytes,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """One file: the plan of all experts of a shape, or of one expert whose weights are inside."""

    network: ExpertNetwork
    expert: ExpertEntry | None  # None: the weights are inputs

    @property
    def name(self) -> str:
        """Name of the file."""
        shape = f"{self.network.d_model}x{self.network.d_ff}-{self.network.precision}"
        if self.expert is None:
            return f"experts-{shape}.plan"
        return f"block_{self.expert.block:02d}_expert_{self.expert.expert:02d}-{shape}.plan"

    @property
    def key(self) -> dict[str, Any]:
        """What this plan depends on besides the machine."""
        return {
            "network": [self.network.d_model, self.network.d_ff, self.network.precision],
            "token_ranges": [list(astuple(tokens)) for tokens in TOKEN_RANGES],
            # The file of an expert is named by the hash of its content.
            "weights": None if self.expert is None else self.expert.weights,
        }


def plans_of(network: ExpertNetwork, experts: Sequence[ExpertEntry]) -> tuple[Plan, ...]:
    """Say which plans serve these experts."""
    return tuple(Plan(network, entry) for entry in experts) if network.precision == "int4" else (Plan(network, None),)


@dataclass(frozen=True, slots=True)
class PlanStore:
    """The folder `engines/` of one slice on one machine."""

    world: World
    folder: Path  # of the slice

    @contextmanager
    def lock(self, say: Say) -> Iterator[None]:
        """Let one process at a time build here: a replica is a second process with the same folder.

        Raises:
            EngineError: another process did not finish in time.
        """
        path = self._path(".lock")
        try:
            path.parent.mkdir(exist_ok=True)
            file = path.open("a")
        except OSError:  # where nothing can be written nobody builds; what is missing is then an error of its own
            yield
            return
        with file:
            deadline_s = time.monotonic() + _LOCK_WAIT_S
            waited = False
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > deadline_s:
                        raise EngineError(
                            f"engine tensorrt: another process has held {path} for {_LOCK_WAIT_S / 3600:.0f} hours"
                        ) from error
                if not waited:
                    say(f"engine tensorrt: another process builds in {path.parent}; waiting for it")
                waited = True
                time.sleep(_LOCK_POLL_S)
            yield  # closing the file gives the lock back, as does the end of the process

    def prepare(self, plans: Sequence[Plan], say: Say) -> None:
        """Build the plans that are not there; those of an interrupted run are kept.

        Raises:
            EngineError: TensorRT refuses, a plan takes too much scratch, or the folder cannot be written.
        """
        for plan in plans:
            if known := self.probed(plan):
                raise EngineError(f"{known} (found before; `wdmoe-device build --again` tries anew)")
        missing = [plan for plan in plans if self._read(plan.name, plan.key, say) is None]
        if not missing:
            return
        say(
            f"engine tensorrt: building {len(missing)} of {len(plans)} plans, once; the next start takes them from here"
        )
        started_s = time.monotonic()
        for done, plan in enumerate(missing, start=1):
            before_s = time.monotonic()
            self._build(plan, say)
            now_s = time.monotonic()
            left_s = (now_s - started_s) / done * (len(missing) - done)
            say(
                f"engine tensorrt: built {plan.name} in {now_s - before_s:.1f} s, {done} of {len(missing)}"
                + (f", about {left_s:.0f} s to go" if left_s else "")
            )

    def load(self, plan: Plan) -> Any:
        """Return the engine of a plan that `prepare` found or built.

        Raises:
            EngineError: it is not there, TensorRT does not take it, or it wants too much scratch.
        """
        found = self._read(plan.name, plan.key, lambda _: None, verify=False)
        if found is None:
            raise EngineError(f"engine tensorrt: {self._path(plan.name)} is not built; run `wdmoe-device build`")
        engine = self._deserialised(plan, found)
        forget_pages(self._path(plan.name))
        self._check_scratch(plan, engine)
        return engine

    def probed(self, plan: Plan) -> str | None:
        """Return what a probe of a plan found on this machine: "" that it is right, else why not; None without a probe."""
        found = self._read(f"{plan.name}.probe", plan.key, lambda _: None)
        return None if found is None else bytes(found).decode(errors="replace")

    def keep_probe(self, plan: Plan, found: str) -> None:
        """Remember what a probe found."""
        self._write(f"{plan.name}.probe", plan.key, found.encode())

    def scratch_bytes(self, engine: Any) -> tuple[int, ...]:
        """Return what an engine takes of memory besides weights, inputs and outputs, for each range of tokens."""
        ask = getattr(engine, "get_device_memory_size_for_profile_v2", None)
        ask = ask or engine.get_device_memory_size_for_profile  # before TensorRT 10.1's second form
        return tuple(int(ask(index)) for index in range(len(TOKEN_RANGES)))

    def _build(self, plan: Plan, say: Say) -> None:
        constants = None
        if plan.expert is not None:
            constants = int4_constants(self.folder / plan.expert.weights, plan.network)
        cache_key = {"timing_cache": True}
        kept = self._read("timing.cache", cache_key, say)
        cache = b"" if kept is None else bytes(kept)
        built = build_plan(self.world.trt, plan.network, constants, cache, self.world.options)
        if built.timing_cache:
            self._write("timing.cache", cache_key, built.timing_cache)
        try:
            self._check_scratch(plan, self._deserialised(plan, built.plan))
        except EngineError as error:
            self.keep_probe(plan, str(error))
            raise
        self._write(plan.name, plan.key, built.plan)

    def _deserialised(self, plan: Plan, content: bytes | memoryview) -> Any:
        engine = shared_runtime(self.world.trt).deserialize_cuda_engine(content)
        if engine is None:
            said = shared_logger(self.world.trt).current.last_error
            raise EngineError(f"engine tensorrt: {self._path(plan.name)} is not taken: {said}; remove it to build anew")
        return engine

    def _check_scratch(self, plan: Plan, engine: Any) -> None:
        network = plan.network
        for index, (tokens, size) in enumerate(zip(TOKEN_RANGES, self.scratch_bytes(engine), strict=True)):
            scratch = Scratch(size, network.activation_bytes(tokens.most), network.fp16_weight_bytes)
            if scratch.excessive:
                scratch = replace(scratch, reserve_bytes=self._reserve_bytes(network)[index])
            if scratch.excessive:
                raise EngineError(
                    f"engine tensorrt: {plan.name} takes {scratch.scratch_bytes / 1e6:.1f} MB of scratch for {tokens.most} "
                    f"tokens, activations {scratch.activation_bytes / 1e6:.1f} MB, the kernels' reserve "
                    f"{scratch.reserve_bytes / 1e6:.1f} MB: what is beyond is {scratch.over_weights:.2f} of the expert's "
                    f"{scratch.fp16_weight_bytes / 1e6:.1f} MB in float16 (at most 0.125); weights are being copied"
                )

    def _reserve_bytes(self, network: ExpertNetwork) -> list[int]:
        """Return what kernels set aside whatever the shape, for each range of tokens; measured once on each machine."""
        name, key = f"reserve-{network.precision}.json", {"reserve_of": network.precision}
        if (found := self._read(name, key, lambda _: None)) is not None:
            kept: list[int] = json.loads(bytes(found))
            return kept
        sizes: list[tuple[int, ...]] = []
        for reference in references(network.precision):
            constants = None
            if network.precision == "int4":
                tensors = reference.weight_tensors()
                constants = {tensor: np.ones(shape, dtype) for tensor, (dtype, shape) in tensors.items()}
            built = build_plan(self.world.trt, reference, constants, options=self.world.options)
            sizes.append(self.scratch_bytes(self._deserialised(Plan(reference, None), built.plan)))
        reserve = reserve_bytes(network.precision, *sizes)
        self._write(name, key, json.dumps(reserve).encode())
        return reserve

    def _path(self, name: str) -> Path:
        return self.folder / FOLDER / name

    def _read(self, name: str, key: Key, say: Say, verify: bool = True) -> memoryview | None:
        """Return the content of a file made under this key; a file that is something else is refused by name."""
        path = self._path(name)
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise EngineError(f"engine tensorrt: {path} cannot be read ({error.strerror})") from error
        end = raw.find(b"\n", 0, _HEADER_LIMIT_BYTES) + 1
        content = memoryview(raw)[end:]  # no copy: a plan with its weights is large
        if (reason := _difference(raw[:end], content, {**self.world.key, **key}, verify)) is not None:
            say(f"engine tensorrt: refused {path}: {reason}; building it anew")
            return None
        return content

    def _write(self, name: str, key: Key, content: bytes) -> None:
        header = {
            "format": _FORMAT,
            "key": {**self.world.key, **key},
            "size_bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        path = self._path(name)
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(exist_ok=True)
            with partial.open("wb") as file:
                file.write(json.dumps(header).encode() + b"\n")
                file.write(content)
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise EngineError(
                f"engine tensorrt: {path} cannot be written ({error.strerror}); the folder must be writable, with room"
            ) from error


def _difference(head: bytes, content: memoryview, key: Key, verify: bool) -> str | None:
    """Say why a file is not what is wanted; None if it is."""
    try:
        header = json.loads(head)
        if header["format"] != _FORMAT:
            return f"its format is {header['format']!r}, expected {_FORMAT!r}"
        found, size, sha256 = dict(header["key"]), header["size_bytes"], header["sha256"]
    except (ValueError, KeyError, TypeError):
        return "its first line is damaged"
    for name in key:
        if found.get(name) != key[name]:
            return f"it was made for {name} {found.get(name)!r}, this is {key[name]!r}"
    if len(content) != size:
        return f"it has {len(content)} bytes, its first line says {size}"
    if verify and hashlib.sha256(content).hexdigest() != sha256:
        return "its content has changed since it was written"
    return None
