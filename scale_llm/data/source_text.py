"""The sources of a run as text: checked, named by their content, read.

No torch here.
"""

import itertools
import os
from collections.abc import Iterator

from scale_llm.config.data import DataConfig
from scale_llm.config.errors import UserError
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.data import corpus
from scale_llm.data.cache_entries import TOKENIZER_BYTES, max_document_bytes, with_embedded_files
from scale_llm.data.chat.reading import Report, bad_rows
from scale_llm.data.indexed_check import check_indexed
from scale_llm.data.rows import Part
from scale_llm.data.sources import Source, parse_path
from scale_llm.data.splits import split_problems


def checked_sources(data: DataConfig, tokenizer: TokenizerConfig) -> list[Source]:
    """Sources of `data.path`, the embedded one with its files; a UserError with every problem of them."""
    problems = split_problems(data.split)
    sources: list[Source] = []
    try:
        sources = parse_path(data.path, data.temperature)
    except UserError as error:
        problems += error.problems
    for source in sources:
        if source.kind == "indexed":
            problems += [problem for prefix in source.files for problem in check_indexed(prefix)]
            if tokenizer.path is None:
                problems.append(
                    f"tokenizer.path=null: {source.files[0]} is indexed already; set tokenizer.path to the "
                    "tokenizer it was made with"
                )
    if problems:
        raise UserError(problems)
    return [with_embedded_files(source, data) for source in sources]


def documents_of(source: Source, data: DataConfig, problems: corpus.Problems, on_bytes=None) -> Iterator[str]:
    """Documents of a source of text, in the order of its files; bad rows go to `problems`."""
    if source.kind == "embedded":
        return corpus.read_embedded(list(source.files), on_bytes)
    part = Part(limit_bytes=max_document_bytes(data.max_document_megabytes))
    return itertools.chain.from_iterable(
        corpus.read_file(file, data.fields.text, problems, on_bytes, part) for file in source.files
    )


def tokenizer_sample_bytes(sources: list[Source]) -> int:
    """What `tokenizer_sample` reads, about."""
    share = TOKENIZER_BYTES // len(sources)
    return sum(min(share, sum(os.path.getsize(file) for file in source.files)) for source in sources)


def tokenizer_sample(sources: list[Source], data: DataConfig, on_bytes) -> Iterator[str]:
    """Documents to train a tokenizer on: the first of each source, in equal parts."""
    for source in sources:
        left = TOKENIZER_BYTES // len(sources)
        problems = bad_rows(data.on_bad_row, Report())  # counted when they are indexed
        for text in documents_of(source, data, problems, on_bytes):
            yield text
            left -= len(text.encode("utf-8"))
            if left <= 0:
                break
        problems.raise_any()
