"""One unit of indexing: its documents to token ids in a file of their own, and what was read and left out.

A unit is done when its .json is there; it is written last.
"""

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scale_llm.config.errors import UserError
from scale_llm.data import corpus
from scale_llm.data.files import write_json
from scale_llm.data.index_units import Span, Unit
from scale_llm.data.rows import MAX_PROBLEMS, OnBytes, Problems
from scale_llm.data.tokenizer import Tokenizer
from scale_llm.data.word_cache import DocumentEncoder

BATCH_CHARACTERS = 1 << 20
"""Text tokenised at a time."""
FIRST = 3
"""Rows left out that are named of each kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexSettings:
    """What decides which tokens are written, beside the files."""

    tokenizer: str
    """Path of a tokenizer.json."""
    eod_token: str | None
    """Ends every document; None: nothing does."""
    dtype: str
    """numpy's name for what a token takes in the .bin file."""
    embedded: bool = False
    """Each file is a document."""
    text_field: str
    max_document_bytes: int
    drop_bad_rows: bool
    """Otherwise they are an error."""


@dataclass(kw_only=True, slots=True)
class UnitCounts:
    """Written beside the tokens of a unit; of all units together, counts.json."""

    num_documents: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    """UTF-8 bytes of the text."""
    num_empty: int = 0
    """Documents without text, which are left out."""
    empty_files: list[str] = field(default_factory=list)
    """Files without a document."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows left out for each reason."""
    first_dropped: dict[str, list[str]] = field(default_factory=dict)
    """`file:line: what` of the first for each reason."""

    def add(self, other: "UnitCounts") -> None:
        self.num_documents += other.num_documents
        self.num_tokens += other.num_tokens
        self.num_bytes += other.num_bytes
        self.num_empty += other.num_empty
        self.empty_files += other.empty_files
        for kind, count in other.dropped.items():
            self.dropped[kind] = self.dropped.get(kind, 0) + count
            first = self.first_dropped.setdefault(kind, [])
            first += other.first_dropped[kind][: FIRST - len(first)]

    def left_out(self) -> dict[str, Any]:
        """For `left_out_lines`."""
        return {
            "dropped": self.dropped, "first_dropped": self.first_dropped, "num_empty": self.num_empty,
            "empty_files": self.empty_files,
        }  # fmt: skip


def left_out_lines(left_out: dict[str, Any]) -> list[str]:
    """What was not indexed, for the terminal; nothing is left out without a line here."""
    dropped = sorted(left_out.get("dropped", {}).items(), key=lambda item: -item[1])
    lines = [f"dropped, {kind}: {count:,}, first {left_out['first_dropped'][kind][0]}" for kind, count in dropped]
    if left_out.get("num_empty"):
        lines.append(f"documents without text: {left_out['num_empty']:,}")
    if files := left_out.get("empty_files"):
        lines.append(f"files without a document: {len(files):,}, first {files[0]}")
    return lines


@dataclass(kw_only=True, slots=True)
class _Rows(Problems):
    """Bad rows of a span: lines are numbered from the start of its file."""

    span: Span
    counts: UnitCounts
    drop: bool

    def add(self, file: str, line: int, message: str, kind: str = "bad row") -> None:
        line += _lines_before(self.span)
        if not self.drop:
            Problems.add(self, file, line, message)
            return
        self.counts.dropped[kind] = self.counts.dropped.get(kind, 0) + 1
        first = self.counts.first_dropped.setdefault(kind, [])
        if len(first) < FIRST:
            first.append(f"{file}:{line}: {message}")

    def add_file(self, file: str, line: int, message: str) -> None:
        Problems.add(self, file, line + _lines_before(self.span), message)
        self.raise_any()


def _lines_before(span: Span) -> int:
    if not span.start:
        return 0
    if span.file.endswith(".parquet"):
        import pyarrow.parquet

        metadata = pyarrow.parquet.read_metadata(span.file)
        return sum(metadata.row_group(i).num_rows for i in range(span.start))
    count, left = 0, span.start
    with open(span.file, "rb") as stream:
        while left and (block := stream.read(min(left, 1 << 24))):
            count += block.count(b"\n")
            left -= len(block)
    return count


