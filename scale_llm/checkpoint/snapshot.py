"""A rank's tensors as they are at one moment, without a copy of them.

A forked process sees the memory of its parent as it was at the fork: the kernel copies a page when one of the two
writes to it. That holds for private memory. Memory that is shared between processes is not copied by the kernel, so
tensors there are copied before the fork; and so are tensors of a GPU, which come to the host as megatron-core has them
come.
"""

import ctypes
import mmap
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path

import torch

Range = tuple[int, int]
"""Addresses [first, end)."""


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


class Release:
    """For a forked process: gives pages back that it has written, so that its parent, which goes on changing them, need
    not copy them any more."""

    def __init__(self, tensors: Iterable[torch.Tensor]):
        """tensors: all that will be written. Memory that two of them share is kept."""
        ranges = sorted(map(_range, tensors))
        self._overlapping = {one for pair in zip(ranges, ranges[1:], strict=False) if pair[0][1] > pair[1][0]
                             for one in pair}  # fmt: skip
        try:
            self._madvise = ctypes.CDLL(None, use_errno=True).madvise
            self._madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        except (OSError, AttributeError):
            self._madvise = None

    def __call__(self, tensor: torch.Tensor) -> None:
        """The tensor's values are lost to this process."""
        span = _range(tensor)
        first, end = -(-span[0] // mmap.PAGESIZE) * mmap.PAGESIZE, span[1] // mmap.PAGESIZE * mmap.PAGESIZE
        if self._madvise is not None and end > first and span not in self._overlapping:
            self._madvise(first, end - first, mmap.MADV_DONTNEED)  # a refusal costs a copy, nothing else


def _range(tensor: torch.Tensor) -> Range:
    """Of the tensor's elements; of its whole storage where they do not lie together."""
    if tensor.is_contiguous():
        return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
