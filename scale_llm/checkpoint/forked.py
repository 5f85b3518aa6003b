"""A process that does one thing with the memory of this one as it is now, while this one goes on.

What is forked holds copies of every lock and none of the threads of its parent, so it may touch no collective, no GPU
and no thread pool that is there already: it runs torch on one thread, and ends without running anything that its parent
has registered for its own end.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")

BEHIND = 10
"""Niceness: where cores are few, what goes on comes first; a save that is waited for has the cores to itself."""


class Forked(Generic[T]):
    """Runs the action; begins at once."""

    def __init__(self, action: Callable[[], T]):
        self._results = _ResultsFile()
        # Pinned memory is shared with the child, not copied: let go of here, it would be filled anew under its eyes
        self._action: Callable[[], T] | None = action
        self._told: tuple[Any, str | None] | None = None
        # Collecting garbage of the parent in the child would touch the GPU and copy pages
        collects = gc.isenabled()
        gc.disable()
        try:
            context = multiprocessing.get_context("fork")
            self._process = context.Process(target=_main, args=(os.getpid(), action, self._results))
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
        """Ends it, whatever it has done."""
        self._process.kill()
        self._ended()

    def problem(self) -> str | None:
        """What went wrong, once it has ended; waits for that."""
        return self._ended()[1]

    def outcome(self) -> T:
        """What the action returned; None where there is a problem."""
        return self._ended()[0]

    def _ended(self) -> tuple[Any, str | None]:
        if self._told is None:
            self._process.join()
            self._action = None
            self._told = self._results.get((None, f"its process ended with exit code {self._process.exitcode}"))
        return self._told


def _main(parent: int, action: Callable[[], Any], results: "_ResultsFile") -> None:
    _end_with(parent)
    os.nice(BEHIND)
    torch.set_num_threads(1)  # OpenMP's threads did not come along
    try:
        told: tuple[Any, str | None] = action(), None
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent tells it
        told = None, f"{type(error).__name__}: {error}"
    results.put(told)


def _end_with(parent: int) -> None:
    """One whose rank was killed would go on in a directory that the next run may be writing anew."""
    if sys.platform == "linux":
        set_death_signal = 1
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


class _ResultsFile:
    """One object from a forked process to its parent, which reads when the process has ended.

    A file, because a pipe would block the writer of a large object until somebody reads, and megatron-core's manager
    process takes a second and a half and 270 MB, and stays behind for ever where its rank is killed.
    """

    def __init__(self) -> None:
        handle, self._path = tempfile.mkstemp(prefix="scale_llm_results_")
        os.close(handle)

    def put(self, value: Any) -> None:
        with open(self._path, "wb") as file:
            pickle.dump(value, file)

    def get(self, otherwise: Any) -> Any:
        """otherwise: what to return where the process ended before it wrote."""
        try:
            with open(self._path, "rb") as file:
                return pickle.load(file)  # our own process wrote it a moment ago
        except (EOFError, FileNotFoundError, pickle.UnpicklingError):
            return otherwise
        finally:
            if os.path.exists(self._path):
                os.unlink(self._path)
