"""What watches one rank between two moments: torch's profiler, NVIDIA's Nsight Systems, torch's memory history.

Each has `start()` and `stop(path)`, which writes files that begin with `path` and returns them. Files have their names
once they are whole.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity

from scale_llm.parallel.device import Device

OPERATIONS_SHOWN = 50
"""Rows of the table of operations."""

HISTORY_EVENTS = 200_000
"""Allocations and frees that the memory history keeps, the last ones: each costs kilobytes of host memory."""


class Profiler(Protocol):
    def start(self) -> None: ...

    def stop(self, path: Path) -> list[Path]: ...


def profilers(device: Device, *, record_shapes: bool, with_stack: bool, nvtx: bool, memory: bool) -> list[Profiler]:
    """Those that a rank is watched by; the one that others slow down is the last to start and the first to stop."""
    time = Nvtx(record_shapes) if nvtx else Trace(device, record_shapes=record_shapes, with_stack=with_stack)
    return [MemoryHistory(), time] if memory else [time]


class Trace:
    """A trace for Perfetto or TensorBoard, and a table of the operations that cost most.

    No table with Python's stacks: their calls would fill it, and torch 2.13 cannot always read their names back.
    """

    def __init__(self, device: Device, *, record_shapes: bool, with_stack: bool):
        self._device, self._with_table = device, not with_stack
        kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if device.is_cuda else [ProfilerActivity.CPU]
        self._profile = torch.profiler.profile(activities=kinds, record_shapes=record_shapes, with_stack=with_stack)

    def start(self) -> None:
        self._profile.start()

    def stop(self, path: Path) -> list[Path]:
        self._device.synchronize()  # kernels that have been asked for belong to the trace
        self._profile.stop()
        trace, table = path.with_name(f"{path.name}.pt.trace.json.gz"), path.with_name(f"{path.name}.txt")
        write_whole(trace, self._profile.export_chrome_trace)
        if not self._with_table:
            return [trace]
        key = "self_cuda_time_total" if self._device.is_cuda else "self_cpu_time_total"
        text = self._profile.key_averages().table(sort_by=key, row_limit=OPERATIONS_SHOWN, max_name_column_width=80)
        write_whole(table, lambda name: Path(name).write_text(text, encoding="utf-8"))
        return [trace, table]


class Nvtx:
    """Ranges for `nsys profile --capture-range=cudaProfilerApi`, which writes the file itself."""

    def __init__(self, record_shapes: bool):
        self._emit = torch.autograd.profiler.emit_nvtx(record_shapes=record_shapes)

    def start(self) -> None:
        torch.cuda.profiler.start()
        self._emit.__enter__()

    def stop(self, path: Path) -> list[Path]:
        self._emit.__exit__(None, None, None)  # waits for the GPU
        torch.cuda.profiler.stop()
        return []


class MemoryHistory:
    """Allocations and frees with their stacks, and what is held at the end, for pytorch.org/memory_viz."""

    def start(self) -> None:
        torch.cuda.memory._record_memory_history(max_entries=HISTORY_EVENTS)

    def stop(self, path: Path) -> list[Path]:
        snapshot = path.with_name(f"{path.name}.memory.pickle")
        try:
            write_whole(snapshot, torch.cuda.memory._dump_snapshot)
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
        return [snapshot]


def write_whole(path: Path, write: Callable[[str], object]) -> None:
    """Calls `write` with a temporary name, whose ending is the file's own, and gives the file its name."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
