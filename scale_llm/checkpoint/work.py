"""Dividing a conversion over the ranks of a job, where there is one, and over time."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
V = TypeVar("V")


def is_first() -> bool:
    """Whether this process does what is done once."""
    return not dist.is_initialized() or dist.get_rank() == 0


def my_share(chunks: list[Any]) -> list[Any]:
    """This rank's part of a list whose entries have `bytes`: neighbours together, shares of about equal size."""
    if not dist.is_initialized():
        return chunks
    total, before, mine = sum(chunk.bytes for chunk in chunks), 0, []
    for chunk in chunks:
        if (before + chunk.bytes / 2) * dist.get_world_size() // max(total, 1) == dist.get_rank():
            mine.append(chunk)
        before += chunk.bytes
    return mine


def every_nth(work: list[Any]) -> list[Any]:
    """This rank's part of a list of equals."""
    return work[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else work


def made_ahead(things: Iterable[T], make: Callable[[T], V]) -> Iterator[tuple[T, V]]:
    """Every thing with what is made of it; the next is made in a thread while the caller uses this one."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for thing in things:
            following = thing, pool.submit(make, thing)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result()


class WriteBehind:
    """Has the kernel write files to the disk while they still grow: left to itself it waits until memory is full of
    them, then holds the writer up. 1.7 s in place of 2.8 to 5.5 for 4.5 GB here."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def flush(self, path: Path) -> None:
        """Begins to write out what a file holds by now, unless that is still going on. Returns at once."""
        if (self._last is None or self._last.done()) and path.is_file():
            self._last = self._pool.submit(_to_disk, path)

    def close(self) -> None:
        self._pool.shutdown()


def _to_disk(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(file)
        if hasattr(os, "posix_fadvise"):  # what is written is not read again: let it not drive other files from memory
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
