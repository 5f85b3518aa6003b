"""From files to units of work, which depend on the files and on nothing else.

Small files are one unit together; large ones of plain JSONL and text are cut at ends of lines, text at blank ones, and
Parquet at row groups. A compressed file is one unit. So any number of processes, and a run that was killed and went on,
write the same tokens in the same order.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

from scale_llm.data.corpus import MAX_TEXT_DOCUMENT_CHARACTERS
from scale_llm.data.rows import Part

UNIT_BYTES = 1 << 24
"""Of input: a few seconds of one core, lost at most when a process is killed."""
_BLOCK = 1 << 20


class Span(NamedTuple):
    """A file, or what `Part` takes of one."""

    file: str
    start: int = 0
    end: int | None = None

    def part(self, limit_bytes: int | None) -> Part:
        return Part(self.start, self.end, limit_bytes)

    @property
    def bytes(self) -> int:
        """On disk; of a part of a Parquet file about."""
        size = os.path.getsize(self.file)
        if self.file.endswith(".parquet"):
            return size if self.end is None else 0  # its reader counts for the rows that it reads
        return (size if self.end is None else self.end) - self.start


Unit = list[Span]


def units_of(files: tuple[str, ...] | list[str], unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Files in their order."""
    units: list[Unit] = []
    filled = unit_bytes
    for file in files:
        size = os.path.getsize(file)
        spans = list(_spans(file, size, unit_bytes)) if size > unit_bytes else [Span(file)]
        if len(spans) > 1:
            units += [[span] for span in spans]
            filled = unit_bytes
            continue
        if not units or filled + size > unit_bytes:
            units.append([])
            filled = 0
        units[-1] += spans
        filled += size
    return units


def _spans(file: str, size: int, unit_bytes: int) -> Iterator[Span]:
    if file.endswith(".parquet"):
        return _row_groups(file, unit_bytes)
    if file.endswith((".jsonl", ".txt")):
        return _lines(file, size, unit_bytes, at_blank=file.endswith(".txt"))
    return iter([Span(file)])


def _lines(file: str, size: int, unit_bytes: int, *, at_blank: bool) -> Iterator[Span]:
    start = 0
    with open(file, "rb") as stream:
        while start < size:
            stream.seek(start + unit_bytes - 1)
            _end_of_line(stream)
            if at_blank:
                _blank_line(stream)
            end = min(stream.tell(), size)
            yield Span(file, start, end)
            start = end


def _end_of_line(stream) -> bytes:
    """Goes behind the next end of line; returns the last of what was read."""
    while (block := stream.readline(_BLOCK)) and not block.endswith(b"\n"):
        pass
    return block


def _blank_line(stream) -> None:
    """Goes behind the next blank line, or a document's length where there is none."""
    limit = stream.tell() + MAX_TEXT_DOCUMENT_CHARACTERS
    while stream.tell() < limit and (block := stream.readline(_BLOCK)):
        if not block.endswith(b"\n"):
            _end_of_line(stream)
        elif not block.strip():
            return


def _row_groups(file: str, unit_bytes: int) -> Iterator[Span]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            sizes = [table.metadata.row_group(i).total_byte_size for i in range(table.metadata.num_row_groups)]
    except (pyarrow.ArrowException, OSError):  # for whoever reads it
        yield Span(file)
        return
    start, filled = 0, 0
    for group, size in enumerate(sizes, start=1):
        filled += size
        if filled >= unit_bytes or group == len(sizes):
            yield Span(file, start, group)
            start, filled = group, 0
