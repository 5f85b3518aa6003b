"""Files of text to Megatron's .bin and .idx, by many processes, resumable, always the same bytes.

Processes index units of the input (index_units.py, index_work.py) into files of their own, which megatron-core's own
builder puts together in their order. What is done when a run is killed is found again by the next.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np

from scale_llm.config.errors import UserError
from scale_llm.config.machine import detect
from scale_llm.data.index_units import UNIT_BYTES, Unit, units_of
from scale_llm.data.index_work import (
    IndexSettings,
    UnitCounts,
    UnitIndexer,
    counts_of_unit,
    done_file,
    unit_files,
)
from scale_llm.data.index_worker import first_line, unit_line
from scale_llm.data.indexed_check import document_marks, read_header, sequence_lengths
from scale_llm.data.megatron import DType, IndexedDatasetBuilder
from scale_llm.data.rows import MAX_PROBLEMS, OnBytes

_COPY_BYTES = 1 << 24


def token_dtype(vocab_size: int) -> str:
    """numpy's name of what Megatron stores tokens of such a vocabulary in."""
    return DType.optimal_dtype(vocab_size).__name__


def index_files(
    files: Iterable[str], settings: IndexSettings, prefix: str, parts: Path, *,
    workers: int | None = None, unit_bytes: int = UNIT_BYTES, on_bytes: OnBytes = lambda count: None,
) -> UnitCounts:  # fmt: skip
    """Writes PREFIX.bin and PREFIX.idx of the documents of all files, in their order; see `index_units`."""
    units, counts = index_units(files, settings, parts, workers=workers, unit_bytes=unit_bytes, on_bytes=on_bytes)
    add_units(prefix, settings.dtype, parts, len(units))
    return counts


def index_units(
    files: Iterable[str], settings: IndexSettings, parts: Path, *,
    workers: int | None = None, unit_bytes: int = UNIT_BYTES, on_bytes: OnBytes = lambda count: None,
) -> tuple[list[Unit], UnitCounts]:  # fmt: skip
    """The documents of all files as tokens, unit by unit.

    Args:
        parts: directory for what is done; a call with the same files and settings goes on with what it holds. Left to
            the caller, who removes it when the pair is where it should be.
        workers: processes; None: one for each core. With one, or one unit, the work is done in this process.
        unit_bytes: of input, in one unit; documents of a text file end where a unit does.
        on_bytes: told of bytes of the input that are read, or were read by an earlier call.

    Raises:
        UserError: with files and lines that cannot be read.
    """
    units = units_of(list(files), unit_bytes)
    parts.mkdir(parents=True, exist_ok=True)
    try:
        return units, run_units(units, settings, parts, workers, on_bytes)
    except WorkerKilled:
        raise
    except UserError:
        shutil.rmtree(parts, ignore_errors=True)  # the input must change, and other input is other work
        raise


def add_units(prefix: str, dtype: str, parts: Path, count: int, *, keep: bool = False) -> None:
    """PREFIX.bin and PREFIX.idx of units 0 to count - 1. keep: of what they hold now, and the units after it."""
    tokens = [unit_files(parts, number)[0] for number in range(count)]
    lengths = [np.fromfile(unit_files(parts, number)[1], dtype=np.int32) for number in range(count)]
    marks = None
    if keep:
        held, added = document_marks(prefix), sum(map(len, lengths))
        tokens, lengths = [Path(prefix + ".bin"), *tokens], [np.array(sequence_lengths(prefix)), *lengths]
        marks = np.concatenate([held, held[-1] + np.arange(1, added + 1)])
    write_pair(prefix, dtype, tokens, lengths, marks)


def run_units(
    units: list[Unit], settings: IndexSettings, parts: Path, workers: int | None, on_bytes: OnBytes
) -> UnitCounts:
    """Indexes the units that are not done yet; the counts of all."""
    size = np.dtype(settings.dtype).itemsize
    left = [number for number in range(len(units)) if counts_of_unit(parts, number, size) is None]
    for number in set(range(len(units))) - set(left):
        on_bytes(sum(span.bytes for span in units[number]))
    for remains in parts.glob("*.tmp-*"):
        remains.unlink()
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


class WorkerKilled(UserError):
    """Not the input's fault: the same call goes on from where it was."""


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

    def serve() -> None:
        """Has one process do unit after unit."""
        try:
            with _Worker(settings, parts) as worker:
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
        for result in [pool.submit(serve) for _ in range(workers)]:
            result.result()
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


def write_pair(
    prefix: str, dtype: str, tokens: Iterable[Path], lengths: list[np.ndarray], marks: np.ndarray | None = None
) -> None:
    """PREFIX.bin and PREFIX.idx of files of tokens one after another.

    Both are written under temporary names and renamed, the .idx last: where it is, the pair is whole.

    Args:
        lengths: tokens of each sequence, int32 arrays; of a file of tokens as much is taken as its array announces.
        marks: sequence at which each document ends, int64 [documents + 1], from 0; None: each is a document.
    """
    temporary = f"{prefix}.tmp-{os.getpid()}"
    builder = IndexedDatasetBuilder(temporary + ".bin", dtype=np.dtype(dtype).type)
    try:
        for file, each in zip(tokens, lengths, strict=True):
            with open(file, "rb") as stream:
                _copy(stream, builder.data_file, int(each.sum(dtype=np.int64)) * np.dtype(dtype).itemsize)
        # Its own methods take a document at a time, and keep a Python number for each
        builder.sequence_lengths = np.concatenate([np.zeros(0, dtype=np.int32), *lengths])
        builder.document_indices = np.arange(len(builder.sequence_lengths) + 1) if marks is None else marks
        builder.finalize(temporary + ".idx")
        os.replace(temporary + ".bin", prefix + ".bin")
        os.replace(temporary + ".idx", prefix + ".idx")
    finally:
        builder.data_file.close()
        for extension in (".bin", ".idx"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary + extension)


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    while size and (block := source.read(min(size, _COPY_BYTES))):
        target.write(block)
        size -= len(block)
    assert not size, "a file of tokens is shorter than its lengths"


def join_pairs(prefix: str, sources: list[str]) -> None:
    """PREFIX.bin and PREFIX.idx of the documents of whole pairs, in their order; the tokens are of one type."""
    lengths = [np.array(sequence_lengths(each)) for each in sources]
    begins = np.cumsum([0, *map(len, lengths)])
    marks = [document_marks(each)[1:] + begin for each, begin in zip(sources, begins[:-1], strict=True)]
    first = np.zeros(1, dtype=np.int64)
    files = [Path(each + ".bin") for each in sources]
    write_pair(prefix, read_header(sources[0])[0], files, lengths, np.concatenate([first, *marks]))
