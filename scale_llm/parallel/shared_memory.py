"""Collectives of ranks on one machine's CPUs through memory that they share.

gloo passes an operation through threads and sockets, about a millisecond for a few bytes; here a rank writes its part
where the others read it, tens of microseconds. Results are the same on all ranks to the bit, because each adds the
parts of all in the order of ranks.

What the ranks share is anonymous memory of the group's first rank, which the kernel frees with the last of them.
"""

import ctypes
import mmap
import os
import secrets
import select
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from platform import machine

import torch
import torch.distributed as dist

SLOT_BYTES = 1 << 20
"""Of a rank's part of one exchange. Larger tensors take several."""

_LINE = 8
"""Words of a cache line: ranks do not write to a line that another rank writes to. A rank's first word counts the
exchanges that it has come to."""
_ASLEEP = 1
"""Word of a rank's line: where the line begins, plus 1, of the rank that it sleeps for; 0: it is awake."""

_SPINS = 400
"""Looks at another's count before a rank sleeps, some 30 microseconds: as long as falling asleep and waking up take."""

_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_FUTEX = 202
"""Number of the system call on x86-64."""


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


_LONGEST_SLEEP = _Timespec(0, 50_000_000)
"""After which a rank looks whether its peers are alive."""

_LONGEST_COUNTED = 0.5
"""Seconds of one sleep that count for the timeout."""

_LARGE = 1 << 16
"""Bytes from which on more than two ranks share the work of a sum."""

_syscall = ctypes.CDLL(None).syscall


def _futex(address: int, operation: int, value: int, timeout: _Timespec | None) -> None:
    """Linux's futex(2) on a word that processes share; what it returns is told by the word, too."""
    until = None if timeout is None else ctypes.byref(timeout)
    _syscall(_FUTEX, ctypes.c_void_p(address), operation, ctypes.c_uint32(value), until, None, 0)


class PeerLost(RuntimeError):
    """Another rank of the group has ended."""


class Channel:
    """One group's shared memory, of 2 slots a rank, used in turns: who writes into a slot again has seen all others
    arrive at the exchange after the one that they read it in."""

    def __init__(self, memory: mmap.mmap, rank: int, peers: dict[int, int], timeout_seconds: float):
        """peers: rank -> open pidfd of every other rank of the group."""
        size = len(peers) + 1
        self.rank, self.size, self._timeout = rank, size, timeout_seconds
        self._watch = select.poll()
        self._handles = {handle: peer for peer, handle in peers.items()}
        for handle in self._handles:
            self._watch.register(handle, select.POLLIN)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._words = memoryview(memory)[: 8 * size * _LINE].cast("q")
        self._mine = rank * _LINE
        self._others = [i * _LINE for i in range(size) if i != rank]
        self._slots = torch.frombuffer(memory, dtype=torch.uint8, offset=_offset(size), count=2 * size * SLOT_BYTES)
        self._count = 0
        self._views: dict[tuple[int, torch.dtype, int], list[torch.Tensor]] = {}

    def close(self) -> None:
        """Let the handles of peers go; the memory goes with the last view of it."""
        for handle in self._handles:
            os.close(handle)
        self._handles = {}

    def all_reduce(self, tensor: torch.Tensor, kind: str = "sum") -> None:
        """In place: the sum, the largest or the smallest of all ranks' tensors, element by element."""
        flat = tensor.view(-1)
        if kind == "sum" and self.size > 2 and flat.nbytes > _LARGE:
            # Each rank adds a share of it up for all: otherwise every rank would read all of every other's
            each = flat.numel() // self.size
            whole, share = flat[: each * self.size], flat.new_empty(each)
            self.reduce_scatter(share, whole)
            self.all_gather(whole, share)
            flat = flat[each * self.size :]
        for piece, _ in self._pieces_at(flat, 1):
            self._reduced(self._exchange(piece), piece, kind)

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> None:
        """output: all ranks' tensors, one after the other."""
        each = tensor.numel()
        self._check(output, self.size * each, tensor.dtype)
        flat, out = tensor.view(-1), output.view(self.size, each)
        for piece, start in self._pieces_at(flat, 1):
            for target, part in zip(out, self._exchange(piece), strict=True):
                target[start : start + piece.numel()].copy_(part)

    def reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor) -> None:
        """output: this rank's share of the sum of all tensors, which are cut in as many shares as there are ranks."""
        each = output.numel()
        self._check(tensor, self.size * each, output.dtype)
        shares, out = tensor.view(self.size, each), output.view(-1)
        for piece, start in self._pieces_at(out, self.size):
            count = piece.numel()
            given = shares[:, start : start + count]
            views = self._slots_of(tensor.dtype, self.size * count)
            views[self.rank].view(self.size, count).copy_(given)
            self._meet()
            self._reduced([view[self.rank * count : (self.rank + 1) * count] for view in views], piece, "sum")

    @staticmethod
    def _check(whole: torch.Tensor, count: int, dtype: torch.dtype) -> None:
        if whole.numel() != count or whole.dtype != dtype:
            raise ValueError(f"{whole.numel()} elements of {whole.dtype} where {count} of {dtype} are exchanged")

    def _pieces_at(self, flat: torch.Tensor, parts: int) -> list[tuple[torch.Tensor, int]]:
        """(part, where it begins) such that `parts` of its size fill no more than a slot."""
        longest = SLOT_BYTES // (parts * flat.element_size())
        if flat.numel() <= longest:
            return [(flat, 0)]
        return [(flat[start : start + longest], start) for start in range(0, flat.numel(), longest)]

    def _exchange(self, piece: torch.Tensor) -> list[torch.Tensor]:
        """All ranks' pieces, to be read before the next exchange but one."""
        views = self._slots_of(piece.dtype, piece.numel())
        views[self.rank].copy_(piece)
        self._meet()
        return views

    def _slots_of(self, dtype: torch.dtype, count: int) -> list[torch.Tensor]:
        """Every rank's slot of the exchange to come, as `count` elements."""
        key = (self._count & 1, dtype, count)
        found = self._views.get(key)
        if found is None:
            if len(self._views) > 512:
                self._views.clear()
            first = (self._count & 1) * self.size
            size = count * dtype.itemsize
            starts = [(first + i) * SLOT_BYTES for i in range(self.size)]
            found = self._views[key] = [self._slots[start : start + size].view(dtype) for start in starts]
        return found

    @staticmethod
    def _reduced(parts: list[torch.Tensor], out: torch.Tensor, kind: str) -> None:
        """One result of all parts, in their order; halves are summed in FP32 and rounded once."""
        if kind != "sum":
            combine: Callable = torch.maximum if kind == "max" else torch.minimum
            combine(parts[0], parts[1], out=out)
            for part in parts[2:]:
                combine(out, part, out=out)
        elif len(parts) == 2:
            torch.add(parts[0], parts[1], out=out)
        elif out.dtype in (torch.bfloat16, torch.float16):
            total = parts[0].float()
            for part in parts[1:]:
                total += part
            out.copy_(total)
        else:
            torch.add(parts[0], parts[1], out=out)
            for part in parts[2:]:
                out += part

    def _meet(self) -> None:
        """Say that this rank has written its part, and wait for all others'."""
        words, self._count = self._words, self._count + 1
        count, mine = self._count, self._mine
        words[mine] = count  # x86 shows others this write after those before it
        for other in self._others:
            if words[other + _ASLEEP] == mine + 1:
                _futex(self._address + 8 * mine, _FUTEX_WAKE, self.size, None)
                break
        for other in self._others:
            if words[other] < count:
                self._wait(other, count)

    def _wait(self, other: int, count: int) -> None:
        words = self._words
        for _ in range(_SPINS):
            if words[other] >= count:
                return
        looked, waited = time.monotonic(), 0.0
        words[self._mine + _ASLEEP] = other + 1
        while (seen := words[other]) < count:
            # The kernel lets this rank sleep only if the count is still the one seen. A rank that counted without
            # seeing this one asleep wakes nobody, so that the sleep has an end
            _futex(self._address + 8 * other, _FUTEX_WAIT, seen & 0xFFFFFFFF, _LONGEST_SLEEP)
            if words[other] < count:
                now = time.monotonic()
                waited += min(now - looked, _LONGEST_COUNTED)  # a job that was suspended has not waited so long
                looked = now
                self._look(other, count, waited)
        words[self._mine + _ASLEEP] = 0

    def _look(self, other: int, count: int, waited: float) -> None:
        """
        Raises:
            PeerLost: a peer has ended before it came here.
            TimeoutError: none has, and yet one does not come.
        """
        ended = {self._handles[handle] for handle, _ in self._watch.poll(0)}
        lost = [rank for rank in sorted(ended) if self._words[rank * _LINE] < count]
        if lost:
            raise PeerLost(f"connection closed by peer: rank {lost[0]} of this group has ended")
        if waited > self._timeout:
            raise TimeoutError(f"rank {other // _LINE} of this group did not come in {waited:.0f} s "
                               "(parallel.distributed_timeout_minutes)")  # fmt: skip


