"""Files on the disk: one whose checksum is taken while it is written, and waiting until one is there."""

import errno
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scale_llm.checkpoint import checksums
from scale_llm.checkpoint.work import WriteBehind

SMALL_BYTES = 64 << 10
"""Writes below are collected: torch.save makes many of a few bytes."""

PIECE_BYTES = 16 << 20
"""Of a large write: one thread takes its checksum (1.8 GB/s here) while another gives it to the kernel (2.4 GB/s)."""

BEHIND_BYTES = 64 << 20
"""The kernel is asked to begin writing to the disk each time that so many have come; by itself it would wait."""


class SummedFile:
    """A stream for torch.save, written from its beginning to its end. Use it in a `with`; afterwards it is on the disk,
    and `entry` is there."""

    def __init__(self, path: Path):
        self._path, self._collected = path, bytearray()
        self._size = self._digest = self._asked_at = 0
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._summing, self._behind = ThreadPoolExecutor(1), WriteBehind()

    def __enter__(self) -> "SummedFile":
        return self

    def write(self, data: Any) -> int:
        """Raises OSError where the disk is full."""
        piece = memoryview(data).cast("B")
        if len(piece) < SMALL_BYTES:
            self._collected += piece
            if len(self._collected) >= PIECE_BYTES:
                self._write_collected()
        else:
            self._write_collected()
            self._write(piece)
        return len(piece)

    def tell(self) -> int:
        return self._size + len(self._collected)

    def flush(self) -> None:
        """Nothing: torch.save asks for it after every tensor, and nobody reads the file before it is closed."""

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        try:
            if kind is None:
                self._write_collected()
                os.fsync(self._file.fileno())
        finally:
            self._behind.close()
            self._summing.shutdown()
            self._file.close()

    @property
    def entry(self) -> dict[str, Any]:
        """For checksums.json."""
        return checksums.as_entry(self._digest, self._size)

    def _write_collected(self) -> None:
        collected, self._collected = self._collected, bytearray()
        self._write(memoryview(collected))

    def _write(self, data: memoryview) -> None:
        for first in range(0, len(data), PIECE_BYTES):
            piece = data[first : first + PIECE_BYTES]
            digest = self._summing.submit(zlib.crc32, piece, self._digest)
            written = 0
            while written < len(piece):
                written += self._file.write(piece[written:])
            self._digest = digest.result()
            self._size += len(piece)
            if self._size >= self._asked_at + BEHIND_BYTES:
                self._asked_at = self._size
                self._behind.flush(self._path)


def to_disk(path: Path) -> None:
    """Waits until a file's content, or the names in a directory, would outlast a power cut.

    Raises:
        OSError: the disk has failed, or is full.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some network file systems
            raise
    finally:
        os.close(handle)
