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
    name = file.lower()
    if name.endswith(".gz"):
        stream: IO[bytes] = gzip.open(file, "rb")  # type: ignore[assignment]
    elif name.endswith(".bz2"):
        stream = bz2.open(file, "rb")
    elif name.endswith(".xz"):
        stream = lzma.open(file, "rb")
    elif name.endswith(".zst"):
        # zstandard's own reader takes the end of a truncated file for the end of the data
        stream = io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(file), "zstd"))  # type: ignore[arg-type]
    else:
        stream = open(file, "rb")
    with stream:
        yield stream


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