def _offset(size: int) -> int:
    """Where slots begin, after the counters."""
    return -(-8 * size * _LINE // mmap.PAGESIZE) * mmap.PAGESIZE


def channel_of(group: dist.ProcessGroup, timeout_seconds: float) -> Channel | None:
    """Shared memory of this group, or None where its ranks cannot share any. A collective of the group.

    Other processors than x86 may show a rank another's writes in another order than they were made.
    """
    rank, size = group.rank(), group.size()
    able = sys.platform == "linux" and machine() == "x86_64"
    length = _offset(size) + 2 * size * SLOT_BYTES
    file, told = -1, [None, 0, b""]
    if rank == 0 and able:
        with suppress(OSError):  # beyond a limit of this process, on memory or on the length of files
            mark = secrets.token_bytes(32)
            file = os.memfd_create("scale_llm", os.MFD_CLOEXEC)
            os.ftruncate(file, length)
            os.pwrite(file, mark, _offset(size))
            told = [os.getpid(), file, mark]
    every: list = [None] * size
    dist.all_gather_object(every, (os.getpid(), *told), group=group)
    owner, number, mark = every[0][1:]
    memory, peers = None, {}
    if able and owner is not None:
        with suppress(OSError, AttributeError):  # a rank elsewhere finds no such file, or one without the mark
            for peer, (process, *_) in enumerate(every):
                if peer != rank:
                    peers[peer] = os.pidfd_open(process)
            opened = os.open(f"/proc/{owner}/fd/{number}", os.O_RDWR | os.O_NOCTTY)
            try:
                if os.pread(opened, len(mark), _offset(size)) == mark:
                    memory = mmap.mmap(opened, length)
            finally:
                os.close(opened)
    shared: list = [None] * size
    dist.all_gather_object(shared, memory is not None, group=group)
    if file >= 0:
        os.close(file)
    if memory is None or not all(shared):
        for handle in peers.values():
            os.close(handle)
        return None
    return Channel(memory, rank, peers, timeout_seconds)
