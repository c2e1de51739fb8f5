"""`wdmoe-device build` and `check`: what serving does at its start, alone, and for every engine."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from wdmoe.device.loading import self_check
from wdmoe.device.verdicts import FOLDER, Verdicts
from wdmoe.runtime.engines import engine_identity, load_engine, prepare_engine
from wdmoe.runtime.errors import EngineError
from wdmoe.runtime.manifest import DeviceManifest, read_manifest, verify_files

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one engine made of one slice."""

    device: str  # name of the folder
    engine: str
    version: str | None  # None: it could not be had
    experts: int
    max_error: float | None  # relative to the largest golden value; None: it did not run
    allowed: float | None
    verdict: str  # "right", "wrong" or "passed over"
    reason: str = ""  # why not

    def as_json(self) -> dict[str, Any]:
        """Return plain values; an error that is no number is None."""
        values = asdict(self)
        if self.max_error is not None and not self.max_error < float("inf"):
            values["max_error"] = None
        return values


def build(folder: Path, names: Sequence[str], again: bool, say: Callable[[str], None]) -> list[str]:
    """Let engines make what they keep in the folder of a slice.

    Args:
        folder: of the slice.
        names: engines; those whose library is not here are passed over.
        again: remove what is there first, remembered failures included.
        say: told of the progress.

    Returns:
        The engines that are ready with what they keep.

    Raises:
        BundleError: the folder is damaged.
    """
    manifest = read_manifest(folder, DeviceManifest)
    verify_files(folder, manifest)
    if again:
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
    ready: list[str] = []
    for name in names:
        try:
            if prepare_engine(name, folder, manifest.experts, say):
                ready.append(name)
        except EngineError as error:
            say(f"passed over {error}")
    return ready


def check(folder: Path, names: Sequence[str], threads: int, say: Callable[[str], None]) -> list[Outcome]:
    """Run the golden inputs of a slice on every engine, also on one that failed before; remember what each gives now.

    Raises:
        BundleError: the folder is damaged.
    """
    manifest = read_manifest(folder, DeviceManifest)
    verify_files(folder, manifest)
    verdicts = Verdicts(folder, manifest, say)
    return [_check_one(name, folder, manifest, threads, verdicts, say) for name in names]


def _check_one(
    name: str, folder: Path, manifest: DeviceManifest, threads: int, verdicts: Verdicts, say: Callable[[str], None]
) -> Outcome:
    experts = len(manifest.experts)
    try:
        identity = engine_identity(name)
        prepare_engine(name, folder, manifest.experts, say)
        engine = load_engine(name, folder, manifest.experts, threads)
        found = self_check(engine, folder, manifest)
    except EngineError as error:
        return Outcome(folder.name, name, None, experts, None, None, "passed over", str(error))
    if found.passed:
        verdicts.forget(identity)
    else:
        verdicts.remember(identity, f"self-check failed ({found})")
    verdict, where = ("right", "") if found.passed else ("wrong", f"{found.worst} is off the most")
    return Outcome(folder.name, name, engine.version, experts, found.max_error, found.tolerance, verdict, where)


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """Return 0 if every engine that runs is right, and every slice has one."""
    wrong = any(outcome.verdict == "wrong" for outcome in outcomes)
    served = {outcome.device for outcome in outcomes if outcome.verdict == "right"}
    return int(wrong or served != {outcome.device for outcome in outcomes})


def check_table(outcomes: Sequence[Outcome]) -> RenderableType:
    """Lay outcomes out for a terminal of 80 columns; reasons stand below, in full."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    for heading in ("slice", "engine", "version", "experts", "max error", "allowed", "verdict"):
        folds = heading in ("slice", "version")
        justify: Literal["left", "right"] = "right" if heading in ("experts", "max error", "allowed") else "left"
        table.add_column(heading, justify=justify, no_wrap=not folds, overflow="fold")
    reasons: dict[str, list[str]] = {}  # -> slices
    for outcome in outcomes:
        error = "-" if outcome.max_error is None else f"{outcome.max_error:.1e}"
        allowed = "-" if outcome.allowed is None else f"{outcome.allowed:.0e}"
        version = Text(outcome.version or "-")
        table.add_row(
            Text(outcome.device), outcome.engine, version, str(outcome.experts), error, allowed, outcome.verdict
        )
        if outcome.reason:
            # Reasons of engines that could not be had begin with their name already.
            about = "" if outcome.reason.startswith(f"engine {outcome.engine}:") else f"engine {outcome.engine}: "
            reasons.setdefault(about + outcome.reason, []).append(outcome.device)
    return Group(table, *(Text(f"{', '.join(slices)}: {reason}") for reason, slices in reasons.items()))
