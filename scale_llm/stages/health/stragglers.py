"""Which rank is slow by itself: in a step all wait for each other, so every rank times the same work of its own.

Products and copies that take some milliseconds: they find a GPU or core that is throttled, shared or broken, and not a
slow network or disk.
"""

import socket
import statistics
import time

import torch
import torch.distributed as dist

from scale_llm.parallel.device import Device

SIZE = 512
"""Rows and columns of the matrices."""
PRODUCTS, TIMES = 4, 5


class Stragglers:
    """Remembers who was slow the time before."""

    def __init__(self, device: Device, group: dist.ProcessGroup, factor: float):
        self._device, self._group, self._factor = device, group, factor
        self._slow: set[int] = set()
        generator = torch.Generator().manual_seed(0)
        self._matrix = torch.randn(SIZE, SIZE, generator=generator).to(device.device)
        self._copied = torch.zeros(1 << 22, device=device.device)

    def slow_ranks(self) -> list[tuple[int, str, float]]:
        """(rank, host, times the median) of those that were slow this time and the last. A collective."""
        told: list = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(told, (socket.gethostname(), self._seconds()), group=self._group)
        middle = statistics.median_low([seconds for _, seconds in told])
        ratios = {rank: seconds / middle for rank, (_, seconds) in enumerate(told)}
        slow = {rank for rank, ratio in ratios.items() if ratio > self._factor}
        again, self._slow = sorted(slow & self._slow), slow
        return [(rank, told[rank][0], ratios[rank]) for rank in again]

    def _seconds(self) -> float:
        """Median of a few rounds: one that something else interrupted says nothing."""
        return statistics.median(self._round() for _ in range(TIMES))

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
