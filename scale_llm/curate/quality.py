"""Perplexity of a document under a small n-gram model of bytes, which the tool trains itself.

Interpolated by Witten and Bell (1991), in hashed tables, so that training and scoring are a few passes of numpy. Two
models learn from halves of the training text, and a document is scored by the one that has not seen it: with one, what
was in the training text would look better than what was not. CCNet (Wenzek et al. 2020) filters by perplexity with
KenLM; words and a larger model need a download, and bytes tell noise from language as well.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import xxhash
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from scale_llm.config.curate import QualityConfig
from scale_llm.curate.ledger import Ledger
from scale_llm.curate.step import Judge, Verdict
from scale_llm.curate.words import TokenCounter
from scale_llm.curate.writing import read_between
from scale_llm.data import corpus
from scale_llm.data import rows as data_rows
from scale_llm.data.files import write_json

ORDER = 5
"""Bytes of the longest n-gram."""
SLOTS = 1 << 20
"""Of a table; collisions make rare n-grams look a little less rare."""
SCORED_BYTES = 20_000
"""From the start of a document; more changes the mean by little."""


def _hashes(text: str) -> list[np.ndarray]:
    """For n = 1..ORDER the slot of the n-gram that ends at each byte: int64 [bytes] each; with ORDER - 1 spaces before
    the text, so that every byte has its n-grams."""
    raw = text.encode("utf-8", "replace")[:SCORED_BYTES]
    values = np.frombuffer(b" " * (ORDER - 1) + raw, dtype=np.uint8).astype(np.uint64) + np.uint64(1)
    length, found = len(raw), []
    total = np.zeros(length, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for n in range(1, ORDER + 1):
            # Byte n - 1 places back, times a power of an odd constant: a polynomial hash that grows by one term
            back = values[ORDER - n : ORDER - n + length]
            total = total + back * np.uint64(pow(0x9E3779B97F4A7C15, n, 1 << 64))
            mixed = (total ^ (total >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            found.append(((mixed >> np.uint64(44)) % np.uint64(SLOTS)).astype(np.int64))
    return found


class Model:
    """Counts of n-grams, and of what follows each context.

    grams, contexts, kinds: int32 [ORDER, SLOTS]; contexts[n - 1]: how often a context of n - 1 bytes came; kinds: how
    many different bytes followed it.
    """

    def __init__(self, grams: np.ndarray, contexts: np.ndarray, kinds: np.ndarray):
        self.grams, self.contexts, self.kinds = grams, contexts, kinds

    @classmethod
    def empty(cls) -> "Model":
        return cls(*np.zeros((3, ORDER, SLOTS), dtype=np.int32))

    def learn(self, text: str) -> None:
        hashes = _hashes(text)
        for n in range(ORDER):
            # What came before a byte: the (n - 1)-gram that ends one byte earlier
            context = np.zeros_like(hashes[0]) if n == 0 else np.concatenate([[0], hashes[n - 1][:-1]])
            slots, first, times = np.unique(hashes[n], return_index=True, return_counts=True)
            new = self.grams[n][slots] == 0
            np.add.at(self.kinds[n], context[first][new], 1)
            self.grams[n][slots] += times
            np.add.at(self.contexts[n], context, 1)

    def perplexity(self, text: str) -> float:
        """Of a byte, on average."""
        hashes = _hashes(text)
        if not len(hashes[0]):
            return float("inf")
        probability = np.full(len(hashes[0]), 1 / 256)
        for n in range(ORDER):
            context = np.zeros_like(hashes[0]) if n == 0 else np.concatenate([[0], hashes[n - 1][:-1]])
            seen, kinds = self.contexts[n][context], self.kinds[n][context]
            told = seen > 0
            mixed = (self.grams[n][hashes[n]] + kinds * probability) / np.maximum(seen + kinds, 1)
            probability = np.where(told, mixed, probability)
        return float(np.exp(-np.log(np.maximum(probability, 1e-12)).mean()))


def half_of(text: str) -> int:
    """0 or 1: which model learns from a document, or a copy of it; the other scores it."""
    return xxhash.xxh64_intdigest(" ".join(text.lower().split())) & 1


def train(texts: Iterable[str]) -> tuple[list[Model], float | None]:
    """Two models, and the median perplexity of texts under the model that has not seen them; None without texts."""
    models, kept = [Model.empty(), Model.empty()], list(texts)
    for text in kept:
        models[half_of(text)].learn(text)
    seen = [models[1 - half_of(text)].perplexity(text) for text in kept]
    return models, float(np.median(seen)) if seen else None


class Train(PipelineStep):
    """Trains on the reference, or on the beginning of each shard's documents so far; writes int32 [2, 3, ORDER, SLOTS],
    the two models, to `path` (.npy), and the limit beside it (.json)."""

    type, name = "QUALITY", "train"

    def __init__(self, cfg: QualityConfig, files: list[str], documents: Path, shards: int, text_key: str, path: Path):
        super().__init__()
        self.cfg, self.files, self.documents, self.shards, self.path = cfg, files, documents, shards, path
        self.text_key = text_key

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        models, median = train(self._reference() if self.files else self._own())
        limit = self.cfg.max_perplexity
        if limit is None and median is not None:
            limit = median * self.cfg.tolerance
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tables = np.stack([np.stack([model.grams, model.contexts, model.kinds]) for model in models])
        temporary = self.path.with_name(f".{self.path.name}.tmp.npy")
        np.save(temporary, tables)
        os.replace(temporary, self.path)
        write_json(self.path.with_suffix(".json"), {"median": median, "limit": limit})

    def _own(self) -> Iterator[str]:
        for shard in range(self.shards):
            documents = read_between(self.documents / f"{shard:05d}.jsonl.zst")
            yield from _first(self.cfg.train_megabytes / self.shards, (document.text for document in documents))

    def _reference(self) -> Iterator[str]:
        problems = data_rows.Problems()
        for file in self.files:
            texts = corpus.read_file(file, self.text_key, problems)
            yield from _first(self.cfg.train_megabytes / len(self.files), texts)
        problems.raise_any()


def _first(megabytes: float, texts: Iterable[str]) -> Iterator[str]:
    """Texts until they are so many together."""
    left = megabytes * 1e6
    for text in texts:
        if left <= 0:
            return
        left -= len(text)
        yield text


class Score(Judge):
    def __init__(self, path: Path, ledger: Ledger, counter: TokenCounter):
        super().__init__("quality", ledger, counter)
        self.path = path

    def prepare(self, rank: int) -> None:
        self.limit = json.loads(self.path.with_suffix(".json").read_text())["limit"]
        # Mapped, not read: tasks of one machine share the tables, and touch few of their pages
        self.models = [Model(*tables) for tables in np.load(self.path, mmap_mode="r")]

    def judge(self, document: Document, position: int) -> Verdict:
        perplexity = self.models[1 - half_of(document.text)].perplexity(document.text)
        document.metadata["perplexity"] = round(perplexity, 3)
        self.ledger.table("perplexity")[f"{perplexity:.1f}"] += 1
        return True if self.limit is None or perplexity <= self.limit else (False, "perplexity")
