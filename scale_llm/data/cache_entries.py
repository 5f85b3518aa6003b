"""Where in the cache what is made of a source lies. No torch and no tokenizer: `scale-llm --check` looks for it."""

import dataclasses
from pathlib import Path
from typing import Any

from scale_llm.config.data import DataConfig
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.data.chat.template_files import template_source
from scale_llm.data.files import fingerprint, stamp
from scale_llm.data.sources import Source
from scale_llm.data.stdlib_files import embedded_files

FORMAT = 2
"""Raised when the same input would give other files, so that old cache entries are left alone."""
TOKENIZER_BYTES = 16_000_000
"""Text a tokenizer is trained on, the first of each source in equal parts; more changes little."""


def with_embedded_files(source: Source, data: DataConfig) -> Source:
    """The embedded source with its files named; any other as it is."""
    if source.kind != "embedded":
        return source
    return dataclasses.replace(source, files=tuple(embedded_files(data.embedded_megabytes)))


def source_key(source: Source, data: DataConfig) -> list[Any]:
    """What names a source's content, without reading it."""
    files = source.files
    if source.kind == "indexed":
        files = tuple(prefix + extension for prefix in files for extension in (".bin", ".idx"))
    return [source.kind, data.fields.text, [stamp(file) for file in files]]


def tokenizer_entry(sources: list[Source], data: DataConfig, config: TokenizerConfig, cache: Path) -> Path:
    """Directory of the tokenizer that is trained on these sources."""
    template = None if config.chat_template is None else template_source(Path(), config).text
    special = [config.eod_token, *config.special_tokens]
    settings = [FORMAT, TOKENIZER_BYTES, config.vocab_size, special, template, reading(data)]
    keys = [source_key(source, data) for source in sources]
    return cache / "tokenizers" / fingerprint([settings, keys])


def tokens_entry(source: Source, data: DataConfig, tokenizer_digest: str, eod: int, cache: Path) -> tuple[Path, str]:
    """(directory, name without extension) of the tokens of a source of text."""
    key = [FORMAT, tokenizer_digest, eod, source_key(source, data), *reading(data)]
    return cache / "tokens" / fingerprint(key), f"{source_name(source)}_{document_name(data.fields.text)}"


def document_name(field: str) -> str:
    """End of an indexed file's name. A key of JSON may hold what parts a path."""
    return f"{field.replace('/', '_')}_document"


def max_document_bytes(megabytes: float) -> int:
    """At most what one read takes."""
    return int(min(megabytes * 1e6, 2.0**62))


def reading(data: DataConfig) -> list[Any]:
    """How rows are read, as far as it changes what is indexed."""
    return [data.on_bad_row.value, max_document_bytes(data.max_document_megabytes)]


def source_name(source: Source) -> str:
    """Readable start of an indexed file's name."""
    if source.kind == "embedded":
        return "stdlib"
    first = Path(source.files[0])
    return first.name.split(".")[0] if len(source.files) == 1 else first.parent.name or "files"
