"""The same micro-batches through a pipeline of NVIDIA DALI, which copies the next ones to the GPU while this one is
used (`pip install .[dali]`). On a CPU it runs without a device.

DALI's own checkpoints count iterations, and with another batch size would go on at another sample without a word. So
none is taken: the position is consumed samples, as for the other loader. Every batch travels with the sample it begins
at; after a jump, those that are in the pipeline already are thrown away.
"""

from typing import Any

import numpy
import torch

from scale_llm.data.loader import Ahead, Batch, Loader, SampleSource

DEPTH = 2
"""Batches that DALI makes ahead."""


class DaliLoader(Loader):
    """Micro-batches of one data-parallel rank, on `device`; `num_workers` threads read their tokens."""

    def __init__(
        self,
        dataset: SampleSource,
        *,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        num_workers: int = 0,
        device: torch.device | None = None,
    ):
        super().__init__(
            dataset,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
        )
        self._device = torch.device("cpu") if device is None else device
        self._rows = Ahead(self._read, stride=self.stride, end=self._end, num_workers=num_workers)
        self._fed = self._due = -1  # samples at which the next batch begins: that is fed to DALI, that is asked for
        self._copied: torch.cuda.Event | None = None  # the last batch has left DALI's memory
        self._pipeline: Any = None

    def close(self) -> None:
        self._rows.close()
        self._pipeline = None

    def _read(self, start: int) -> numpy.ndarray:
        return self.dataset.rows(start, self.micro_batch_size)

    def _get(self, start: int) -> Batch:
        if not 0 <= start < self._end:
            raise IndexError(f"samples {start} to {start + self.micro_batch_size - 1} of {len(self.dataset)}")
        if start != self._due:
            self._fed = start
        if self._pipeline is None:
            self._pipeline = self._build()
        for _ in range(DEPTH + 2):  # those of before a jump are at most so many
            if self._copied is not None:
                self._copied.synchronize()  # DALI is about to use its memory again
            rows, position = self._pipeline.run()
            if int(numpy.asarray(position.as_tensor())[0, 0]) == start:
                self._due = start + self.stride
                return self.dataset.batch_of(self._as_torch(rows.as_tensor()))
        raise RuntimeError(f"DALI did not deliver the batch that begins at sample {start}")

    def _as_torch(self, rows: Any) -> torch.Tensor:
        """int64 [b, s + 1], a copy: DALI uses its memory again."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        out = torch.empty(rows.shape(), dtype=torch.int64, device=self._device)
        if self._device.type != "cuda":
            return feed_ndarray(rows, out)
        stream = torch.cuda.current_stream(self._device)  # on another one it could overtake the last user of `out`
        feed_ndarray(rows, out, cuda_stream=stream)
        self._copied = stream.record_event()
        return out

    def _feed(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Tokens [b, s + 1] of the next batch, and where it begins [b, 1]. DALI runs ahead beyond the end too, of which
        nothing is asked for."""
        start = self._fed
        self._fed += self.stride
        rows = self._rows.get(start if start < self._end else self._end - 1)
        return rows.astype(numpy.int32), numpy.full((len(rows), 1), start, dtype=numpy.int64)

    def _build(self) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        on_gpu = self._device.type == "cuda"

        @pipeline_def(
            batch_size=self.micro_batch_size,
            num_threads=1,
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=DEPTH,
        )
        def pipeline():
            rows, position = fn.external_source(source=self._feed, num_outputs=2, batch=True)
            return fn.cast(rows.gpu() if on_gpu else rows, dtype=types.INT64), position

        built = pipeline()
        built.build()
        return built
