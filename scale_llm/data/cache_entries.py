"""Where in the cache what is made of a source lies. No torch and no tokenizer: `scale-llm --check` looks for it."""

from pathlib import Path
from typing import Any

from scale_llm.config.data import DataConfig
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.data.chat.template_files import template_source
from scale_llm.data.files import fingerprint
from scale_llm.data.source_text import TOKENIZER_BYTES, max_document_bytes, source_key
from scale_llm.data.sources import Source

FORMAT = 2
"""Raised when the same input would give other files, so that old cache entries are left alone."""


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
    return cache / "tokens" / fingerprint(key), f"{source_name(source)}_{data.fields.text}_document"


def reading(data: DataConfig) -> list[Any]:
    """How rows are read, as far as it changes what is indexed."""
    return [data.on_bad_row.value, max_document_bytes(data)]


def source_name(source: Source) -> str:
    """Readable start of an indexed file's name."""
    if source.kind == "embedded":
        return "stdlib"
    first = Path(source.files[0])
    return first.name.split(".")[0] if len(source.files) == 1 else first.parent.name or "files"
