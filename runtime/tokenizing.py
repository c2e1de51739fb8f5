"""The tokenizer of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wdmoe.runtime.errors import BundleError, EngineError


def open_tokenizer(folder: Path, name: str | None) -> Any:
    """Open a bundle's `tokenizers.Tokenizer`.

    Args:
        folder: of the base station.
        name: of the file in it, as the manifest has it.

    Raises:
        BundleError: there is none, or it is missing or damaged.
        EngineError: `tokenizers` is not installed.
    """
    if name is None:
        raise BundleError(f"{folder}: the bundle has no tokenizer; export a checkpoint with tokenizer.json")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise EngineError(f"text needs tokenizers ({error}): pip install 'wdmoe[bs]'") from error
    path = folder / name
    if not path.is_file():
        raise BundleError(f"{path}: missing; copy the folder again")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # it raises plain Exception
        raise BundleError(f"{path}: cannot be read ({error}); copy the folder again") from error
