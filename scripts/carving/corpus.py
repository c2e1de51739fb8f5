"""Windows of text to train the shipped small model on, drawn from the files of the corpus by fixed shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WINDOW = 512  # tokens
HELD_OUT_SHARE = 0.05  # of each corpus file, from its end
HELD_OUT_WINDOWS = 32
# Windows to train on are drawn by these shares: running text of an encyclopaedia first, as most text is prose.
SHARES = {
    "wikipedia_en_sample": 0.5,
    "classic_books": 0.15,
    "qa_train": 0.12,
    "household_management": 0.05,
    "openstax_anatomy-physiology": 0.05,
    "openstax_chemistry-bundle": 0.05,
    "openstax_physics": 0.05,
    "wordnet_glosses": 0.03,
}


def corpus_windows(data_dir: Path, tokenizer: Any, windows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return windows [n, WINDOW] of tokens to train on, drawn by `SHARES` and shuffled, and held out ones, of all files.

    Raises:
        FileNotFoundError: a file of the corpus is missing.
    """
    generator = torch.Generator().manual_seed(seed)
    train, held_out = [], []
    for name, share in sorted(SHARES.items()):
        text = (data_dir / "corpus" / f"{name}.txt").read_text(encoding="utf-8")
        cut = int(len(text) * (1 - HELD_OUT_SHARE))
        first, last = (
            _cut(tokenizer.encode(piece, add_special_tokens=False).ids) for piece in (text[:cut], text[cut:])
        )
        train.append(first[torch.randperm(len(first), generator=generator)][: round(windows * share)])
        held_out.append(last)
    joined, held = torch.cat(train), torch.cat(held_out)
    joined = joined[torch.randperm(len(joined), generator=generator)]
    return joined, held[torch.randperm(len(held), generator=generator)][:HELD_OUT_WINDOWS]


def _cut(ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
