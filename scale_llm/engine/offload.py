"""An engine's weights, gradients and optimizer state out of the device's memory and back.

Every storage is copied to the host and resized to nothing; on return it is resized back and filled. Tensors are views
of storages, so that megatron-core's flat buffers, the parameters in them and the optimizer's shards all stay what they
are, and a training step afterwards computes the same bits. Gradients are not kept: a step begins without any.

Freed memory stays with torch's allocator, for the other engines of the process; `torch.cuda.empty_cache()` gives it to
other processes.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from scale_llm.engine.optimizer import parts
from scale_llm.models import fp8
from scale_llm.models.adapters.layers import quantised_tensors

if TYPE_CHECKING:
    from scale_llm.engine.engine import Engine

_BLOCK_BYTES = 256 << 20
"""Of host memory: torch rounds pinned memory up to a power of two, which would double a large buffer."""


@dataclass(frozen=True, slots=True)
class Offloaded:
    """copied_bytes: to or from the host on this rank; device_bytes: with gradients, which are not copied."""

    copied_bytes: int = 0
    device_bytes: int = 0
    seconds: float = 0.0


class Offload:
    """Moves what one engine holds on its device. Calls of each kind may be repeated; the second does nothing."""

    def __init__(self, engine: "Engine"):
        # not the engine itself, which holds this: it would outlive its last use
        self._modules, self._optimizer, self._device = engine.modules, engine.optimizer, engine.device
        self._chunks = engine.chunks if engine.optimizer is not None else []  # megatron-core's wrappers
        self._host: _HostMemory | None = None  # kept: taking pinned memory is slow
        self._kept: list[tuple[torch.UntypedStorage, int]] = []
        self._dropped: list[tuple[torch.UntypedStorage, int]] = []
        self.is_away = False

    @torch.no_grad()
    def offload(self) -> Offloaded:
        """To the host. Between training steps; no collective."""
        if self.is_away:
            return Offloaded()
        self._finish_gathering()
        fp8.forget_copies(self._modules)
        self._device.synchronize()
        began = time.perf_counter()
        if self._optimizer is not None:
            self._optimizer.zero_grad()  # references to gradients, which the next step drops as well
        gradients = _storages(self._gradients())
        self._dropped = [(storage, storage.nbytes()) for storage in gradients.values()]
        kept = _storages(self._tensors())
        self._kept = [(storage, storage.nbytes()) for key, storage in kept.items() if key not in gradients]
        total = sum(count for _, count in self._kept)
        if self._host is None or self._host.size < total:
            self._host = None  # first give back the smaller one
            self._host = _HostMemory(total, pinned=self._device.is_cuda)
        for storage, host, device_part in self._pieces():
            host.copy_(_bytes_of(storage)[device_part], non_blocking=True)
        self._device.synchronize()  # copies have ended before their sources are freed
        for storage, _ in self._kept + self._dropped:
            storage.resize_(0)
        self.is_away = True
        return self._report(began)

    @torch.no_grad()
    def onload(self) -> Offloaded:
        """Back to the device; gradients are 0."""
        if not self.is_away:
            return Offloaded()
        began = time.perf_counter()
        for storage, count in self._kept + self._dropped:
            storage.resize_(count)
        for storage, host, device_part in self._pieces():
            _bytes_of(storage)[device_part].copy_(host, non_blocking=True)
        for storage, _ in self._dropped:
            _bytes_of(storage).zero_()
        self._device.synchronize()
        self.is_away = False
        report = self._report(began)
        self._kept, self._dropped = [], []  # the optimizer may let go of some before the next time
        return report

    def _report(self, began: float) -> Offloaded:
        copied = sum(count for _, count in self._kept)
        dropped = sum(count for _, count in self._dropped)
        return Offloaded(copied, copied + dropped, time.perf_counter() - began)

    def _pieces(self) -> Iterator[tuple[torch.UntypedStorage, torch.Tensor, slice]]:
        """Storages one after another in the host's memory: (storage, host bytes, where they are in the storage)."""
        offset = 0
        for storage, count in self._kept:
            for host, first in self._host.parts(offset, count):
                yield storage, host, slice(first, first + host.numel())
            offset += count

    def _tensors(self) -> Iterator[torch.Tensor]:
        """What a later step needs."""
        for module in self._modules:
            yield from module.parameters()
            yield from module.buffers()
            yield from quantised_tensors(module)
        for buffer in self._flat_buffers():
            if buffer.param_data is not None:
                yield buffer.param_data
        for part in parts(self._optimizer) if self._optimizer is not None else []:
            if part.optimizer is None:  # its ranks hold none of these parameters
                continue
            for group in part.optimizer.param_groups:
                yield from group["params"]
            for state in part.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, torch.Tensor))

    def _gradients(self) -> Iterator[torch.Tensor]:
        return (buffer.grad_data for buffer in self._flat_buffers())

    def _flat_buffers(self) -> Iterator:
        """megatron-core's, of gradients and, with the distributed optimizer, of weights."""
        for chunk in self._chunks:
            yield from chunk.buffers
            yield from chunk.expert_parallel_buffers

    def _finish_gathering(self) -> None:
        """Waits for weights that are on their way into a buffer; a pass that uses them all leaves none."""
        for chunk in self._chunks:
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                if group.param_gather_handle is not None:
                    group.param_gather_handle.wait()
                    group.param_gather_handle = None
                assert group.grad_reduce_handle is None, "offload in the middle of a training step"


class _HostMemory:
    """Bytes of the host in blocks, seen as one row."""

    def __init__(self, size: int, *, pinned: bool):
        self.size = size
        sizes = [min(_BLOCK_BYTES, size - first) for first in range(0, size, _BLOCK_BYTES)]
        self._blocks = [torch.empty(count, dtype=torch.uint8, pin_memory=pinned) for count in sizes]

    def parts(self, offset: int, count: int) -> Iterator[tuple[torch.Tensor, int]]:
        """The bytes from `offset` on, cut where blocks end: (part, its first byte counted from `offset`)."""
        done = 0
        while done < count:
            block, first = divmod(offset + done, _BLOCK_BYTES)
            part = self._blocks[block][first : first + count - done]
            yield part, done
            done += part.numel()


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """Each storage once."""
    return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


@contextmanager
def on_device(engines: Iterable["Engine | None"]) -> Iterator[None]:
    """Engines that are offloaded come back, and go again afterwards. None: no part of the model is on this rank."""
    away = [engine for engine in engines if engine is not None and engine.is_away]
    for engine in away:
        engine.onload()
    try:
        yield
    finally:
        for engine in away:
            engine.offload()
