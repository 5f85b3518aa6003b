"""Documents: the embedded corpus, and the user's text, JSONL and Parquet files.

A text file is cut into documents at blank lines, each of at least `TEXT_DOCUMENT_CHARACTERS`, so that a
single book still has documents to hold out for validation, and no paragraph is torn; joined, the documents
are the file. JSONL (also `.json`, one object a line, as Megatron's own tools read it) and Parquet have one
document a row.
"""

import gzip
import hashlib
import io
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from scale_llm.config.errors import UserError

TEXT_DOCUMENT_CHARACTERS = 4096
MAX_TEXT_DOCUMENT_CHARACTERS = 1 << 20
MAX_PROBLEMS = 20

OnBytes = Callable[[int], None]
"""Called with the number of file bytes read since the last call."""


@dataclass(kw_only=True, slots=True)
class Problems:
    """Bad rows, collected up to a cap."""

    found: list[str] = field(default_factory=list)
    """Each `file:line: what is wrong`; for Parquet the row in place of the line, from 1."""

    def add(self, file: str, line: int, message: str) -> None:
        self.found.append(f"{file}:{line}: {message}")
        if len(self.found) >= MAX_PROBLEMS:
            self.found.append(f"(stopped after {MAX_PROBLEMS} problems)")
            self.raise_any()

    def raise_any(self) -> None:
        if self.found:
            raise UserError(self.found)


def embedded_files(megabytes: float | None = None) -> list[str]:
    """Source files of the running Python's standard library, at most `megabytes` (10**6 bytes) of them.

    Ordered by a hash of their name within the library: always the same, and any share of the list is a fair
    sample (by name, validation would be all of `unittest` to `zipfile`).
    """
    top = sysconfig.get_path("stdlib")
    found = []
    for directory, below, files in os.walk(top):
        below[:] = [name for name in below if name not in ("site-packages", "dist-packages", "__pycache__")]
        found += [os.path.join(directory, name) for name in files if name.endswith(".py")]
    found.sort(key=lambda file: hashlib.sha256(Path(file).relative_to(top).as_posix().encode()).digest())
    if not found:
        raise UserError(f"data.path=null: this Python has no standard library sources in {top}; set data.path")
    if megabytes is None:
        return found
    kept: list[str] = []
    size = 0
    for file in found:
        size += os.path.getsize(file)
        if kept and size > megabytes * 1e6:
            break
        kept.append(file)
    return kept


def read_embedded(files: list[str], on_bytes: OnBytes | None = None) -> Iterator[str]:
    """Each file a document; those empty or not UTF-8 (the library's tests hold some) are left out."""
    for file in files:
        raw = Path(file).read_bytes()
        if on_bytes:
            on_bytes(len(raw))
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield text


def read_file(file: str, text_field: str, problems: Problems, on_bytes: OnBytes | None = None) -> Iterator[str]:
    """Documents of one file, empty ones left out."""
    name = file.removesuffix(".gz")
    if name.endswith(".parquet"):
        documents = _read_parquet(file, text_field, problems, on_bytes)
    elif name.endswith(".txt"):
        documents = _read_text(file, problems, on_bytes)
    else:
        documents = _read_jsonl(file, text_field, problems, on_bytes)
    for document in documents:
        if document.strip():
            yield document


def _lines(file: str, problems: Problems, on_bytes: OnBytes | None) -> Iterator[tuple[int, str]]:
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
                    problems.add(file, number, f"not UTF-8 ({error.reason}); convert the file to UTF-8")
        except (EOFError, gzip.BadGzipFile) as error:
            problems.add(file, number + 1, f"damaged gzip file ({error}); copy it again")


def _read_text(file: str, problems: Problems, on_bytes: OnBytes | None) -> Iterator[str]:
    parts: list[str] = []
    size = 0
    for _, line in _lines(file, problems, on_bytes):
        parts.append(line)
        size += len(line)
        if (size >= TEXT_DOCUMENT_CHARACTERS and not line.strip()) or size >= MAX_TEXT_DOCUMENT_CHARACTERS:
            yield "".join(parts)
            parts, size = [], 0
    if parts:
        yield "".join(parts)


def _read_jsonl(file: str, text_field: str, problems: Problems, on_bytes: OnBytes | None) -> Iterator[str]:
    for number, line in _lines(file, problems, on_bytes):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            problems.add(file, number, f"not JSON ({error}); every line must be one object")
            continue
        if not isinstance(row, dict):
            problems.add(file, number, f"{type(row).__name__}, not an object; every line must be one object")
        elif not isinstance(row.get(text_field), str):
            _add_field(problems, file, number, text_field, list(row))
        elif "\\u" in line and not _encodable(row[text_field]):
            problems.add(file, number, f"field {text_field!r} holds half of a surrogate pair; remove the row")
        else:
            yield row[text_field]


def _encodable(text: str) -> bool:
    """JSON escapes can spell what is no Unicode text, which neither tokenizers nor files can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _add_field(problems: Problems, file: str, row: int, text_field: str, fields: list[str]) -> None:
    what = "is no string" if text_field in fields else f"is missing (fields: {', '.join(fields) or 'none'})"
    problems.add(file, row, f"field {text_field!r} {what}; set data.fields.text")


def _read_parquet(file: str, text_field: str, problems: Problems, on_bytes: OnBytes | None) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        problems.add(file, 1, f"not a Parquet file ({error}); copy it again")
        return
    with table:
        columns = table.schema_arrow.names
        if text_field not in columns:
            _add_field(problems, file, 1, text_field, columns)
            return
        row = 0
        bytes_per_row = os.path.getsize(file) / max(table.metadata.num_rows, 1)
        for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
            for value in batch.column(0).to_pylist():
                row += 1
                if isinstance(value, str):
                    yield value
                else:
                    _add_field(problems, file, row, text_field, columns)
            if on_bytes:
                on_bytes(int(batch.num_rows * bytes_per_row))
