"""Rows of JSONL, JSON and Parquet files, each with its file and line; bad rows go to `Problems`.

A `.json` file holds either one object a line, as Megatron's own tools read it, or one array of objects. Lines count
from 1; in an array and in Parquet the row's number stands in place of the line. No torch.
"""

import codecs
import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from scale_llm.config.errors import UserError
from scale_llm.data import opening
from scale_llm.data.sources import uncompressed_name

MAX_PROBLEMS = 20

_UNLIMITED = 1 << 62

NOT_JSON = (ValueError, RecursionError)
"""What Python's reader raises. The second is for what is nested too deeply."""

OnBytes = Callable[[int], None]
"""Called with the number of file bytes read since the last call."""


class Part(NamedTuple):
    """What to read of a file. Lines, and rows of Parquet, count from the start of the part."""

    start: int = 0
    """A byte after an end of line; of a Parquet file a row group."""
    end: int | None = None
    """The byte, or row group, that is no longer read; None: to the end of the file."""
    limit_bytes: int | None = None
    """Lines that are longer are bad rows and are not held in memory."""


WHOLE = Part()


class Row(NamedTuple):
    values: dict[str, Any]
    file: str
    line: int


@dataclass(kw_only=True, slots=True)
class Problems:
    """Bad rows, collected up to a cap."""

    found: list[str] = field(default_factory=list)
    """Each `file:line: what is wrong`; for Parquet the row in place of the line, from 1."""
    empty: int = 0
    """Documents without text, which are left out."""

    def add(self, file: str, line: int, message: str, kind: str = "bad row") -> None:
        """kind: what rows with the same fault are counted under, by whoever counts them."""
        self.found.append(f"{file}:{line}: {message}")
        if len(self.found) >= MAX_PROBLEMS:
            self.found.append(f"(stopped after {MAX_PROBLEMS} problems)")
            self.raise_any()

    def add_file(self, file: str, line: int, message: str) -> None:
        """A fault after which the rest of the file cannot be read: no mere row."""
        self.add(file, line, message)

    def raise_any(self) -> None:
        if self.found:
            raise UserError(self.found)


@dataclass(kw_only=True, slots=True)
class _FileFaults(Problems):
    """For a file that is one value: a line that cannot be read is a fault of the file, not of a row."""

    outer: Problems

    def add(self, file: str, line: int, message: str, kind: str = "bad row") -> None:
        self.found.append(message)
        self.outer.add_file(file, line, message)


def read_rows(
    file: str,
    problems: Problems,
    on_bytes: OnBytes | None = None,
    columns: Collection[str] | None = None,
    part: Part = WHOLE,
) -> Iterator[Row]:
    """Rows of one file in order.

    Args:
        columns: of a Parquet file read these alone (those that it has); None: all.
    """
    name = uncompressed_name(file)
    if name.endswith(".parquet"):
        return _parquet_rows(file, problems, on_bytes, columns, part)
    if name.endswith(".json") and _is_array(file):
        return _array_rows(file, problems, on_bytes)
    return _jsonl_rows(file, problems, on_bytes, part)


def lines(file: str, problems: Problems, on_bytes: OnBytes | None, part: Part = WHOLE) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its end) of a plain or compressed UTF-8 file; progress in bytes on disk."""
    number, seen = 0, part.start
    limit = _UNLIMITED if part.limit_bytes is None else part.limit_bytes
    with open(file, "rb") as raw:
        raw.seek(part.start)
        try:
            for number, line, size in opening.lines(opening.decompressed(raw, file), limit, end=part.end):
                if on_bytes and raw.tell() != seen:
                    on_bytes(raw.tell() - seen)
                    seen = raw.tell()
                if line is None:
                    problems.add(file, number, too_large(size, limit), "too large")
                    continue
                try:
                    text = line.decode("utf-8-sig" if number == 1 and not part.start else "utf-8")
                except UnicodeDecodeError as error:
                    message = f"not UTF-8 ({error.reason}); convert the file to UTF-8"
                    problems.add(file, number, message, "not UTF-8")
                    continue
                yield number, text
        except opening.DAMAGED as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk, not the file
            problems.add_file(file, number + 1, f"damaged file, cannot be read from here on ({error}); copy it again")


def too_large(size: int, limit: int) -> str:
    return f"{size:,} bytes, {limit:,} are read at most; raise data.max_document_megabytes"


def encodable(text: str) -> bool:
    """JSON escapes can spell what is no Unicode text, which neither tokenizers nor files can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def parquet_columns(file: str, problems: Problems) -> list[str] | None:
    """Names of a Parquet file's columns; None, and a problem, where it is none."""
    table = _open_parquet(file, problems)
    if table is None:
        return None
    with table:
        return table.schema_arrow.names


def _jsonl_rows(file: str, problems: Problems, on_bytes: OnBytes | None, part: Part) -> Iterator[Row]:
    for number, line in lines(file, problems, on_bytes, part):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except NOT_JSON as error:
            problems.add(file, number, f"not JSON ({error}); every line must be one object", "not JSON")
            continue
        if isinstance(value, dict):
            yield Row(value, file, number)
        else:
            message = f"{type(value).__name__}, not an object; every line must be one object"
            problems.add(file, number, message, "not an object")


def _is_array(file: str) -> bool:
    """Is the first thing in it the start of an array? A damaged file is left to its reader."""
    with contextlib.suppress(*opening.DAMAGED), opening.open_bytes(file) as stream:
        start = stream.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()
        while not start and (block := stream.read(1 << 16)):
            start = block.lstrip()
        return start.startswith(b"[")
    return False


def _array_rows(file: str, problems: Problems, on_bytes: OnBytes | None) -> Iterator[Row]:
    faults = _FileFaults(outer=problems)
    text = "".join(line for _, line in lines(file, faults, on_bytes))
    if faults.found:
        return
    try:
        values = json.loads(text)
    except NOT_JSON as error:
        problems.add_file(file, getattr(error, "lineno", 1), f"not a JSON array of objects ({error}); write it again")
        return
    for number, value in enumerate(values, start=1):
        if isinstance(value, dict):
            yield Row(value, file, number)
        else:
            message = f"{type(value).__name__}, not an object; every entry of the array must be one object"
            problems.add(file, number, message, "not an object")


def _open_parquet(file: str, problems: Problems) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        problems.add_file(file, 1, f"not a Parquet file ({error}); copy it again")
        return None


def _parquet_rows(
    file: str, problems: Problems, on_bytes: OnBytes | None, columns: Collection[str] | None, part: Part
) -> Iterator[Row]:
    table = _open_parquet(file, problems)
    if table is None:
        return
    with table:
        names = [name for name in table.schema_arrow.names if columns is None or name in columns]
        bytes_per_row = os.path.getsize(file) / max(table.metadata.num_rows, 1)
        groups = list(range(table.metadata.num_row_groups))[part.start : part.end]
        number = 0
        try:
            for batch in table.iter_batches(batch_size=1024, columns=names, row_groups=groups):
                # Values of a batch without columns: pylist would be empty, and every row must be seen
                for values in batch.to_pylist() if names else [{} for _ in range(batch.num_rows)]:
                    number += 1
                    yield Row(values, file, number)
                if on_bytes:
                    on_bytes(int(batch.num_rows * bytes_per_row))
        except (*opening.DAMAGED, UnicodeDecodeError) as error:
            problems.add_file(file, number + 1, f"damaged file, cannot be read from here on ({error}); copy it again")
