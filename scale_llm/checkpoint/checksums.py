"""checksums.json of a checkpoint: of every other file its length and a checksum, to find what a disk or a copy has
changed.

CRC-32, because it is the fastest of the standard library: here 2.1 GB/s, SHA-256 0.5 and BLAKE2 0.3. It finds every
change within 4 bytes and all but one in four thousand million of others. It is no defence against a forger: that is
`only_data`.
"""

import json
import os
import zlib
from pathlib import Path
from typing import Any

from scale_llm.config.errors import UserError

FILE = "checksums.json"
ALGORITHM = "crc32"
PIECE_BYTES = 4 << 20

EDITED = ("config.yaml",)
"""Files that people change, as where the base of adapters has moved: no damage."""

Table = dict[str, dict[str, Any]]
"""Name below the checkpoint -> algorithm, hex digest, bytes."""


def entry(path: Path) -> dict[str, Any]:
    """Of one file, read piece by piece."""
    total = size = 0
    buffer = memoryview(bytearray(PIECE_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total, size = zlib.crc32(buffer[:count], total), size + count
    return as_entry(total, size)


def as_entry(digest: int, size: int) -> dict[str, Any]:
    """A file's line of the table."""
    return {"algorithm": ALGORITHM, "digest": f"{digest:08x}", "bytes": size}


def collect(directory: Path, tensors: Table) -> None:
    """Writes checksums.json. tensors: of the files of tensors, taken while they were written; all others are small.

    Raises:
        OSError: a file of tensors has none.
    """
    table = dict(tensors)
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        if name not in table:
            if name.endswith(".distcp"):
                raise OSError(f"no checksum of {name} was made: it belongs to no rank of this run")
            table[name] = entry(path)
    with open(directory / FILE, "w", encoding="utf-8") as file:
        json.dump(dict(sorted(table.items())), file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read(directory: Path) -> Table | None:
    """None where the checkpoint has none, as older ones and Megatron-LM's.

    Raises:
        UserError: it cannot be read.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        table = json.loads(path.read_bytes())
        if all(isinstance(value["bytes"], int) and isinstance(value["digest"], str) for value in table.values()):
            return table
        raise ValueError("not a table of lengths and digests")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def share(table: Table, rank: int, size: int) -> Table:
    """One rank's part, so that all have about as many bytes; the same table gives the same parts on every rank."""
    loads, mine = [0] * size, {}
    for name in sorted(table, key=lambda name: (-table[name]["bytes"], name)):
        least = loads.index(min(loads))
        loads[least] += table[name]["bytes"] + 1
        if least == rank:
            mine[name] = table[name]
    return mine


def problems(directory: Path, table: Table, *, hashing: bool) -> list[str]:
    """Files that are not what the table says. hashing: read them, else look at their lengths alone."""
    return [
        problem
        for name, value in table.items()
        if name not in EDITED and (problem := _problem(directory / name, value, hashing))
    ]


def _problem(path: Path, value: dict[str, Any], hashing: bool) -> str | None:
    try:
        size = path.stat().st_size
        if size != value["bytes"]:
            return f"{path}: has {size} bytes, expected {value['bytes']}"
        if not hashing or value.get("algorithm") != ALGORITHM:
            return None
        found = entry(path)["digest"]
    except FileNotFoundError:
        return f"{path}: is missing, expected {value['bytes']} bytes"
    except OSError as error:
        return f"{path}: cannot be read ({error})"
    return None if found == value["digest"] else f"{path}: has {ALGORITHM} {found}, expected {value['digest']}"
