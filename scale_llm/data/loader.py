"""This rank's micro-batches of a global batch, from any position in the stream.

Micro-batch k of data-parallel rank r holds samples consumed + (k * dp + r) * mbs and the mbs - 1 after it. So
the samples of a global batch do not depend on the data-parallel size, and the position is one number:
consumed samples.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

Batch = dict[str, torch.Tensor]


class SampleSource(Protocol):
    """Samples by their global index; each a dict of tensors of equal shapes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]: ...


class Loader:
    """Micro-batches of one data-parallel rank; b is the micro-batch size, s the sequence length.

    With `num_workers` threads (reading mapped tokens needs no processes) the next micro-batches are made
    ahead. As a rank's micro-batches lie at equal distances, whatever the global batch size, what comes next
    is known even while the batch size ramps up; a jump elsewhere just starts over.
    """

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
        self._ahead = 2 * num_workers
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="loader") if num_workers else None
        self._pending: dict[int, Future[Batch]] = {}

    def global_batch(self, consumed_samples: int, global_batch_size: int) -> Iterator[Batch]:
        """This rank's micro-batches [b, s] of the global batch that begins at sample `consumed_samples`."""
        assert global_batch_size % self.stride == 0, f"{global_batch_size} is no multiple of {self.stride}"
        first = consumed_samples + self.rank * self.micro_batch_size
        for start in range(first, first + global_batch_size, self.stride):
            yield self._get(start)

    def close(self) -> None:
        """Stops the threads."""
        self._pending.clear()
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def _get(self, start: int) -> Batch:
        if self._pool is None:
            return self._load(start)
        wanted = range(start, start + (self._ahead + 1) * self.stride, self.stride)
        for stale in self._pending.keys() - set(wanted):
            self._pending.pop(stale).cancel()
        for place in wanted:
            inside = place + self.micro_batch_size <= len(self.dataset)
            if place not in self._pending and (inside or place == start):
                self._pending[place] = self._pool.submit(self._load, place)
        return self._pending.pop(start).result()

    def _load(self, start: int) -> Batch:
        samples = [self.dataset[index] for index in range(start, start + self.micro_batch_size)]
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
