"""What leaving experts out costs a model, block by block; measured by `wdmoe-bs calibrate`, kept beside the manifest.

Without the pair whose weight is w a token's row is off by about w times the length of the answer, and what the model
says then differs from exact in the square of that: KL = nats[block] x importance^2, summed over what is left out.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from wdmoe.bs.policies import Sensitivity
from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.manifest import SENSITIVITY_NAME, BsManifest
from wdmoe.runtime.outputs import written_whole

FORMAT, VERSION = "wdmoe-sensitivity", 1


class SensitivityFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """sensitivity.json."""

    format: str
    version: int
    bundle_id: str
    tokens: int  # of the text
    by_importance: dict[str, tuple[Sensitivity, ...]]  # `weight`, and with calibrated norms `norm`; one for each block

    def of_block(self, block: int) -> dict[str, Sensitivity]:
        """Return what policies are told of a block, by kind of importance."""
        return {kind: blocks[block] for kind, blocks in self.by_importance.items()}


def read_sensitivity(folder: Path, manifest: BsManifest) -> SensitivityFile | None:
    """Read the file of a base station's folder; None: there is none.

    Raises:
        BundleError: it is damaged, or of another bundle.
    """
    path = folder / SENSITIVITY_NAME
    if not path.exists():
        return None
    again = "make it again with wdmoe-bs calibrate, or remove it"
    try:
        found = msgspec.json.decode(path.read_bytes(), type=SensitivityFile)
    except msgspec.MsgspecError as error:
        raise BundleError(f"{path}: {error}; {again}") from error
    if (found.format, found.version) != (FORMAT, VERSION):
        raise BundleError(f"{path}: {found.format} version {found.version}, expected {FORMAT} {VERSION}; {again}")
    if found.bundle_id != manifest.bundle_id:
        raise BundleError(f"{path}: is of bundle {found.bundle_id[:12]}, this is {manifest.bundle_id[:12]}; {again}")
    if any(len(blocks) != manifest.model.n_blocks for blocks in found.by_importance.values()):
        raise BundleError(f"{path}: does not speak of {manifest.model.n_blocks} blocks; {again}")
    return found


def write_sensitivity(folder: Path, found: SensitivityFile) -> Path:
    """Write the file, whole or not at all."""
    path = folder / SENSITIVITY_NAME
    with written_whole(path) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    return path
