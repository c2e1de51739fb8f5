"""Experts that the base station keeps itself, for when a device is lost: loaded when needed, the oldest given up."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from wdmoe.runtime.engines.numpy_engine import NumpyEngine
from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.expert_sums import weighted_sums
from wdmoe.runtime.manifest import BsManifest, ExpertEntry, sha256_of
from wdmoe.runtime.messages import ExpertRequest, Rows


class HeldExperts:
    """Any expert of the model, at most `limit` of them in memory; belongs to one thread at a time."""

    name = "bs-held"
    version = NumpyEngine.version
    tolerance = NumpyEngine.tolerance

    def __init__(self, bs_folder: Path, manifest: BsManifest, limit: int) -> None:
        """Point at the experts of a bundle.

        Args:
            bs_folder: the folder `bs`; the experts lie in `experts` beside it.
            manifest: of the base station.
            limit: experts in memory at a time.

        Raises:
            BundleError: the experts are not there.
        """
        self._folder = bs_folder.parent / "experts"
        self._hashes = manifest.experts
        self._limit = limit
        self._loaded: OrderedDict[tuple[int, int], NumpyEngine] = OrderedDict()
        if limit < 1:
            raise ValueError(f"--bs-holds is {limit}, expected at least 1 expert, `all` or `none`")
        missing = next((h for row in manifest.experts for h in row if not self._path(h).exists()), None)
        if missing is not None:
            raise BundleError(
                f"{self._path(missing)}: missing; --bs-holds needs the folder `experts` of the bundle beside `bs`"
            )

    def run(self, block: int, expert: int, rows: Rows) -> Rows:
        """Run one expert on rows; see `ExpertEngine`.

        Raises:
            BundleError: its file is damaged.
        """
        engine = self._loaded.pop((block, expert), None) or self._load(block, expert)
        self._loaded[block, expert] = engine  # the newest is last
        while len(self._loaded) > self._limit:
            self._loaded.popitem(last=False)
        return engine.run(block, expert, rows)

    def answer(self, request: ExpertRequest, rows: Rows) -> Rows:
        """Do what a device would do with a request."""
        return weighted_sums(self, request, rows)

    def _load(self, block: int, expert: int) -> NumpyEngine:
        expected = self._hashes[block][expert]
        path = self._path(expected)
        if (found := sha256_of(path)) != expected:
            raise BundleError(f"{path}: sha256 is {found}, its name says otherwise; copy the bundle again")
        return NumpyEngine(self._folder, [ExpertEntry(block, expert, path.name, "none")], 1)

    def _path(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.safetensors"
