"""Files that are never half there: directories built once, by one process, and published by a rename."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Holds an exclusive lock on `path` (made if absent). Yields False where the file system has no locks.

    Without locks several processes may do the same work at once; as each publishes by a rename, that costs
    time and nothing else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
            held = True
        except OSError:
            held = False
        yield held  # closing the file releases the lock


def build_once(entry: Path, build: Callable[[Path], None]) -> Path:
    """Makes directory `entry` by `build(temporary directory)` unless it exists; others wait, then find it.

    If `build` raises, nothing is left behind; if it is killed, the next call clears what it left.
    """
    if entry.is_dir():
        return entry
    with locked(entry.with_name(entry.name + ".lock")) as held:
        if entry.is_dir():
            return entry
        if held:  # nobody else can be building now, so these are remains of killed processes
            for remains in entry.parent.glob(f"{entry.name}.tmp-*"):
                shutil.rmtree(remains, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{entry.name}.tmp-", dir=entry.parent))
        temporary.chmod(0o755)
        try:
            build(temporary)
            with contextlib.suppress(OSError):  # another process published first: its copy is the same
                os.rename(temporary, entry)
            if not entry.is_dir():
                raise OSError(f"could not publish {entry}")
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return entry


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name, then renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def fingerprint(value: Any) -> str:
    """16 hex digits that name a JSON-serialisable value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stamp(path: str) -> list[Any]:
    """What changes when the file does: [path, bytes, modification time in nanoseconds]."""
    status = os.stat(path)
    return [path, status.st_size, status.st_mtime_ns]
