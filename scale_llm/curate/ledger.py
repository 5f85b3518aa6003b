"""What every step did to the documents of a shard: counts, reasons, examples; written once the shard is through.

A phase's steps share one Ledger, which datatrove copies to each task with them. Files appear whole or not at all, so
a shard that was interrupted is counted anew, and never twice.
"""

import gzip
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import orjson
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

EXCERPT = 300
"""Characters of an example in the report."""
MAX_BAD_ROWS = 100
"""Places of bad rows that a shard lists; beyond, rows are counted."""


@dataclass(slots=True)
class StepCount:
    """Documents and tokens before and after a step, documents it changed, seconds it took, and its reasons."""

    documents_in: int = 0
    documents_out: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    changed: int = 0
    seconds: float = 0.0
    removed: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    acted: Counter[str] = field(default_factory=Counter)
    """By label of the document, where there are labels: those that the step removed or changed; and by reason, "label
    reason"; the sums over documents under "" and " reason"."""
    lost: Counter[str] = field(default_factory=Counter)
    """By label: those that the step removed."""

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "StepCount":
        counters = {name: Counter(values[name]) for name in ("removed", "changes", "acted", "lost")}
        return cls(**{**values, **counters})

    def add(self, other: "StepCount", examples: int) -> None:
        """Counts of another shard on top; of each reason the first examples stay."""
        for name in ("documents_in", "documents_out", "tokens_in", "tokens_out", "changed", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("removed", "changes", "acted", "lost"):
            getattr(self, name).update(getattr(other, name))
        for reason, rows in other.examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + rows)[:examples]


class Ledger:
    """Counts of one phase, shard by shard, in `folder`/00000.json; removed documents in `removed`/00000.jsonl.gz."""

    def __init__(self, folder: Path, *, removed: Path | None, examples: int, label: str | None):
        self.folder, self.removed_folder, self.examples, self.label = folder, removed, examples, label
        self._steps: dict[str, StepCount] = {}
        self._tables: dict[str, Counter[str]] = {}
        self._bad: list[dict[str, Any]] = []
        self._log: IO[bytes] | None = None

    def begin(self, rank: int, steps: list[str]) -> None:
        """Starts a shard's account, with its steps in their order."""
        self.rank = rank
        self._steps, self._tables, self._bad = {name: StepCount() for name in steps}, {}, []
        if self.removed_folder is not None:
            self.removed_folder.mkdir(parents=True, exist_ok=True)
            # No time in the header: the same documents are the same bytes
            self._raw = open(self._temporary(self.removed_folder, "jsonl.gz"), "wb")
            self._log = gzip.GzipFile("", "wb", 6, self._raw, 0)  # type: ignore[assignment]

    def step(self, name: str) -> StepCount:
        return self._steps.setdefault(name, StepCount())

    def table(self, name: str) -> Counter[str]:
        """A histogram: of languages, lengths, kinds of records, labels."""
        return self._tables.setdefault(name, Counter())

    def labels_of(self, document: Document) -> list[str]:
        """What the input says is wrong with a document: one name or a list of them."""
        if not self.label:
            return []
        value = document.metadata["fields"].get(self.label)
        return [str(label) for label in (value if isinstance(value, list) else [value])]

    def remove(self, step: str, reason: str, document: Document, **more: Any) -> None:
        """Counts a removed document and writes it down; its tokens are in `tokens_in` already."""
        count = self.step(step)
        count.removed[reason] += 1
        count.lost.update(self.labels_of(document))
        self._act(count, document, [reason])
        row = {"file": document.metadata["file"], "line": document.metadata["line"], **more}
        self._example(count, reason, {**row, "text": document.text[:EXCERPT]})
        self._write({"step": step, "reason": reason, **row, "text": document.text})

    def change(self, step: str, reasons: list[str], document: Document, before: str, *, secret: bool) -> None:
        """Counts a document that the step has changed and kept. secret: examples do not show what was there before."""
        count = self.step(step)
        count.changed += 1
        count.changes.update(reasons)
        self._act(count, document, reasons)
        for reason in reasons:
            place = {"file": document.metadata["file"], "line": document.metadata["line"]}
            difference = _difference(before, document.text)
            self._example(count, reason, {**place, **({"text": difference["after"]} if secret else difference)})

    def bad(self, file: str, line: int, reason: str, message: str, rows: int = 1) -> None:
        """Counts rows that cannot be read, with the place of the first."""
        self.step("read").removed[reason] += rows
        if len(self._bad) < MAX_BAD_ROWS:
            self._bad.append({"file": file, "line": line, "reason": reason, "message": message, "rows": rows})
        self._write({"step": "read", "reason": reason, "file": file, "line": line, "message": message, "rows": rows})

    def finish(self) -> None:
        """Publishes the shard's counts, after its removed documents."""
        if self._log is not None and self.removed_folder is not None:
            self._log.close()
            self._raw.close()
            name = self._temporary(self.removed_folder, "jsonl.gz")
            os.replace(name, self.removed_folder / f"{self.rank:05d}.jsonl.gz")
            self._log = None
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "steps": {name: count.to_json() for name, count in self._steps.items()},
            "tables": self._tables,
            "bad": self._bad,
        }
        temporary = self._temporary(self.folder, "json")
        temporary.write_bytes(orjson.dumps(content))
        os.replace(temporary, self.folder / f"{self.rank:05d}.json")

    def _act(self, count: StepCount, document: Document, reasons: list[str]) -> None:
        if self.label:
            for label in ["", *self.labels_of(document)]:
                count.acted.update([label, *(f"{label} {reason}" for reason in reasons)])

    def _example(self, count: StepCount, reason: str, row: dict[str, Any]) -> None:
        rows = count.examples.setdefault(reason, [])
        if len(rows) < self.examples:
            rows.append(row)

    def _write(self, row: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(orjson.dumps(row, default=str, option=orjson.OPT_APPEND_NEWLINE))

    def _temporary(self, folder: Path, extension: str) -> Path:
        return folder / f".{self.rank:05d}.{extension}.tmp"


class Begin(PipelineStep):
    """First of a phase: opens the ledger before the generators of the other steps run."""

    type, name = "LEDGER", "begin"

    def __init__(self, ledger: Ledger):
        super().__init__()
        self.ledger = ledger
        self.steps: list[str] = []

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        self.ledger.begin(rank, self.steps)
        return data


def _difference(before: str, after: str) -> dict[str, str]:
    """The first place where two texts differ, with a little before it."""
    place = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    begin = max(0, place - 60)
    return {"text": before[begin : begin + EXCERPT // 2], "after": after[begin : begin + EXCERPT // 2]}


def length_class(tokens: int) -> str:
    """The power of two that a number of tokens reaches."""
    return str(1 << (tokens.bit_length() - 1) if tokens else 0)
