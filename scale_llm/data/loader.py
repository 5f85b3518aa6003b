"""This rank's micro-batches of a global batch, from any position in the stream.

Micro-batch k of data-parallel rank r holds samples consumed + (k * dp + r) * mbs and the mbs - 1 after it. So
the samples of a global batch do not depend on the data-parallel size, and the position is one number:
consumed samples.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

import numpy
import torch

Batch = dict[str, torch.Tensor]
T = TypeVar("T")


class SampleSource(Protocol):
    """Samples by their global index: as rows of tokens, and what a batch of such rows consists of."""

    def __len__(self) -> int: ...

    def rows(self, start: int, count: int) -> numpy.ndarray:
        """Tokens int64 [count, s + 1] of samples `start` and after; IndexError beyond the end."""
        ...

    def batch_of(self, rows: torch.Tensor) -> Batch:
        """The batch that rows int64 [b, s + 1] make, on their device; it shares no memory with them."""
        ...


class Ahead(Generic[T]):
    """What `load` makes of places at equal distances, made ahead by threads (mapped tokens need no processes).

    As a rank's micro-batches lie at equal distances, whatever the global batch size, what comes next is known even
    while the batch size ramps up; a jump elsewhere just starts over.
    """

    def __init__(self, load: Callable[[int], T], *, stride: int, end: int, num_workers: int):
        """end: places from here on are not loaded ahead. num_workers: threads; 0: each is loaded when asked for."""
        self._load, self._stride, self._end = load, stride, end
        self._ahead = 2 * num_workers
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="loader") if num_workers else None
        self._pending: dict[int, Future[T]] = {}

    def get(self, start: int) -> T:
        if self._pool is None:
            return self._load(start)
        wanted = range(start, start + (self._ahead + 1) * self._stride, self._stride)
        for stale in self._pending.keys() - set(wanted):
            self._pending.pop(stale).cancel()
        for place in wanted:
            if place not in self._pending and (place < self._end or place == start):
                self._pending[place] = self._pool.submit(self._load, place)
        return self._pending.pop(start).result()

    def close(self) -> None:
        """Stops the threads."""
        self._pending.clear()
        if self._pool:
            self._pool.shutdown(cancel_futures=True)


class Loader:
    """Micro-batches of one data-parallel rank; b is the micro-batch size, s the sequence length."""

    def __init__(
        self,
        dataset: SampleSource,
        *,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        num_workers: int = 0,
    ):
        assert 0 <= data_parallel_rank < data_parallel_size
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.rank = data_parallel_rank
        self.stride = micro_batch_size * data_parallel_size
        """Samples that all ranks take together by one micro-batch each."""
        self._end = len(dataset) - micro_batch_size + 1
        self._ahead = Ahead(self._load, stride=self.stride, end=self._end, num_workers=num_workers)

    def global_batch(self, consumed_samples: int, global_batch_size: int) -> Iterator[Batch]:
        """This rank's micro-batches [b, s] of the global batch that begins at sample `consumed_samples`."""
        assert global_batch_size % self.stride == 0, f"{global_batch_size} is no multiple of {self.stride}"
        first = consumed_samples + self.rank * self.micro_batch_size
        for start in range(first, first + global_batch_size, self.stride):
            yield self._get(start)

    def close(self) -> None:
        """Stops what loads ahead."""
        self._ahead.close()

    def _get(self, start: int) -> Batch:
        return self._ahead.get(start)

    def _load(self, start: int) -> Batch:
        return self.dataset.batch_of(torch.from_numpy(self.dataset.rows(start, self.micro_batch_size)))
