"""Units of indexing in this process or in several others."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from scale_llm.config.errors import UserError
from scale_llm.config.machine import detect
from scale_llm.data.index_units import Unit
from scale_llm.data.index_work import (
    IndexSettings,
    UnitCounts,
    UnitIndexer,
    counts_of_unit,
    done_file,
    temporary_ending,
)
from scale_llm.data.index_worker import first_line, unit_line
from scale_llm.data.rows import MAX_PROBLEMS, OnBytes


class WorkerKilled(UserError):
    """Not the input's fault: the same call goes on from where it was."""


def run_units(
    units: list[Unit], settings: IndexSettings, parts: Path, workers: int | None, on_bytes: OnBytes
) -> UnitCounts:
    """Indexes the units that are not done yet; the counts of all."""
    size = np.dtype(settings.dtype).itemsize
    left = [number for number in range(len(units)) if counts_of_unit(parts, number, size) is None]
    for number in set(range(len(units))) - set(left):
        on_bytes(sum(span.bytes for span in units[number]))
    for remains in parts.glob(f"*{temporary_ending('*')}"):  # of this node, where no other call is at it
        remains.unlink(missing_ok=True)
    workers = min(workers or detect().cores, len(left))
    if workers > 1:
        _run_processes(units, left, settings, parts, workers, on_bytes)
    elif left:
        indexer, found = UnitIndexer(settings, parts), _Found()
        for number in left:
            with found.collecting():
                indexer(number, units[number], on_bytes)
        found.raise_any()
    total = UnitCounts()
    for number in range(len(units)):
        counts = counts_of_unit(parts, number, size)
        assert counts is not None, f"{done_file(parts, number)} is gone"
        total.add(counts)
    return total


class _Found:
    """Problems of units in the order of their ends; past a number of them no unit is begun."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.stopped = False

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.problems += error.problems
            if self.enough:
                self.raise_any()

    @property
    def enough(self) -> bool:
        return self.stopped or len(self.problems) >= MAX_PROBLEMS

    def raise_any(self) -> None:
        if self.problems:
            raise UserError(self.problems)


def _run_processes(
    units: list[Unit], left: list[int], settings: IndexSettings, parts: Path, workers: int, on_bytes: OnBytes
) -> None:
    queue, found, lock = iter(left), _Found(), threading.Lock()
    running: list[_Worker] = []

    def serve() -> None:
        """Has one process do unit after unit."""
        try:
            with _Worker(settings, parts) as worker:
                running.append(worker)
                while True:
                    with lock:
                        number = None if found.enough else next(queue, None)
                    if number is None:
                        return
                    for message in worker.messages(number, units[number]):
                        with lock:
                            found.problems += message.get("problems", [])
                            on_bytes(message.get("bytes", 0))
        except BaseException:
            found.stopped = True
            raise

    with ThreadPoolExecutor(workers) as pool:
        results = [pool.submit(serve) for _ in range(workers)]
        try:
            for result in results:
                result.result()
        except BaseException:  # Ctrl-C too: the pool waits for its threads, and they for their processes
            found.stopped = True
            for worker in running:
                worker.kill()
            raise
    found.raise_any()


class _Worker:
    """A process of index_worker.py. Not multiprocessing's: that would run the caller's main module again, or inherit
    threads of torch and tokenizers."""

    def __init__(self, settings: IndexSettings, parts: Path):
        source = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "scale_llm.data.index_worker"], text=True, encoding="utf-8",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._send(first_line(settings, parts))

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if any(exception):
            self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def kill(self) -> None:
        """What it has not finished is done again by the next call."""
        self._process.kill()

    def _send(self, line: str) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # that it has ended is told by its silence
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def messages(self, number: int, unit: Unit) -> Iterator[dict]:
        """What it says of a unit, up to its end."""
        assert self._process.stdout
        self._send(unit_line(number, unit))
        for line in self._process.stdout:
            message = json.loads(line)
            yield message
            if "bytes" not in message:
                return
        status = self._process.wait()
        why = "killed, most likely for want of memory" if status < 0 else "its own words are above"
        raise WorkerKilled(
            f"data.index_workers: a process ended with status {status} at {unit[0].file} ({why}); the same command "
            "goes on from here, with fewer of them if memory is short"
        )
