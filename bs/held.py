"""Experts at the base station: those it keeps and runs all the time, and copies of any for when a device is lost."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np

from wdmoe.bs.kept import Kept
from wdmoe.bs.latency import LatencyTracker
from wdmoe.bs.routing import Bools
from wdmoe.runtime.engines.numpy_engine import NumpyEngine
from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.expert_sums import weighted_sums
from wdmoe.runtime.manifest import BsManifest, ExpertEntry, sha256_of
from wdmoe.runtime.messages import ExpertRequest, Rows


class HeldExperts:
    """Experts that the base station runs itself; one request at a time, whoever asks.

    What is kept was loaded at the start (`--bs-experts`). Of the rest any can be asked for (`--bs-holds`): it is loaded when
    it is needed, and of more than `limit` the oldest is given up.
    """

    name = "bs-held"
    version = NumpyEngine.version
    tolerance = NumpyEngine.tolerance

    def __init__(self, bs_folder: Path, manifest: BsManifest, limit: int, kept: Kept | None = None) -> None:
        """Point at the experts of a bundle.

        Args:
            bs_folder: the folder `bs`; the experts lie in `experts` beside it.
            manifest: of the base station.
            limit: experts in memory at a time, beside what is kept; 0: no others.
            kept: what is in memory all the time.

        Raises:
            BundleError: the experts are not there.
        """
        self._folder = bs_folder.parent / "experts"
        self._hashes = manifest.experts
        self._limit = limit
        self._one_at_a_time = threading.Lock()
        self._loaded: OrderedDict[tuple[int, int], NumpyEngine] = OrderedDict()
        self.kept = kept
        self.latency = None if kept is None else LatencyTracker(kept.profile)  # of what is kept
        if limit < 0 or (limit == 0 and kept is None):
            raise ValueError(f"--bs-holds is {limit}, expected at least 1 expert, `all` or `none`")
        missing = next((h for row in manifest.experts for h in row if not self._path(h).exists()), None)
        if limit and missing is not None:
            raise BundleError(
                f"{self._path(missing)}: missing; --bs-holds needs the folder `experts` of the bundle beside `bs`"
            )

    def keeps(self, block: int, expert: int) -> bool:
        """Whether an expert is in memory all the time."""
        return self.kept is not None and (block, expert) in self.kept.engines

    def kept_in(self, block: int) -> Bools:
        """Say which experts of a block are: [n_experts]."""
        return np.array([self.keeps(block, expert) for expert in range(len(self._hashes[block]))])

    def covers(self, block: int, expert: int) -> bool:
        """Whether it can run an expert at all."""
        return self._limit > 0 or self.keeps(block, expert)

    def predicted_ms(self, request: ExpertRequest) -> float | None:
        """Predict how long a request takes here; None where something must be loaded first."""
        if self.latency is None or not all(self.keeps(request.block, expert) for expert in request.experts):
            return None
        return self.latency.model().request_ms(request.counts)

    def run(self, block: int, expert: int, rows: Rows) -> Rows:
        """Run one expert on rows; see `ExpertEngine`.

        Raises:
            BundleError: its file is damaged.
        """
        if self.kept is not None and self.keeps(block, expert):
            return self.kept.run(block, expert, rows)
        engine = self._loaded.pop((block, expert), None) or self._load(block, expert)
        self._loaded[block, expert] = engine  # the newest is last
        while len(self._loaded) > self._limit:
            self._loaded.popitem(last=False)
        return engine.run(block, expert, rows)

    def answer(self, request: ExpertRequest, rows: Rows) -> Rows:
        """Do what a device would do with a request."""
        with self._one_at_a_time:
            return weighted_sums(self, request, rows)

    def _load(self, block: int, expert: int) -> NumpyEngine:
        expected = self._hashes[block][expert]
        path = self._path(expected)
        if (found := sha256_of(path)) != expected:
            raise BundleError(f"{path}: sha256 is {found}, its name says otherwise; copy the bundle again")
        return NumpyEngine(self._folder, [ExpertEntry(block, expert, path.name, "none")], 1)

    def _path(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.safetensors"
