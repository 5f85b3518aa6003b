"""Documents that hold text of an evaluation set, by runs of words (13 of them, as for GPT-3: Brown et al. 2020)."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from scale_llm.config.curate import DecontaminateConfig
from scale_llm.config.errors import UserError
from scale_llm.curate.ledger import Ledger
from scale_llm.curate.simplify import shingles, words_of
from scale_llm.curate.sources import kind_of
from scale_llm.curate.step import Judge, Verdict
from scale_llm.curate.words import TokenCounter
from scale_llm.data import rows as data_rows
from scale_llm.data.files import write_json
from scale_llm.data.opening import open_bytes

INDEX = "index.json"


class Index(PipelineStep):
    """Hashes of the evaluation sets' runs of words, for each length: uint64 [runs] in order, in <length>.npy, and the
    numbers of their files, uint32 [runs], in <length>.files.npy; names and counts in index.json, written last."""

    type, name = "DECONTAMINATE", "index"

    def __init__(self, files: list[str], cfg: DecontaminateConfig, folder: Path):
        super().__init__()
        self.files, self.cfg, self.folder = files, cfg, folder

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        runs: dict[int, dict[int, int]] = {}
        counts = {"in all": 0, "too short to look for": 0}
        for number, file in enumerate(self.files):
            for text in self._texts(file):
                words = words_of(text)
                counts["in all"] += 1
                if len(words) < self.cfg.shortest:
                    counts["too short to look for"] += 1
                    continue
                length = min(len(words), self.cfg.n_grams)
                found = runs.setdefault(length, {})
                for value in shingles(words, length):
                    found.setdefault(value, number)
        self.folder.mkdir(parents=True, exist_ok=True)
        for length, found in runs.items():
            hashes = np.array(sorted(found), dtype=np.uint64)
            np.save(self.folder / f"{length}.npy", hashes)
            np.save(
                self.folder / f"{length}.files.npy", np.array([found[value] for value in hashes.tolist()], np.uint32)
            )
        names = [os.path.basename(file) for file in self.files]
        write_json(self.folder / INDEX, {"lengths": sorted(runs), "files": names, "counts": counts})

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
    def __init__(self, folder: Path, ledger: Ledger, counter: TokenCounter):
        super().__init__("decontaminate", ledger, counter)
        self.folder = folder

    def prepare(self, rank: int) -> None:
        index = json.loads((self.folder / INDEX).read_text())
        self.files = index["files"]
        self.runs = {
            length: [np.load(self.folder / f"{length}{part}.npy", mmap_mode="r") for part in ("", ".files")]
            for length in index["lengths"]
        }

    def judge(self, document: Document, position: int) -> Verdict:
        words = words_of(document.text)
        for length, (hashes, files) in self.runs.items():
            own = np.array(shingles(words, length), dtype=np.uint64)
            places = np.minimum(np.searchsorted(hashes, own), len(hashes) - 1)
            hits = places[hashes[places] == own]
            if len(hits):
                return False, f"text of {self.files[files[hits].min()]}"
        return True
