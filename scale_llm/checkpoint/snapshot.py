"""A rank's tensors as they are at one moment, without a copy of them.

A forked process sees the memory of its parent as it was at the fork: the kernel copies a page when one of the two
writes to it. That holds for private memory. Memory that is shared between processes is not copied by the kernel, so
tensors there are copied before the fork; and so are tensors of a GPU, which come to the host as megatron-core has them
come.
"""

import ctypes
import mmap
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

Range = tuple[int, int]
"""Addresses [first, end)."""

DONT_FORK, DO_FORK = 10, 11
"""Linux's numbers, which Python's mmap has not on every build."""


class SharedMemory:
    """Where in this process' memory a change by anybody is seen by all, as the kernel says now."""

    def __init__(self, maps: Path = Path("/proc/self/maps")):
        self._ranges: list[Range] = []
        if maps.is_file():  # Linux
            for line in maps.read_text().splitlines():
                addresses, permissions = line.split(maxsplit=2)[:2]
                if permissions.endswith("s"):
                    first, end = (int(word, 16) for word in addresses.split("-"))
                    self._ranges.append((first, end))
        self._ranges.sort()

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether any byte of the tensor's storage lies there."""
        first = tensor.untyped_storage().data_ptr()
        end = first + tensor.untyped_storage().nbytes()
        place = bisect_right(self._ranges, (end - 1, end)) - 1
        return tensor.is_shared() or (place >= 0 and self._ranges[place][1] > first and self._ranges[place][0] < end)


def held(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors on the host, such that a process forked now will find these values there, whatever is done to the
    originals afterwards."""
    shared, found, is_copying = SharedMemory(), [], False
    for tensor in tensors:
        tensor = tensor.detach()
        if tensor.device.type != "cpu":
            tensor, is_copying = tensor.to("cpu", non_blocking=True), True
        elif shared.holds(tensor):
            tensor = tensor.clone()
        found.append(tensor)
    if is_copying:
        torch.cuda.synchronize()
    return found


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on a storage of its own size, for torch.save writes the whole storage of a view. No copy where the
    view's elements lie together."""
    count, storage = tensor.numel() * tensor.element_size(), tensor.untyped_storage()
    if storage.nbytes() == count:
        return tensor
    if count == 0 or not tensor.is_contiguous():
        return tensor.clone()
    first = tensor.storage_offset() * tensor.element_size()
    return tensor.new_empty(0).set_(storage[first : first + count], 0, tensor.shape, tensor.stride())


@contextmanager
def left_out(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """A process forked in this block has not the memory of these tensors: the fork is faster, and the pages need not be
    copied when this process writes to them. It is killed if it looks at them."""
    pages = [_pages(tensor) for tensor in tensors if tensor.device.type == "cpu"]
    done = [span for span in pages if _advise(span, DONT_FORK)]
    try:
        yield
    finally:
        for span in done:
            _advise(span, DO_FORK)


class Release:
    """For a forked process: gives pages back that it has written, so that its parent, which goes on changing them, need
    not copy them any more."""

    def __init__(self, tensors: Iterable[torch.Tensor]):
        """tensors: all that will be written. Memory that two of them share is kept."""
        self._overlapping: set[Range] = set()
        furthest = (0, 0)
        for span in sorted(map(_range, tensors)):
            if span[0] < furthest[1]:
                self._overlapping |= {span, furthest}
            furthest = max(span, furthest, key=lambda one: one[1])

    def __call__(self, tensor: torch.Tensor) -> None:
        """The tensor's values are lost to this process."""
        if _range(tensor) not in self._overlapping:
            _advise(_pages(tensor), mmap.MADV_DONTNEED)


def _pages(tensor: torch.Tensor) -> Range:
    """Those that hold nothing but the tensor."""
    first, end = _range(tensor)
    return -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE


def _advise(span: Range, advice: int) -> bool:
    """Tells the kernel what is planned with pages; False where it does not want to know. That costs time alone."""
    if span[1] <= span[0] or sys.platform != "linux":
        return False
    return ctypes.CDLL(None).madvise(ctypes.c_void_p(span[0]), ctypes.c_size_t(span[1] - span[0]), advice) == 0


def _range(tensor: torch.Tensor) -> Range:
    """Of the tensor's elements; of its whole storage where they do not lie together."""
    if tensor.is_contiguous():
        return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
