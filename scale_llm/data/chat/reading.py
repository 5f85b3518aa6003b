"""Conversations of files; what becomes of rows that are none; the count of both."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from scale_llm.config.data import BadRow, ChatFormat, DataConfig
from scale_llm.data.chat.comparison import Comparison, comparison_of, labelled_of
from scale_llm.data.chat.conversation import Conversation, conversation_of, format_of
from scale_llm.data.chat.turns import RowError
from scale_llm.data.rows import OnBytes, Problems, Row, read_rows

T = TypeVar("T")
FIRST = 3
"""Rows cut off, and dropped rows of each kind, that the report shows."""


@dataclass(kw_only=True, slots=True)
class Report:
    """What became of the rows; written to report.json."""

    files: list[str] = field(default_factory=list)
    rows: int = 0
    kept: int = 0
    truncated: int = 0
    first_truncated: list[str] = field(default_factory=list)
    """`file:line: what` of the first."""
    unmarked: int = 0
    """Conversations without a token that is known to be the assistant's; kept where all tokens train."""
    dropped: dict[str, int] = field(default_factory=dict)
    """How many for each reason."""
    first_dropped: dict[str, list[str]] = field(default_factory=dict)
    """`file:line: what` of the first for each reason."""
    tokens: int = 0
    trained_tokens: int = 0
    """Tokens that the loss counts."""
    longest: int = 0
    """Tokens of the longest example."""
    mean: float = 0.0
    """Tokens of an example."""

    def drop(self, file: str, line: int, message: str, kind: str) -> None:
        self.dropped[kind] = self.dropped.get(kind, 0) + 1
        first = self.first_dropped.setdefault(kind, [])
        if len(first) < FIRST:
            first.append(f"{file}:{line}: {message}")

    def truncate(self, file: str, line: int, message: str) -> None:
        self.truncated += 1
        if len(self.first_truncated) < FIRST:
            self.first_truncated.append(f"{file}:{line}: {message}")

    def finished(self) -> dict[str, Any]:
        self.rows = self.kept + sum(self.dropped.values())
        self.mean = round(self.tokens / max(self.kept, 1), 1)
        return asdict(self)


@dataclass(kw_only=True, slots=True)
class DroppedRows(Problems):
    """Bad rows that are counted and left out; a file that cannot be read is an error all the same."""

    report: Report

    def add(self, file: str, line: int, message: str, kind: str = "bad row") -> None:
        self.report.drop(file, line, message, kind)

    def add_file(self, file: str, line: int, message: str) -> None:
        Problems.add(self, file, line, message)
        self.raise_any()


def bad_rows(policy: BadRow, report: Report) -> Problems:
    """Where bad rows go."""
    return DroppedRows(report=report) if policy is BadRow.drop else Problems()


def read_conversations(
    files: Iterable[str], data: DataConfig, problems: Problems, on_bytes: OnBytes | None = None
) -> Iterator[Conversation]:
    """The conversations of all files in order."""
    for file in files:
        yield from read_parsed(file, _conversation_parser(data), problems, on_bytes)


def read_comparisons(
    files: Iterable[str], data: DataConfig, problems: Problems, on_bytes: OnBytes | None = None, *, unpaired: bool
) -> Iterator[Comparison]:
    """The comparisons, or unpaired answers, of all files in order."""
    read = labelled_of if unpaired else comparison_of
    for file in files:
        yield from read_parsed(file, lambda row: read(row, data.format, data.fields), problems, on_bytes)


def _conversation_parser(data: DataConfig) -> Callable[[Row], Conversation]:
    """For one file: its first row says what form all its rows have, where the configuration leaves that open."""
    form = data.format

    def parse(row: Row) -> Conversation:
        nonlocal form
        if form is ChatFormat.auto:
            form = format_of(row.values, data.fields)
        return conversation_of(row, form, data.fields)

    return parse


def read_parsed(
    file: str, parse: Callable[[Row], T], problems: Problems, on_bytes: OnBytes | None = None
) -> Iterator[T]:
    """What `parse` makes of the rows of a file; a `RowError` of it is a bad row."""
    known = _Counted(inner=problems)
    empty = True
    for row in read_rows(file, known, on_bytes):
        empty = False
        try:
            made = parse(row)
        except RowError as error:
            known.add(file, row.line, error.message, error.kind)
            continue
        yield made
    if empty and not known.count:
        problems.add_file(file, 1, "holds no rows; give a file with conversations in it")


@dataclass(kw_only=True, slots=True)
class _Counted(Problems):
    """Passes on what is added, and knows how much it was."""

    inner: Problems
    count: int = 0

    def add(self, file: str, line: int, message: str, kind: str = "bad row") -> None:
        self.count += 1
        self.inner.add(file, line, message, kind)

    def add_file(self, file: str, line: int, message: str) -> None:
        self.count += 1
        self.inner.add_file(file, line, message)


def report_lines(report: dict[str, Any]) -> list[str]:
    """A report for the terminal."""
    share = report["trained_tokens"] / max(report["tokens"], 1)
    lines = [
        f"{report['kept']:,} examples of {report['rows']:,} rows: {report['tokens']:,} tokens, "
        f"{report['trained_tokens']:,} of them trained ({share:.0%}); longest {report['longest']:,}, "
        f"mean {report['mean']:,}"
    ]
    return lines + lost_lines(report)


def lost_lines(report: dict[str, Any]) -> list[str]:
    """What was cut off or dropped, for the terminal."""
    lines = []
    if report["truncated"]:
        lines.append(f"cut off at model.seq_length: {report['truncated']:,}, first {report['first_truncated'][0]}")
    if report["unmarked"]:
        lines.append(
            f"no assistant's turn marked within length in {report['unmarked']:,} conversations: validation counts "
            "nothing of them, or, where it has no other, all tokens; raise model.seq_length, or give "
            "tokenizer.chat_template a template with {% generation %} tags"
        )
    for kind, count in sorted(report["dropped"].items(), key=lambda item: -item[1]):
        lines.append(f"dropped, {kind}: {count:,}, first {report['first_dropped'][kind][0]}")
    return lines


def no_usable_row(path: Any, report: dict[str, Any]) -> str:
    """The problem of files of which nothing is left."""
    return f"data.path={path}: no usable row; {'; '.join(lost_lines(report)) or 'all are empty'}"
