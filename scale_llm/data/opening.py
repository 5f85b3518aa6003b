"""Compressed or plain files as bytes and lines; damage is an exception, never an early end."""

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

import pyarrow

DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)
"""What reading a damaged file raises."""

_SKIP = 1 << 20


class Line(NamedTuple):
    number: int
    content: bytes | None
    """None where the line is longer than allowed."""
    size: int


@contextlib.contextmanager
def open_bytes(file: str) -> Iterator[IO[bytes]]:
    """The decompressed content of a file, by its extension."""
    with open(file, "rb") as raw, decompressed(raw, file) as stream:
        yield stream


def decompressed(raw: IO[bytes], name: str) -> IO[bytes]:
    """The content of a file that is open, by the extension of its name; `raw.tell()` says how far it has been read."""
    name = name.lower()
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if name.endswith(".bz2"):
        return bz2.BZ2File(raw)  # type: ignore[return-value]
    if name.endswith(".xz"):
        return lzma.LZMAFile(raw)  # type: ignore[return-value]
    if name.endswith(".zst"):
        # zstandard's own reader takes the end of a truncated file for the end of the data
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))  # type: ignore
    return raw


def lines(stream: IO[bytes], limit: int, first: int = 1, end: int | None = None) -> Iterator[Line]:
    """Lines with their ends, numbered from `first`, up to byte `end`; one longer than `limit` bytes is not held."""
    number, position = first - 1, stream.tell() if end is not None else 0
    while (end is None or position < end) and (content := stream.readline(limit + 1)):
        number += 1
        size = len(content)
        if size <= limit:
            position += size
            yield Line(number, content, size)
            continue
        while not content.endswith(b"\n") and (content := stream.readline(_SKIP)):
            size += len(content)
        position += size
        yield Line(number, None, size)
