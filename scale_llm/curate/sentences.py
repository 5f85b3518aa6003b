"""Sentences that several documents share, in spans of three as for C4 (Raffel et al. 2020): one document keeps them.

It is the one with the lowest place in its shard, and of these that of the first shard.
"""

from pathlib import Path

import numpy as np
import xxhash
from datatrove.data import Document
from datatrove.pipeline.dedup.sentence_dedup import (
    SentDedupConfig,
    SentenceDedupFilter,
    SentenceDedupSignature,
    SentenceFindDedups,
)
from datatrove.utils.typeshelper import ExtensionHelperSD

from scale_llm.config.curate import SentencesConfig
from scale_llm.curate.ledger import Ledger
from scale_llm.curate.repetition import n_grams
from scale_llm.curate.simplify import simplify
from scale_llm.curate.step import Judge, Verdict
from scale_llm.curate.words import WORDS, TokenCounter

_PLACE = np.dtype([("doc", "<u4"), ("sent", "<u2")])
_MAX_SPANS = np.iinfo(np.uint16).max
"""datatrove numbers the sentences of a document with 16 bits."""


def config(cfg: SentencesConfig) -> SentDedupConfig:
    return SentDedupConfig(n_sentences=cfg.span, min_doc_words=cfg.min_words, min_num_sentences=0)


class Sign(SentenceDedupSignature):
    """datatrove's signatures, of sentences that are simplified faster."""

    def __init__(self, folder: Path, cfg: SentencesConfig):
        super().__init__(str(folder), config=config(cfg), language=WORDS)

    def get_hashes(self, doc: Document, doc_idx: int):
        sentences = [simplify(sentence) for sentence in WORDS.sent_tokenize(doc.text)[:_MAX_SPANS]]
        spans = enumerate(map(" ".join, n_grams(sentences, self.config.n_sentences)))
        return [(xxhash.xxh64_intdigest(span), doc_idx, place) for place, span in spans if span.strip()]


def find(signatures: Path, found: Path, cfg: SentencesConfig) -> SentenceFindDedups:
    return SentenceFindDedups(str(signatures), str(found), config=config(cfg))


class Cut(Judge):
    """Cuts the spans that were found; a document that is too short without them is removed."""

    def __init__(self, found: Path, cfg: SentencesConfig, ledger: Ledger, counter: TokenCounter):
        super().__init__("sentences", ledger, counter)
        self.found, self.cfg = found, cfg

    def prepare(self, rank: int) -> None:
        file = self.found / "0000" / f"{rank:05d}{ExtensionHelperSD.stage_2_duplicates}"
        places = np.fromfile(file, dtype=_PLACE) if file.exists() else np.empty(0, _PLACE)
        places.sort()
        documents, starts = np.unique(places["doc"], return_index=True)
        self.spans = dict(zip(documents.tolist(), np.split(places["sent"], starts[1:]), strict=False))
        self.inner = SentenceDedupFilter(str(self.found), config=config(self.cfg), language=WORDS)

    def judge(self, document: Document, position: int) -> Verdict:
        spans = self.spans.get(position)
        if spans is None:
            return True
        document.text, _ = self.inner.remove_dup_sentences(document, spans)
        self.reasons = ["shared sentences"]
        if len(WORDS.word_tokenize(document.text)) < self.cfg.min_words:
            return False, "too short without shared sentences"
        return True
