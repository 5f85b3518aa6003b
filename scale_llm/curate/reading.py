"""Documents of a shard, each with its file and line; rows that cannot be read go to the ledger.

datatrove's own readers pass over rows without text, drop the rest of a file after a byte that is not UTF-8, and stop
the task at a damaged file; here each of these is counted with its place, and the rows before the damage are read.
"""

import datetime
from collections.abc import Iterator
from typing import Any

import orjson
from datatrove.data import Document
from datatrove.pipeline.readers.base import BaseReader

from scale_llm.config.curate import CurateConfig
from scale_llm.config.errors import UserError
from scale_llm.curate import tabular, warc
from scale_llm.curate.ledger import Ledger, length_class
from scale_llm.curate.sources import Piece, Shard, kind_of
from scale_llm.curate.words import TokenCounter
from scale_llm.data.opening import DAMAGED, lines, open_bytes
from scale_llm.data.rows import MAX_PROBLEMS

TEXT_DOCUMENT_CHARACTERS = 4096
"""A text file is cut at the first blank line after so many, as for training without curation."""

Row = tuple[int, dict[str, Any]]
"""Line, or number of the row or record, and its fields."""


class Read(BaseReader):
    """First step of the first phase. `stop`: bad rows stop the task, with a list of them, when its shard is read."""

    name = "read"

    def __init__(self, shards: list[Shard], cfg: CurateConfig, ledger: Ledger, counter: TokenCounter, stop: bool):
        super().__init__(text_key=cfg.text)
        self.shards, self.cfg, self.ledger, self.counter, self.stop = shards, cfg, ledger, counter, stop
        self.limit_bytes = int(cfg.max_document_megabytes * 1e6)

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        self.problems: list[str] = []
        self.count = self.ledger.step("read")
        for piece in self.shards[rank]:
            before = self.count.documents_in
            for line, fields in self._rows(piece):
                document = self._document(piece.file, line, fields)
                if document is not None:
                    yield document
            self.ledger.table("documents of file")[piece.file] += self.count.documents_in - before
        if self.problems:
            raise UserError(self.problems)

    def bad(self, file: str, line: int, reason: str, message: str, rows: int = 1) -> None:
        self.ledger.bad(file, line, reason, message, rows)
        if self.stop:
            self.problems.append(f"{file}:{line}: {message}")
            if len(self.problems) >= MAX_PROBLEMS:
                raise UserError([*self.problems, f"(stopped after {MAX_PROBLEMS} problems)"])

    def _rows(self, piece: Piece) -> Iterator[Row]:
        readers = {
            "jsonl": self._jsonl,
            "text": self._text,
            "warc": self._warc,
            "parquet": self._table,
            "json": self._table,
        }
        kind = kind_of(piece.file)
        assert kind is not None
        return readers[kind](piece)

    def _document(self, file: str, line: int, fields: dict[str, Any]) -> Document | None:
        text = fields.pop(self.text_key, None)
        if not isinstance(text, str):
            what = "is no string" if text is not None else f"is missing (fields: {', '.join(fields) or 'none'})"
            self.bad(file, line, "no text", f"field {self.text_key!r} {what}; set curate.text")
            return None
        if not text.strip():
            self.bad(file, line, "empty", f"field {self.text_key!r} is empty")
            return None
        if len(text) * 4 > self.limit_bytes and (size := len(text.encode())) > self.limit_bytes:
            self.too_large(file, line, size)
            return None
        html = bool(fields.pop(warc.HTML, False))
        tokens = 0 if html else self.counter(text)
        self.count.documents_in += 1
        self.count.documents_out += 1
        self.count.tokens_in += tokens
        self.count.tokens_out += tokens
        document = Document(text=text, id=f"{file}:{line}")
        document.metadata = {"file": file, "line": line, "tokens": tokens, "html": html, "fields": fields}
        if not html:
            self.ledger.table("length in")[length_class(tokens)] += 1
        self.ledger.table("labels").update(self.ledger.labels_of(document))
        return document

    def too_large(self, file: str, line: int, size: int) -> None:
        allowed = self.cfg.max_document_megabytes
        message = f"{size:,} bytes; raise curate.max_document_megabytes={allowed:g} to read it"
        self.bad(file, line, "too large", message)

    def _lines(self, piece: Piece) -> Iterator[tuple[int, bytes]]:
        """Lines that are not too large; a damaged file ends with a problem."""
        number = piece.line - 1
        # A row has other fields and escapes beside its text: a line may be longer than a document
        limit = 2 * self.limit_bytes
        try:
            with open_bytes(piece.file) as stream:
                if piece.end is not None:
                    stream.seek(piece.start)
                for number, content, size in lines(stream, limit, piece.line, piece.end):
                    if content is None:
                        self.too_large(piece.file, number, size)
                    else:
                        yield number, content.removeprefix(b"\xef\xbb\xbf") if number == 1 else content
        except DAMAGED as error:
            self.damaged(piece.file, number + 1, error)

    def damaged(self, file: str, line: int, error: BaseException) -> None:
        self.bad(file, line, "damaged file", f"cannot be read from here on ({error}); copy the file again")

    def _jsonl(self, piece: Piece) -> Iterator[Row]:
        for number, content in self._lines(piece):
            if not content.strip():
                continue
            try:
                value = orjson.loads(content)
            except orjson.JSONDecodeError as error:
                self.bad(piece.file, number, *_not_json(content, error))
                continue
            if isinstance(value, dict):
                yield number, value
            else:
                self.bad(piece.file, number, "not an object", f"{type(value).__name__}; each line must be one object")

    def _text(self, piece: Piece) -> Iterator[Row]:
        parts: list[str] = []
        first, size = 1, 0
        for number, content in self._lines(piece):
            try:
                part = content.decode()
            except UnicodeDecodeError as error:
                self.bad(piece.file, number, "not UTF-8", f"not UTF-8 ({error.reason}); the line is left out")
                continue
            first = number if not parts else first
            parts.append(part)
            size += len(part)
            if size >= TEXT_DOCUMENT_CHARACTERS and not part.strip():
                yield first, {self.text_key: "".join(parts)}
                parts, size = [], 0
        if "".join(parts).strip():
            yield first, {self.text_key: "".join(parts)}

    def _warc(self, piece: Piece) -> Iterator[Row]:
        return warc.pages(piece.file, self.text_key, self.cfg.url.column, self)

    def _table(self, piece: Piece) -> Iterator[Row]:
        return tabular.rows(piece.file, self)


def _not_json(content: bytes, error: ValueError) -> tuple[str, str]:
    try:
        content.decode()
    except UnicodeDecodeError as wrong:
        return "not UTF-8", f"not UTF-8 ({wrong.reason} at byte {wrong.start}); convert the file"
    return "not JSON", f"not JSON ({error}); each line must be one object"


def plain(value: Any) -> Any:
    """What JSON has no type for, as text."""
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    return value.hex() if isinstance(value, bytes) else str(value)
