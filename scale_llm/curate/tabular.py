"""Rows of Parquet and of JSON arrays."""

from collections.abc import Iterator
from typing import Any, Protocol

import pyarrow
import pyarrow.parquet

from scale_llm.data import rows as data_rows


class Reader(Protocol):
    """Who is told what cannot be read."""

    text_key: str

    def bad(self, file: str, line: int, reason: str, message: str, rows: int = 1) -> None: ...

    def damaged(self, file: str, line: int, error: BaseException) -> None: ...


def rows(file: str, reader: Reader) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, fields); of a .json file that holds an object a line, the line."""
    if file.lower().endswith(".parquet"):
        yield from _parquet(file, reader)
        return
    for row in data_rows.read_rows(file, _Problems(reader=reader)):
        yield row.line, row.values


class _Problems(data_rows.Problems):
    """Bad rows of scale_llm.data's reader, into the ledger."""

    def __init__(self, *, reader: Reader):
        super().__init__()
        self.reader = reader

    def add(self, file: str, line: int, message: str, kind: str = "bad row") -> None:
        self.reader.bad(file, line, kind, message)

    def add_file(self, file: str, line: int, message: str) -> None:
        self.reader.bad(file, line, "damaged file", message)


def _parquet(file: str, reader: Reader) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if reader.text_key not in names:
                what = f"field {reader.text_key!r} is missing (fields: {', '.join(names)}); set curate.text"
                reader.bad(file, 1, "no text", what, rows=table.metadata.num_rows)
                return
            for batch in table.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    number += 1
                    yield number, values
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reader.damaged(file, number + 1, error)
