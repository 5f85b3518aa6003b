"""Rows of JSONL, JSON and Parquet files, each with its file and line; bad rows go to `Problems`.

A `.json` file holds either one object a line, as Megatron's own tools read it, or one array of objects. Lines count
from 1; in an array and in Parquet the row's number stands in place of the line. No torch.
"""

import gzip
import io
import json
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from scale_llm.config.errors import UserError

MAX_PROBLEMS = 20

OnBytes = Callable[[int], None]
"""Called with the number of file bytes read since the last call."""


class Row(NamedTuple):
    values: dict[str, Any]
    file: str
    line: int


@dataclass(kw_only=True, slots=True)
class Problems:
    """Bad rows, collected up to a cap."""

    found: list[str] = field(default_factory=list)
    """Each `file:line: what is wrong`; for Parquet the row in place of the line, from 1."""

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
    file: str, problems: Problems, on_bytes: OnBytes | None = None, columns: Collection[str] | None = None
) -> Iterator[Row]:
    """Rows of one file in order.

    Args:
        columns: of a Parquet file read these alone (those that it has); None: all.
    """
    name = file.removesuffix(".gz")
    if name.endswith(".parquet"):
        return _parquet_rows(file, problems, on_bytes, columns)
    if name.endswith(".json") and _is_array(file):
        return _array_rows(file, problems, on_bytes)
    return _jsonl_rows(file, problems, on_bytes)


def lines(file: str, problems: Problems, on_bytes: OnBytes | None) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its end) of a plain or gzipped UTF-8 file; progress in bytes on disk."""
    with open(file, "rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if file.endswith(".gz") else io.BufferedReader(raw)
        number, seen = 0, 0
        try:
            for number, line in enumerate(stream, start=1):
                if on_bytes and raw.tell() != seen:
                    on_bytes(raw.tell() - seen)
                    seen = raw.tell()
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    message = f"not UTF-8 ({error.reason}); convert the file to UTF-8"
                    problems.add(file, number, message, "not UTF-8")
        except (EOFError, gzip.BadGzipFile) as error:
            problems.add_file(file, number + 1, f"damaged gzip file ({error}); copy it again")


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


def _jsonl_rows(file: str, problems: Problems, on_bytes: OnBytes | None) -> Iterator[Row]:
    for number, line in lines(file, problems, on_bytes):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            problems.add(file, number, f"not JSON ({error}); every line must be one object", "not JSON")
            continue
        if isinstance(value, dict):
            yield Row(value, file, number)
        else:
            message = f"{type(value).__name__}, not an object; every line must be one object"
            problems.add(file, number, message, "not an object")


def _is_array(file: str) -> bool:
    """Is the first line that holds anything the start of an array? A damaged file is left to its reader."""
    quiet = Problems()
    first = next((text for _, text in lines(file, quiet, None) if text.strip("\ufeff \t\r\n")), "")
    return first.lstrip("\ufeff \t\r\n").startswith("[")


def _array_rows(file: str, problems: Problems, on_bytes: OnBytes | None) -> Iterator[Row]:
    faults = _FileFaults(outer=problems)
    text = "".join(line for _, line in lines(file, faults, on_bytes))
    if faults.found:
        return
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        problems.add_file(file, error.lineno, f"not a JSON array of objects ({error}); write it again")
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
    file: str, problems: Problems, on_bytes: OnBytes | None, columns: Collection[str] | None
) -> Iterator[Row]:
    table = _open_parquet(file, problems)
    if table is None:
        return
    with table:
        names = [name for name in table.schema_arrow.names if columns is None or name in columns]
        bytes_per_row = os.path.getsize(file) / max(table.metadata.num_rows, 1)
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=names):
            # Values of a batch without columns: pylist would be empty, and every row must be seen
            for values in batch.to_pylist() if names else [{} for _ in range(batch.num_rows)]:
                number += 1
                yield Row(values, file, number)
            if on_bytes:
                on_bytes(int(batch.num_rows * bytes_per_row))
