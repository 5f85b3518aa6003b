"""A process that writes a rank's part of a checkpoint while the rank goes on.

What is forked here holds copies of every lock and none of the threads of its parent, so it touches no collective, no
GPU and no thread pool of torch: it runs torch on one thread, and ends without running anything that its parent has
registered for its end.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from scale_llm.checkpoint.checksums import Table
from scale_llm.checkpoint.results import ResultsFile
from scale_llm.checkpoint.snapshot import Release, compact
from scale_llm.checkpoint.summed_file import SummedFile


@dataclass(frozen=True, slots=True)
class Written:
    """results: where everything lies, for the index; table: checksums of this rank's files."""

    results: list[WriteResult]
    table: Table


@dataclass(frozen=True, slots=True)
class Part:
    """items: objects as bytes and tensors on the host, see `snapshot.held`. transforms: of torch's writer."""

    name: str
    items: list[tuple[WriteItem, Any]]
    transforms: Any


class PartWriter:
    """The process; it begins at once. beside: called by it with the directory, to write other files there."""

    def __init__(self, directory: Path, part: Part, beside: Callable[[Path], None] | None = None):
        self._results = ResultsFile()
        self._outcome: Written | str | None = None
        # Collecting garbage of the parent in the child would touch the GPU and copy pages
        collects = gc.isenabled()
        gc.disable()
        try:
            self._process = multiprocessing.get_context("fork").Process(
                target=_main, args=(os.getpid(), directory, part, beside, self._results)
            )
            self._process.start()
        finally:
            if collects:
                gc.enable()

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def wait(self, seconds: float) -> None:
        """Until it has ended, at most so long."""
        self._process.join(seconds)

    def stop(self) -> None:
        """Ends it, whatever it has written."""
        self._process.kill()
        self.outcome()

    def outcome(self) -> Written | str:
        """Of a process that has ended: what it wrote, or what went wrong."""
        if self._outcome is None:
            self._process.join()
            self._outcome = self._results.get(f"its writer ended with exit code {self._process.exitcode}")
        return self._outcome


def _main(
    parent: int, directory: Path, part: Part, beside: Callable[[Path], None] | None, results: ResultsFile
) -> None:  # fmt: skip
    _end_with(parent)
    torch.set_num_threads(1)  # OpenMP's threads did not come along
    # Readers of torch do not look at a CRC of each tensor, and we take one of the file: 0.6 s of a second a GB here
    torch.serialization.set_crc32_options(False)
    try:
        outcome: Written | str = write_part(directory, part)
        if beside is not None:
            beside(directory)
    except Exception as error:  # noqa: BLE001 - whatever it is, the rank tells it
        outcome = f"{type(error).__name__}: {error}"
    results.put(outcome)


def write_part(directory: Path, part: Part) -> Written:
    """Writes the file and waits until it is on the disk. The part's tensors are lost to this process.

    Raises:
        OSError: it could not be written.
    """
    release = Release(value for _, value in part.items if isinstance(value, torch.Tensor))
    results = []
    with SummedFile(directory / part.name) as file:
        for item, value in part.items:
            data = compact(value) if isinstance(value, torch.Tensor) else value
            results.append(_write_item(part.transforms, file, data, item, part.name, SerializationFormat.TORCH_SAVE))
            if isinstance(value, torch.Tensor):
                release(value)
    return Written(results, {part.name: file.entry})


def _end_with(parent: int) -> None:
    """A writer whose rank was killed would go on in a directory that the next run may be writing anew."""
    if sys.platform == "linux":
        set_death_signal = 1
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
