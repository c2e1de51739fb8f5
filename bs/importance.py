"""What a token loses without an expert: about gate weight x norm of the answer. The norms come with the bundle."""

from __future__ import annotations

import numpy as np

from wdmoe.bs.routing import Floats
from wdmoe.runtime.manifest import BsManifest


def output_norms(manifest: BsManifest) -> Floats:
    """Return the calibrated norms of a bundle: [n_blocks, n_experts], see docs/bundle-format.md, Calibration."""
    return np.array(manifest.calibration.norms, np.float32)


def norms_of_text(manifest: BsManifest) -> Floats | None:
    """Return the norms that policies may weigh by, [n_blocks, n_experts]; None: the bundle was never given a text.

    Norms of the golden rows, which are random, do not rank experts as those of a text do (docs/measurements.md).
    """
    return output_norms(manifest) if manifest.calibration.source == "text" else None