class UnitIndexer:
    """Indexes units, one after another, into a directory; words that one has tokenised help the next."""

    def __init__(self, settings: IndexSettings, directory: Path):
        self.settings, self.directory = settings, directory
        self.tokenizer = Tokenizer.load(settings.tokenizer, settings.eod_token)
        self.encoder = DocumentEncoder(self.tokenizer, settings.dtype)
        ending = [self.tokenizer.eod] if settings.eod_token is not None else []
        self.ending = np.array(ending, dtype=settings.dtype).tobytes()

    def __call__(self, number: int, unit: Unit, on_bytes: OnBytes) -> None:
        """Raises UserError for rows and files that cannot be read."""
        counts, size = UnitCounts(), np.dtype(self.settings.dtype).itemsize
        lengths: list[int] = []
        tokens, ends = unit_files(self.directory, number)
        with open(temporary(tokens), "wb") as stream:
            for texts in batches(self._documents(unit, counts, on_bytes)):
                for text, ids in zip(texts, self.encoder.encode(texts), strict=True):
                    stream.write(ids)
                    stream.write(self.ending)
                    lengths.append((len(ids) + len(self.ending)) // size)
                    counts.num_bytes += len(text) if text.isascii() else len(text.encode())
        temporary(ends).write_bytes(np.array(lengths, dtype=np.int32).tobytes())
        counts.num_documents, counts.num_tokens = len(lengths), sum(lengths)
        for path in (tokens, ends):
            os.replace(temporary(path), path)
        write_json(done_file(self.directory, number), _as_dict(counts))

    def _documents(self, unit: Unit, counts: UnitCounts, on_bytes: OnBytes) -> Iterator[str]:
        """Of all spans; what is wrong with any of them is raised together, behind the last."""
        found: list[str] = []
        for span in unit:
            rows = _Rows(span=span, counts=counts, drop=self.settings.drop_bad_rows)
            any_text = False
            try:
                for text in self._read(span, rows, on_bytes):
                    any_text = True
                    yield text
                rows.raise_any()
            except UserError as error:
                found += error.problems
                if len(found) >= MAX_PROBLEMS:
                    break
            counts.num_empty += rows.empty
            if not any_text and span.end is None and not self.settings.embedded:
                counts.empty_files.append(span.file)
        if found:
            raise UserError(found)

    def _read(self, span: Span, rows: Problems, on_bytes: OnBytes) -> Iterator[str]:
        if self.settings.embedded:
            return corpus.read_embedded([span.file], on_bytes)
        part = span.part(self.settings.max_document_bytes)
        return corpus.read_file(span.file, self.settings.text_field, rows, on_bytes, part)


def batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """Documents in lists of about BATCH_CHARACTERS."""
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def unit_files(directory: Path, number: int) -> tuple[Path, Path]:
    """Tokens, and int32 tokens of each document."""
    return directory / f"{number:06d}.bin", directory / f"{number:06d}.lengths"


def done_file(directory: Path, number: int) -> Path:
    return directory / f"{number:06d}.json"


def counts_of_unit(directory: Path, number: int, token_bytes: int) -> UnitCounts | None:
    """None where the unit is not done, or its files are not whole."""
    tokens, ends = unit_files(directory, number)
    try:
        counts = UnitCounts(**json.loads(done_file(directory, number).read_text(encoding="utf-8")))
        sizes = tokens.stat().st_size, ends.stat().st_size
    except (OSError, ValueError, TypeError):
        return None
    return counts if sizes == (counts.num_tokens * token_bytes, counts.num_documents * 4) else None


def temporary(path: Path) -> Path:
    return path.with_name(path.name + temporary_ending(str(os.getpid())))


def temporary_ending(process: str) -> str:
    """Of the names of files that this node's process is writing: nodes share a directory, and numbers of processes."""
    return f".tmp-{socket.gethostname()}-{process}"


def _as_dict(counts: UnitCounts) -> dict[str, Any]:
    return {name: getattr(counts, name) for name in UnitCounts.__slots__}
