"""Documents of a shard on disk: between phases with all that is known of them, at the end as rows."""

import gzip
import os
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import orjson
import pyarrow
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from scale_llm.curate.ledger import Ledger, length_class
from scale_llm.curate.reading import plain
from scale_llm.data.opening import open_bytes


class Write(PipelineStep):
    """Passes documents on and writes them; after the last, the file appears and the ledger is closed."""

    type, name = "WRITER", "write"

    def __init__(self, folder: Path, extension: str, ledger: Ledger):
        super().__init__()
        self.folder, self.extension, self.ledger = folder, extension, ledger

    def run(self, data, rank: int = 0, world_size: int = 1):
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{rank:05d}{self.extension}"
        temporary = self.folder / f".{path.name}.tmp"
        with open(temporary, "wb") as raw:
            with self.compressed(raw) as stream:
                for document in data:
                    stream.write(self.row(document))
                    yield document
        os.replace(temporary, path)
        self.ledger.finish()

    @abstractmethod
    def compressed(self, raw: IO[bytes]) -> IO[bytes]:
        """The stream that rows are written to."""

    @abstractmethod
    def row(self, document: Document) -> bytes:
        """One document, with what ends it."""


class WriteBetween(Write):
    """For the next phase: Zstandard, which costs next to no time."""

    def __init__(self, folder: Path, ledger: Ledger):
        super().__init__(folder, ".jsonl.zst", ledger)

    def compressed(self, raw: IO[bytes]) -> IO[bytes]:
        return pyarrow.CompressedOutputStream(pyarrow.PythonFile(raw, "w"), "zstd")  # type: ignore[return-value]

    def row(self, document: Document) -> bytes:
        value = [document.text, document.id, document.metadata]
        return orjson.dumps(value, default=plain, option=orjson.OPT_APPEND_NEWLINE)


class ReadBetween(PipelineStep):
    """What WriteBetween wrote for this shard."""

    type, name = "READER", "documents"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        yield from read_between(self.folder / f"{rank:05d}.jsonl.zst")


def read_between(path: Path) -> Iterator[Document]:
    """Documents of one file of WriteBetween."""
    with open_bytes(str(path)) as stream:
        for line in stream:
            text, name, metadata = orjson.loads(line)
            yield Document(text=text, id=name, metadata=metadata)


class WriteRows(Write):
    """The output: a row's own fields, its text, and `source`, which says where it is from."""

    def __init__(self, folder: Path, ledger: Ledger, *, text_key: str, compress: bool):
        super().__init__(folder, ".jsonl.gz" if compress else ".jsonl", ledger)
        self.text_key, self.compress = text_key, compress

    def compressed(self, raw: IO[bytes]) -> IO[bytes]:
        # No name and no time in the header: the same documents are the same bytes
        return gzip.GzipFile("", "wb", 6, raw, 0) if self.compress else open(os.dup(raw.fileno()), "wb")  # type: ignore

    def row(self, document: Document) -> bytes:
        metadata = document.metadata
        source = {key: metadata[key] for key in ("file", "line", "language", "tokens") if key in metadata}
        lengths, languages = self.ledger.table("length out"), self.ledger.table("language out")
        lengths[length_class(metadata["tokens"])] += 1
        languages[metadata.get("language", "not told")] += 1
        value = {**metadata["fields"], self.text_key: document.text, "source": source}
        return orjson.dumps(value, default=plain, option=orjson.OPT_APPEND_NEWLINE)
