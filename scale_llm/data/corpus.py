"""Documents: the embedded corpus, and the user's text, JSONL and Parquet files.

A text file is cut into documents at blank lines, each of at least `TEXT_DOCUMENT_CHARACTERS`, so that a
single book still has documents to hold out for validation, and no paragraph is torn; joined, the documents
are the file. JSONL, JSON and Parquet have one document a row (see rows.py).
"""

from collections.abc import Iterator
from pathlib import Path

from scale_llm.data.rows import (
    MAX_PROBLEMS,
    WHOLE,
    OnBytes,
    Part,
    Problems,
    encodable,
    lines,
    parquet_columns,
    read_rows,
    too_large,
)
from scale_llm.data.sources import uncompressed_name
from scale_llm.data.stdlib_files import embedded_files

__all__ = ["MAX_PROBLEMS", "Problems", "embedded_files", "read_embedded", "read_file"]

TEXT_DOCUMENT_CHARACTERS = 4096
MAX_TEXT_DOCUMENT_CHARACTERS = 1 << 20


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


def read_file(
    file: str, text_field: str, problems: Problems, on_bytes: OnBytes | None = None, part: Part = WHOLE
) -> Iterator[str]:
    """Documents of one file; those without text are left out and counted in `problems.empty`."""
    name = uncompressed_name(file)
    if name.endswith(".parquet"):
        documents = _read_parquet(file, text_field, problems, on_bytes, part)
    elif name.endswith(".txt"):
        documents = _read_text(file, problems, on_bytes, part)
    else:
        documents = _read_jsonl(file, text_field, problems, on_bytes, part)
    for document in documents:
        if document and not document.isspace():
            yield document
        else:
            problems.empty += 1


def _read_text(file: str, problems: Problems, on_bytes: OnBytes | None, part: Part) -> Iterator[str]:
    parts: list[str] = []
    size = 0
    for _, line in lines(file, problems, on_bytes, part):
        parts.append(line)
        size += len(line)
        if (size >= TEXT_DOCUMENT_CHARACTERS and not line.strip()) or size >= MAX_TEXT_DOCUMENT_CHARACTERS:
            yield "".join(parts)
            parts, size = [], 0
    if parts:
        yield "".join(parts)


def _read_jsonl(file: str, text_field: str, problems: Problems, on_bytes: OnBytes | None, part: Part) -> Iterator[str]:
    limit = part.limit_bytes
    # A row has other fields and escapes beside its text: a line may be longer than a document
    part = part._replace(limit_bytes=None if limit is None else 2 * limit)
    for row in read_rows(file, problems, on_bytes, part=part):
        text = row.values.get(text_field)
        if not isinstance(text, str):
            _add_field(problems, file, row.line, text_field, list(row.values))
        elif not encodable(text):
            message = f"field {text_field!r} holds half of a surrogate pair; remove the row"
            problems.add(file, row.line, message)
        elif _fits(text, limit, problems, file, row.line):
            yield text


def _fits(text: str, limit: int | None, problems: Problems, file: str, line: int) -> bool:
    if limit is None or 4 * len(text) <= limit or (size := len(text.encode())) <= limit:
        return True
    problems.add(file, line, too_large(size, limit), "too large")
    return False


def _add_field(problems: Problems, file: str, row: int, text_field: str, fields: list[str]) -> None:
    what = "is no string" if text_field in fields else f"is missing (fields: {', '.join(fields) or 'none'})"
    problems.add(file, row, f"field {text_field!r} {what}; set data.fields.text", "no text")


def _read_parquet(
    file: str, text_field: str, problems: Problems, on_bytes: OnBytes | None, part: Part
) -> Iterator[str]:
    columns = parquet_columns(file, problems)
    if columns is None:
        return
    if text_field not in columns:
        what = f"field {text_field!r} is missing (fields: {', '.join(columns)}); set data.fields.text"
        problems.add_file(file, 1, what)
        return
    for row in read_rows(file, problems, on_bytes, [text_field], part):
        value = row.values[text_field]
        if not isinstance(value, str):
            _add_field(problems, file, row.line, text_field, columns)
        elif _fits(value, part.limit_bytes, problems, file, row.line):
            yield value
