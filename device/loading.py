"""Bring a slice up: choose the best engine that gives right answers, and measure it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wdmoe.device.benching import software_of, staging_point
from wdmoe.device.machine import hardware_name
from wdmoe.device.verdicts import Verdicts
from wdmoe.profiles.device_profile import VERSION, DeviceProfile, read_profile
from wdmoe.runtime.engines import ENGINES, ExpertEngine, engine_identity, load_engine, prepare_engine
from wdmoe.runtime.engines.timing import quick_points
from wdmoe.runtime.errors import BundleError, EngineError
from wdmoe.runtime.manifest import DeviceManifest
from wdmoe.runtime.tensor_file import map_tensors

_STAGED_ROWS = 64


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one engine's self-check."""

    engine: str
    experts: int
    max_error: float  # relative to the largest golden value
    tolerance: float
    worst: str = ""  # the expert that is off the most

    @property
    def passed(self) -> bool:
        """Whether the engine may serve; an error that is not a number fails."""
        return self.max_error <= self.tolerance

    def __str__(self) -> str:
        where = "" if self.passed or not self.worst else f" at {self.worst}"
        return f"{self.experts} experts, largest error {self.max_error:.1e}{where}, allowed {self.tolerance:.0e}"


def self_check(engine: ExpertEngine, folder: Path, manifest: DeviceManifest) -> Check:
    """Run the golden inputs of every expert of the slice and compare with the golden outputs.

    Raises:
        BundleError: the golden file lacks an expert or has another shape.
    """
    golden = map_tensors(folder / manifest.golden)
    worst, where = 0.0, ""
    for entry in manifest.experts:
        try:
            rows = golden[f"input.block_{entry.block:02d}"]
            expected = golden[f"output.block_{entry.block:02d}.expert_{entry.expert:02d}"]
        except KeyError as error:
            raise BundleError(f"{folder / manifest.golden}: has no {error}; copy the folder again") from error
        if rows.shape != expected.shape or rows.shape[1:] != (manifest.model.d_model,):
            raise BundleError(f"{folder / manifest.golden}: expert {entry.expert} of block {entry.block} is misshapen")
        got = engine.run(entry.block, entry.expert, np.array(rows, np.float32))
        error_here = float(np.abs(got - expected).max() / max(float(np.abs(expected).max()), 1e-30))
        error_here = error_here if np.isfinite(error_here) else float("inf")
        if error_here > worst:
            worst, where = error_here, f"expert {entry.expert} of block {entry.block}"
    return Check(engine.name, len(manifest.experts), worst, engine.tolerance, where)


def choose_engine(
    folder: Path, manifest: DeviceManifest, names: Sequence[str], threads: int, say: Callable[[str], None]
) -> ExpertEngine:
    """Load the first engine of `names` that can be had and passes its self-check.

    An engine that answered wrong is remembered, so that the next start does not wait for it; `wdmoe-device check` asks it
    again.

    Args:
        folder: of the slice.
        manifest: of the slice.
        names: engines to try, best first.
        threads: for one call.
        say: told why an engine was taken or passed over.

    Raises:
        EngineError: none passes; says why for each.
    """
    verdicts = Verdicts(folder, manifest, say)
    reasons: list[str] = []
    for name in names:
        try:
            if (known := verdicts.of(identity := engine_identity(name))) is not None:
                raise EngineError(f"engine {name}: {known}; `wdmoe-device check` tries it again")
            prepare_engine(name, folder, manifest.experts, say)
            engine = load_engine(name, folder, manifest.experts, threads)
            check = self_check(engine, folder, manifest)
            if check.passed:
                say(f"engine {name} {engine.version}: {check}")
                return engine
            verdicts.remember(identity, f"self-check failed ({check})")
            del engine  # gives its memory back before the next one is loaded
            raise EngineError(f"engine {name}: self-check failed ({check})")
        except EngineError as error:
            reasons.append(str(error))
            say(f"passed over {error}")
    raise EngineError(f"no engine of {', '.join(names)} can serve this slice: " + "; ".join(reasons))


def quick_profile(engine: ExpertEngine, manifest: DeviceManifest) -> DeviceProfile:
    """Measure one expert of the slice at a few token counts; takes about a second on a small model."""
    model = manifest.model
    experts = [(entry.block, entry.expert) for entry in manifest.experts]
    return DeviceProfile(
        VERSION,
        device=hardware_name(),
        software=software_of(engine),
        engine=engine.name,
        precision=manifest.precision,
        d_model=model.d_model,
        d_ff=model.d_ff,
        points=quick_points(engine, experts, model.d_model),
        staging=(staging_point(np.ones((_STAGED_ROWS, model.d_model), np.float32)),),
    )


def kept_profile(path: Path, engine: ExpertEngine, manifest: DeviceManifest) -> DeviceProfile:
    """Read what `bench` measured earlier.

    Raises:
        ValueError: it is not of this machine, engine or slice.
    """
    profile, model = read_profile(path), manifest.model
    told = (profile.origin, profile.device, profile.engine, profile.precision, profile.d_model, profile.d_ff)
    here = ("measured", hardware_name(), engine.name, manifest.precision, model.d_model, model.d_ff)
    if told != here:
        raise ValueError(f"--profile {path} is of {told}, this is {here}; measure again with wdmoe-device bench")
    return profile


def engine_names(choice: str) -> tuple[str, ...]:
    """Turn the user's choice into the engines to try: `auto` means all, best first."""
    if choice == "auto":
        return tuple(ENGINES)
    if choice not in ENGINES:
        raise ValueError(f"unknown engine {choice!r}, expected auto or one of {', '.join(ENGINES)}")
    return (choice,)


def say_to_stderr(text: str) -> None:
    """Progress goes to stderr; stdout is for results."""
    sys.stderr.write(f"{text}\n")  # in one piece, as devices of one bundle share a terminal
    sys.stderr.flush()
