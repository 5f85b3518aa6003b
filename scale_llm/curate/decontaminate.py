"""Documents that hold text of an evaluation set, by runs of words (13 of them, as for GPT-3: Brown et al. 2020)."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from scale_llm.config.curate import DecontaminateConfig
from scale_llm.config.errors import UserError
from scale_llm.curate.ledger import Ledger
from scale_llm.curate.opening import open_bytes
from scale_llm.curate.simplify import shingles, words_of
from scale_llm.curate.sources import kind_of
from scale_llm.curate.step import Judge, Verdict
from scale_llm.curate.words import TokenCounter
from scale_llm.data import rows as data_rows


class Index(PipelineStep):
    """Hashes of the evaluation sets' runs of words: {length: {hash: file}} as JSON."""

    type, name = "DECONTAMINATE", "index"

    def __init__(self, files: list[str], cfg: DecontaminateConfig, path: Path):
        super().__init__()
        self.files, self.cfg, self.path = files, cfg, path

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        index: dict[int, dict[str, str]] = {}
        counts = {"in all": 0, "too short to look for": 0}
        for file in self.files:
            for text in self._texts(file):
                words = words_of(text)
                counts["in all"] += 1
                if len(words) < self.cfg.shortest:
                    counts["too short to look for"] += 1
                    continue
                length = min(len(words), self.cfg.n_grams)
                runs = index.setdefault(length, {})
                runs.update((str(run), os.path.basename(file)) for run in shingles(words, length))
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text(json.dumps({"index": index, "counts": counts}))
        os.replace(temporary, self.path)

    def _texts(self, file: str) -> Iterator[str]:
        """Fields of rows; lines of text. A row that cannot be read stops all: it would be looked for nowhere."""
        if kind_of(file) == "text":
            with open_bytes(file) as stream:
                yield from (line.decode() for line in stream if line.strip())
            return
        problems = data_rows.Problems()
        for row in data_rows.read_rows(file, problems):
            yield from self._fields(row.values)
        problems.raise_any()

    def _fields(self, row: dict[str, Any]) -> Iterator[str]:
        missing = [name for name in self.cfg.fields if name not in row]
        if missing:
            raise UserError(
                f"curate.decontaminate.fields={self.cfg.fields}: {missing[0]} is in no row; it has {list(row)}"
            )
        for name in self.cfg.fields or row:
            yield from _strings(row[name])


def _strings(value: Any) -> Iterator[str]:
    """Texts in a field, which may be a list of choices or messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


class Decontaminate(Judge):
    def __init__(self, path: Path, ledger: Ledger, counter: TokenCounter):
        super().__init__("decontaminate", ledger, counter)
        self.path = path

    def prepare(self, rank: int) -> None:
        index = json.loads(self.path.read_text())["index"]
        self.index = {int(length): {int(value): file for value, file in runs.items()} for length, runs in index.items()}

    def judge(self, document: Document, position: int) -> Verdict:
        words = words_of(document.text)
        for length, runs in self.index.items():
            found = runs.keys() & set(shingles(words, length))
            if found:
                return False, f"text of {min(runs[run] for run in found)}"
        return True
