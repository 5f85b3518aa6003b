"""Exact copies: of documents whose text is the same but for case and space, the first stays."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig, ExactDedupSignature, ExactFindDedups
from datatrove.utils.typeshelper import ExtensionHelperSD

from scale_llm.curate.ledger import Ledger
from scale_llm.curate.step import Judge, Verdict
from scale_llm.curate.words import TokenCounter

_FIRST = np.iinfo(np.uint16).max


def content(document: Document) -> str:
    """What makes two documents the same."""
    return " ".join(document.text.lower().split())


def _earliest(document: Document) -> int:
    """The copy of the first shard has priority; within a shard datatrove keeps the first."""
    return max(1, _FIRST - document.metadata["shard"])


def config() -> ExactDedupConfig:
    # datatrove reads from the annotation whether it hashes text or bytes
    getter: Callable[[Document], str] = content
    return ExactDedupConfig(content_getter=getter, document_priority=_earliest)


class Sign(ExactDedupSignature):
    """datatrove's hashes of a shard's documents, which know their shard."""

    def __init__(self, folder: Path):
        super().__init__(str(folder), config())

    def run(self, data, rank: int = 0, world_size: int = 1):
        super().run(_with_shard(data, rank), rank, world_size)


def _with_shard(data, rank: int):
    for document in data:
        document.metadata["shard"] = rank
        yield document


def find(signatures: Path, found: Path) -> ExactFindDedups:
    return ExactFindDedups(str(signatures), str(found), config())


class Drop(Judge):
    """Removes what `find` found; the documents must be those that were signed, in their order."""

    def __init__(self, found: Path, ledger: Ledger, counter: TokenCounter):
        super().__init__("exact", ledger, counter)
        self.found = found

    def prepare(self, rank: int) -> None:
        file = self.found / "00000" / f"{rank:05d}{ExtensionHelperSD.stage_2_duplicates}"
        self.copies = set(np.fromfile(file, dtype="<u4").tolist()) if file.exists() else set()

    def judge(self, document: Document, position: int) -> Verdict:
        return (False, "copy") if position in self.copies else True
