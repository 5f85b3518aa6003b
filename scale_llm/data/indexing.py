"""Files of text to Megatron's .bin and .idx, by many processes, resumable, always the same bytes.

Processes (index_processes.py) index units of the input (index_units.py, index_work.py) into files of their own, which
megatron-core's own builder puts together in their order. What is done when a run is killed is found again by the next.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np

from scale_llm.config.errors import UserError
from scale_llm.data.index_processes import WorkerKilled, run_units
from scale_llm.data.index_units import UNIT_BYTES, Unit, units_of
from scale_llm.data.index_work import IndexSettings, UnitCounts, unit_files
from scale_llm.data.indexed_check import document_marks, read_header, sequence_lengths
from scale_llm.data.megatron import DType, IndexedDatasetBuilder
from scale_llm.data.rows import OnBytes

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
    except OSError as error:
        where, what = error.filename or parts, error.strerror or error
        raise UserError(f"{where}: {what}; the same command goes on from here") from error
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
