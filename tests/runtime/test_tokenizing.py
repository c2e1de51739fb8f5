from __future__ import annotations

from pathlib import Path

import pytest

from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.tokenizing import open_tokenizer

pytest.importorskip("tokenizers")


def test_a_tokenizer_that_is_not_there_or_none_is_refused_by_its_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has no tokenizer"):
        open_tokenizer(tmp_path, None)
    with pytest.raises(BundleError, match=r"tokenizer\.json: missing"):
        open_tokenizer(tmp_path, "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json: cannot be read"):
        open_tokenizer(tmp_path, "tokenizer.json")
