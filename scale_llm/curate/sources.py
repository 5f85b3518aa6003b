"""From `input` to shards: the units of work, which depend on the input and on nothing else."""

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".txt": "text", ".warc": "warc",
    ".wet": "warc",
}  # fmt: skip
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_BLOCK = 1 << 24


@dataclass(frozen=True, slots=True)
class Piece:
    """A file, or a part of it that begins and ends at ends of lines."""

    file: str
    start: int = 0
    end: int | None = None
    """Byte offset; None: to the end of the file."""
    line: int = 1
    """Number of the first line."""


Shard = list[Piece]


def kind_of(file: str) -> str | None:
    """jsonl, json, parquet, text or warc; None for other files."""
    name = file.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    kind = next((kind for extension, kind in KINDS.items() if name.endswith(extension)), None)
    return None if kind == "parquet" and name != file.lower() else kind


def expand(value: Any, key: str) -> tuple[list[str], list[str]]:
    """(absolute paths in order, problems) of a file, glob or directory, or of a list of them."""
    entries = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    files: list[str] = []
    problems = [] if entries else [f"{key}=[]: names nothing; give files, globs or directories"]
    for entry in entries:
        found, problem = _expand_one(entry, key)
        files += [file for file in found if file not in files]
        problems += [problem] if problem else []
    return files, problems


def _expand_one(entry: Any, key: str) -> tuple[list[str], str | None]:
    if not isinstance(entry, str) or not entry:
        return [], f"{key}={entry!r}: not a path; give a file, glob or directory"
    path = os.path.abspath(os.path.expanduser(entry))
    remedy = f"give files that end in {', '.join(KINDS)}, or in one of these and {', '.join(COMPRESSIONS)}"
    if os.path.isdir(path):
        found = [file for file in _walk(path) if kind_of(file)]
        return found, None if found else f"{key}={entry}: no file of a known kind in this directory; {remedy}"
    found = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
    if not found:
        return [], f"{key}={entry}: no such file, directory or match of a glob; {remedy}"
    unknown = [file for file in found if kind_of(file) is None]
    return (
        found,
        f"{key}={entry}: unknown kind of file {unknown[0]} ({len(unknown)} such); {remedy}" if unknown else None,
    )


def _walk(top: str) -> list[str]:
    found = []
    for directory, below, names in os.walk(top):
        below[:] = sorted(name for name in below if not name.startswith("."))
        found += [os.path.join(directory, name) for name in sorted(names) if not name.startswith(".")]
    return found


def shards_of(files: Iterable[str], megabytes: float) -> list[Shard]:
    """Files in their order, small ones together, large ones of plain JSONL cut, until each shard has `megabytes`.

    Counts the lines of the files that are cut, at the speed of the disk, so that a part knows its line numbers.
    """
    target = max(1, int(min(megabytes * 1e6, 2.0**62)))
    shards: list[Shard] = []
    filled = target
    for file in files:
        size = os.path.getsize(file)
        if size > target and file.lower().endswith((".jsonl", ".ndjson")):
            shards += [[piece] for piece in _cut(file, size, target)]
            filled = target
            continue
        if not shards or (filled and filled + size > target):
            shards.append([])
            filled = 0
        shards[-1].append(Piece(file))
        filled += size
    return shards


def _cut(file: str, size: int, target: int) -> list[Piece]:
    pieces: list[Piece] = []
    start, line = 0, 1
    with open(file, "rb") as stream:
        while start < size:
            newlines, left, last = 0, min(target, size - start), b""
            while left and (block := stream.read(min(left, _BLOCK))):
                newlines += block.count(b"\n")
                left, last = left - len(block), block[-1:]
            while last != b"\n" and (rest := stream.readline(_BLOCK)):
                newlines += rest.count(b"\n")
                last = rest[-1:]
            end = stream.tell()
            pieces.append(Piece(file, start, end, line))
            start, line = end, line + newlines
    return pieces


def to_json(shards: list[Shard]) -> list[list[dict[str, Any]]]:
    return [[asdict(piece) for piece in shard] for shard in shards]


def from_json(shards: list[list[dict[str, Any]]]) -> list[Shard]:
    return [[Piece(**piece) for piece in shard] for shard in shards]
