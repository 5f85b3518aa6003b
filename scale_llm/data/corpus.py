"""Documents: the embedded corpus, and the user's text, JSONL and Parquet files.

A text file is cut into documents at blank lines, each of at least `TEXT_DOCUMENT_CHARACTERS`, so that a
single book still has documents to hold out for validation, and no paragraph is torn; joined, the documents
are the file. JSONL, JSON and Parquet have one document a row (see rows.py).
"""

from collections.abc import Iterator
from pathlib import Path

from scale_llm.data.rows import MAX_PROBLEMS, OnBytes, Problems, encodable, lines, parquet_columns, read_rows
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


def _read_text(file: str, problems: Problems, on_bytes: OnBytes | None) -> Iterator[str]:
    parts: list[str] = []
    size = 0
    for _, line in lines(file, problems, on_bytes):
        parts.append(line)
        size += len(line)
        if (size >= TEXT_DOCUMENT_CHARACTERS and not line.strip()) or size >= MAX_TEXT_DOCUMENT_CHARACTERS:
            yield "".join(parts)
            parts, size = [], 0
    if parts:
        yield "".join(parts)


def _read_jsonl(file: str, text_field: str, problems: Problems, on_bytes: OnBytes | None) -> Iterator[str]:
    for row in read_rows(file, problems, on_bytes):
        text = row.values.get(text_field)
        if not isinstance(text, str):
            _add_field(problems, file, row.line, text_field, list(row.values))
        elif not encodable(text):
            message = f"field {text_field!r} holds half of a surrogate pair; remove the row"
            problems.add(file, row.line, message)
        else:
            yield text


def _add_field(problems: Problems, file: str, row: int, text_field: str, fields: list[str]) -> None:
    what = "is no string" if text_field in fields else f"is missing (fields: {', '.join(fields) or 'none'})"
    problems.add(file, row, f"field {text_field!r} {what}; set data.fields.text")


def _read_parquet(file: str, text_field: str, problems: Problems, on_bytes: OnBytes | None) -> Iterator[str]:
    columns = parquet_columns(file, problems)
    if columns is None:
        return
    if text_field not in columns:
        _add_field(problems, file, 1, text_field, columns)
        return
    for row in read_rows(file, problems, on_bytes, [text_field]):
        value = row.values[text_field]
        if isinstance(value, str):
            yield value
        else:
            _add_field(problems, file, row.line, text_field, columns)
