"""Tokens that the sources of a run hold for training, as far as it can be known without making anything. No torch."""

import os
from pathlib import Path

from scale_llm.config.data import DataConfig
from scale_llm.config.errors import UserError
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.data.cache_entries import tokenizer_entry, tokens_entry, with_embedded_files
from scale_llm.data.sources import Source, parse_path
from scale_llm.data.splits import split_tokens
from scale_llm.data.tokenizer_json import file_digest, token_id, tokenizer_file

BYTES_PER_TOKEN = 4.0
"""A guess: of English under a vocabulary of 32 thousand tokens or more."""
EXPANSION = {".gz": 3.0, ".bz2": 3.0, ".xz": 3.0, ".zst": 3.0, ".parquet": 2.0}
"""A guess: bytes of text in a byte of such a file."""


def tokens_at_hand(data: DataConfig, tokenizer: TokenizerConfig) -> list[tuple[Source, int, bool]]:
    """(source, tokens of its training split, whether that is a guess from its bytes) of every source of a valid
    `data.path`. Exact where a source is indexed, or was by an earlier start of the same configuration."""
    assert data.cache_dir is not None, "resolved"
    sources = [with_embedded_files(source, data) for source in parse_path(data.path, data.temperature)]
    known = _tokenizer(sources, data, tokenizer, Path(data.cache_dir).expanduser().absolute())
    return [(source, *_tokens(source, data, known)) for source in sources]


def _tokens(source: Source, data: DataConfig, known: tuple[str, int, Path] | None) -> tuple[int, bool]:
    prefixes = list(source.files) if source.kind == "indexed" else []
    if not prefixes and known is not None:
        directory, name = tokens_entry(source, data, *known)
        prefixes = [str(directory / name)] if directory.is_dir() else []
    if prefixes:
        return sum(split_tokens(prefix, data.split, "train") for prefix in prefixes), False
    return int(sum(map(_guess, source.files)) * _train_share(data.split)), True


def _tokenizer(
    sources: list[Source], data: DataConfig, config: TokenizerConfig, cache: Path
) -> tuple[str, int, Path] | None:
    """(digest, end-of-document token, cache) of the tokenizer of the run; None before it is made."""
    try:
        if config.path is not None:
            file = tokenizer_file(config.path)
        else:
            file = str(tokenizer_entry(sources, data, config, cache) / "tokenizer.json")
        eod = token_id(file, config.eod_token)
    except (OSError, ValueError, UserError):
        return None
    return None if eod is None else (file_digest(file), eod, cache)


def _guess(file: str) -> float:
    return os.path.getsize(file) * EXPANSION.get(os.path.splitext(file)[1], 1.0) / BYTES_PER_TOKEN


def _train_share(split: str) -> float:
    shares = [float(share) for share in split.split(",")]
    return shares[0] / sum(shares)
