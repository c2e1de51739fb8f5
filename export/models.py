"""The words that `--model` takes: a checkpoint folder, an alias, or a model of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wdmoe.export.families import check_family
from wdmoe.runtime.errors import CheckpointError

SMALL_MODEL = "smollm2-moe"  # made on this machine, see smollm2.py
ALIASES = {
    "mixtral": "mistralai/Mixtral-8x7B-v0.1",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "mixtral-8x7b-instruct": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "mixtral-8x22b": "mistralai/Mixtral-8x22B-v0.1",
    "olmoe": "allenai/OLMoE-1B-7B-0924",
    "qwen2-moe": "Qwen/Qwen1.5-MoE-A2.7B",
    "qwen3-moe": "Qwen/Qwen3-30B-A3B",
    "granite-moe": "ibm-granite/granite-3.0-1b-a400m-base",
}
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]
_HUB_PATIENCE_S = 10.0


def find_checkpoint(model: str, report: Callable[[str], None]) -> tuple[Path, str]:
    """Find the checkpoint that a word means, downloading or making it where needed.

    Args:
        model: the word.
        report: told what is being done.

    Returns:
        The checkpoint's folder, and what the model is called.

    Raises:
        CheckpointError: there is no such thing, or it cannot be had; names what to give instead.
    """
    if Path(model).expanduser().is_dir():
        folder = Path(model).expanduser()
        return folder, folder.resolve().name
    if model == SMALL_MODEL:
        from wdmoe.export.smollm2 import smollm2_moe_checkpoint

        return smollm2_moe_checkpoint(report=report), SMALL_MODEL
    repository = ALIASES.get(model, model)
    if repository.count("/") != 1 or repository.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{model}: no such folder, and not a hub id (ORGANISATION/NAME) or an alias "
            f"({', '.join([SMALL_MODEL, *ALIASES])})"
        )
    return _hub_checkpoint(repository, report), repository


def _hub_checkpoint(repository: str, report: Callable[[str], None], endpoint: str | None = None) -> Path:
    """Fetch a checkpoint, config first: a model that cannot be exported is refused before its weights are fetched."""
    try:
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.errors import RepositoryNotFoundError as NotFoundError
    except ImportError as error:
        raise CheckpointError(
            f"{repository}: huggingface_hub is not installed; pip install 'wdmoe[export]', or give --model PATH"
        ) from error

    revision: str | None = None
    # NOTE: asked first because downloads retry for half a minute when there is no network; this call does not.
    try:
        revision = HfApi(endpoint).model_info(repository, timeout=_HUB_PATIENCE_S).sha
    except (NotFoundError, HFValidationError) as error:
        raise hub_problem(repository, error) from error
    except Exception as error:  # noqa: BLE001 - whatever the network library of the hub's version raises
        report(f"{repository}: the Hugging Face hub cannot be reached ({_first_line(error)}); looking for a local copy")
    here = revision is None
    options: dict[str, Any] = {"revision": revision, "local_files_only": here, "endpoint": endpoint}
    with _told_of(repository):
        config = Path(hf_hub_download(repository, "config.json", **options))
    check_family(_config(config), f"{repository}/config.json")
    if not here:
        report(f"{repository}: downloading")
    with _told_of(repository):
        return Path(snapshot_download(repository, allow_patterns=_HUB_FILES, **options))


@contextmanager
def _told_of(repository: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise hub_problem(repository, error) from error


def hub_problem(repository: str, error: Exception) -> CheckpointError:
    """Say what went wrong between the hub and us, and what to do.

    NOTE: a gated model shows its description to everybody and refuses its files, so each request may end so.
    """
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.errors import RepositoryNotFoundError as NotFoundError

    if isinstance(error, GatedRepoError):
        return CheckpointError(
            f"{repository}: gated: accept its licence at https://huggingface.co/{repository} and log in with "
            "`hf auth login`; or give --model PATH"
        )
    if isinstance(error, NotFoundError | HFValidationError):
        return CheckpointError(f"{repository}: not found on the Hugging Face hub; or give --model PATH")
    if isinstance(error, LocalEntryNotFoundError):
        return CheckpointError(
            f"{repository}: no such folder; as a hub id, not in the local cache, and the Hugging Face hub cannot be reached; download it where "
            f"there is a network (hf download {repository} --local-dir FOLDER) and give --model FOLDER"
        )
    if isinstance(error, EntryNotFoundError):
        return CheckpointError(f"{repository}: has no config.json on the Hugging Face hub; or give --model PATH")
    return CheckpointError(
        f"{repository}: download broke off ({_first_line(error)}); the same command goes on, or give --model PATH"
    )


def _config(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_bytes())
    return content if isinstance(content, dict) else {}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
