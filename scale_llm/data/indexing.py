"""Documents to Megatron's .bin and .idx, by megatron-core's own builder."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from scale_llm.data.megatron import DType, IndexedDatasetBuilder
from scale_llm.data.tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 21
"""Text tokenised at a time, enough to keep all cores busy."""


@dataclass(kw_only=True, slots=True)
class IndexCounts:
    num_documents: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    """UTF-8 bytes of the text."""


def index_documents(documents: Iterable[str], tokenizer: Tokenizer, prefix: str) -> IndexCounts:
    """Writes PREFIX.bin and PREFIX.idx, an end-of-document token after each document.

    Both are written under temporary names and renamed, the .idx last: where it is, the pair is whole.
    """
    counts = IndexCounts()
    temporary = f"{prefix}.tmp-{os.getpid()}"
    builder = IndexedDatasetBuilder(temporary + ".bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    try:
        for batch in _batches(documents):
            for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                ids.append(tokenizer.eod)
                builder.add_document(ids, [len(ids)])
                counts.num_documents += 1
                counts.num_tokens += len(ids)
                counts.num_bytes += len(text.encode("utf-8"))
        builder.finalize(temporary + ".idx")
        os.replace(temporary + ".bin", prefix + ".bin")
        os.replace(temporary + ".idx", prefix + ".idx")
    finally:
        builder.data_file.close()
        for extension in (".bin", ".idx"):
            if os.path.exists(temporary + extension):
                os.remove(temporary + extension)
    return counts


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
