"""The files of the embedded corpus: sources of the running Python's standard library."""

import hashlib
import os
import sysconfig
from pathlib import Path

from scale_llm.config.errors import UserError


def embedded_files(megabytes: float | None = None) -> list[str]:
    """Source files of the running Python's standard library, at most `megabytes` (10**6 bytes) of them.

    Ordered by a hash of their name within the library: always the same, and any share of the list is a fair
    sample (by name, validation would be all of `unittest` to `zipfile`).
    """
    top = sysconfig.get_path("stdlib")
    found = []
    for directory, below, files in os.walk(top):
        below[:] = [name for name in below if name not in ("site-packages", "dist-packages", "__pycache__")]
        found += [os.path.join(directory, name) for name in files if name.endswith(".py")]
    found.sort(key=lambda file: hashlib.sha256(Path(file).relative_to(top).as_posix().encode()).digest())
    if not found:
        raise UserError(f"data.path=null: this Python has no standard library sources in {top}; set data.path")
    if megabytes is None:
        return found
    kept: list[str] = []
    size = 0
    for file in found:
        size += os.path.getsize(file)
        if kept and size > megabytes * 1e6:
            break
        kept.append(file)
    return kept
