"""Which rank is slow by itself: in a step all wait for each other, so every rank times the same work of its own.

Products and copies that take some milliseconds: they find a GPU or core that is throttled, shared or broken, and not a
slow network or disk. Where nvidia-resiliency-ext is installed its report says more (straggler_report.py).
"""

import socket
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from scale_llm.parallel.device import Device
from scale_llm.stages.health.straggler_report import Scores, StragglerReport, straggler_report

SIZE = 512
"""Rows and columns of the matrices."""
PRODUCTS, TIMES = 4, 5
MEDIAN = "the median"


@dataclass(frozen=True, kw_only=True, slots=True)
class Slow:
    """A rank that took `times` as long as something, twice in a row."""

    rank: int
    host: str
    times: float
    than: str


class Stragglers:
    """Remembers who was slow the time before."""

    def __init__(self, device: Device, group: dist.ProcessGroup, factor: float, *, sees_kernels: bool = True):
        """sees_kernels: no other profiler is at work in this run."""
        self._device, self._group, self._factor = device, group, factor
        self._slow: set[tuple[int, str]] = set()
        generator = torch.Generator().manual_seed(0)
        self._matrix = torch.randn(SIZE, SIZE, generator=generator).to(device.device)
        self._copied = torch.zeros(1 << 22, device=device.device)
        self._report: StragglerReport | None = straggler_report(device, group, sees_kernels=sees_kernels)

    def watched(self) -> AbstractContextManager:
        """Around the step before a check."""
        return nullcontext() if self._report is None else self._report.watched()

    def check(self) -> tuple[list[Slow], Scores | None]:
        """Ranks that were slow this time and the last, compared with the same; and, on the first rank where
        nvidia-resiliency-ext is installed, its scores. A collective."""
        seconds = [self._round() for _ in range(TIMES)]
        told: list[Any] = [None] * dist.get_world_size(self._group)
        # The median of a few rounds: one that something else interrupted says nothing
        dist.all_gather_object(told, (socket.gethostname(), statistics.median(seconds)), group=self._group)
        middle = statistics.median_low([seconds for _, seconds in told])
        found = [(rank, MEDIAN, seconds / middle) for rank, (_, seconds) in enumerate(told)]
        scores = None
        if self._report is not None:
            scores = self._report.scores(seconds)
            reported: list[Any] = [None if scores is None else scores.times()]
            dist.broadcast_object_list(reported, group=self._group, group_src=0)
            found += reported[0]
        slow = {(rank, than): times for rank, than, times in found if times > self._factor}
        again, self._slow = sorted(slow.keys() & self._slow), set(slow)
        named = [Slow(rank=rank, host=told[rank][0], times=slow[rank, than], than=than) for rank, than in again]
        return named, scores

    @torch.no_grad()
    def _round(self) -> float:
        self._device.synchronize()
        began = time.perf_counter()
        product = self._matrix
        for _ in range(PRODUCTS):
            product = product @ self._matrix
        self._copied.clone()
        self._device.synchronize()
        return time.perf_counter() - began
