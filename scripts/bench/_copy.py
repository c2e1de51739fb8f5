"""Copy files as a plain script would: read, SHA-256, write, fsync. The yardstick of `export_scale.py`.

python _copy.py SOURCE... TARGET_FOLDER
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

PIECE_BYTES = 1 << 20


def main(*names: str) -> None:
    *sources, folder = map(Path, names)
    folder.mkdir()
    for source in sources:
        digest = hashlib.sha256()
        with source.open("rb") as read, (folder / source.name).open("wb") as written:
            while piece := read.read(PIECE_BYTES):
                digest.update(piece)
                written.write(piece)
            written.flush()
            os.fsync(written.fileno())
        print(digest.hexdigest(), source.name)


if __name__ == "__main__":
    main(*sys.argv[1:])
