"""From the data and tokenizer configuration to indexed tokens; each step is done once, then found again.

    cache_dir/tokenizers/<fingerprint>/tokenizer.json            of the sources and the tokenizer settings
    cache_dir/tokens/<fingerprint>/NAME_FIELD_document.{bin,idx} of one source and the tokenizer's content
    cache_dir/prepared/<fingerprint>/prepared.json               of all of these and the mixture

So another weight costs nothing, and another source costs that source alone.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scale_llm.config.data import BadRow, DataConfig
from scale_llm.config.errors import UserError
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.data.cache_entries import (
    FORMAT,
    max_document_bytes,
    reading,
    source_key,
    source_name,
    tokenizer_entry,
    tokens_entry,
)
from scale_llm.data.files import build_once, fingerprint, write_json
from scale_llm.data.index_work import IndexSettings, UnitCounts
from scale_llm.data.indexed_check import check_indexed, sequence_lengths
from scale_llm.data.mixture import shares
from scale_llm.data.progress import byte_progress
from scale_llm.data.source_text import (
    checked_sources,
    tokenizer_sample,
    tokenizer_sample_bytes,
)
from scale_llm.data.sources import Source
from scale_llm.data.splits import SPLITS, split_tokens, splits_too_small
from scale_llm.data.tokenizer_json import file_digest, tokenizer_file


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedData:
    """What ranks need to know of the data; written to prepared.json."""

    path: str
    """Where this was written."""
    tokenizer_path: str
    vocab_size: int
    """Tokens of the tokenizer; the model may pad it."""
    eod: int
    prefixes: list[str]
    """Absolute, without .bin and .idx."""
    weights: list[float] | None
    """One per prefix, summing to 1; None: each as much as it holds."""
    num_documents: int
    num_tokens: int
    """Ends of documents included."""
    num_bytes: int | None
    """UTF-8 bytes of the text, for bits per byte; None where an indexed prefix is among the sources."""
    left_out: dict[str, Any] = field(default_factory=dict)
    """Rows, documents and files of the text of which nothing was indexed: see `left_out_lines`."""


def load_prepared(path: str | Path) -> PreparedData:
    """Reads a prepared.json, or the one in a directory."""
    file = Path(path)
    file = file / "prepared.json" if file.is_dir() else file
    return PreparedData(**json.loads(file.read_text(encoding="utf-8")))


def prepare(
    data: DataConfig, tokenizer: TokenizerConfig, cache_dir: str | Path, show_progress: bool = False
) -> PreparedData:
    """Trains the tokenizer, indexes the text, or finds what an earlier call made of the same input.

    Any number of processes may call this at once: one does the work, the others wait for it.

    Raises:
        UserError: with every problem found.
    """
    cache = Path(cache_dir).expanduser().absolute()
    sources = checked_sources(data, tokenizer)
    tokenizer_path = _tokenizer(data, tokenizer, sources, cache, show_progress)

    from scale_llm.data.tokenizer import Tokenizer

    digest = file_digest(tokenizer_path)
    keys = [[source.weight, source_key(source, data), *reading(data)] for source in sources]
    mixed = mixture_key(sources, data)
    keys += [mixed] if mixed else []
    entry = cache / "prepared" / fingerprint([FORMAT, tokenizer.eod_token, digest, tokenizer_path, keys])

    def write(directory: Path) -> None:
        loaded = Tokenizer.load(tokenizer_path, tokenizer.eod_token)
        indexed = [_index(source, data, loaded, digest, cache, show_progress) for source in sources]
        _check_vocabulary(indexed, loaded.vocab_size)
        prepared = _collect(sources, indexed, data, loaded, str(entry / "prepared.json"))
        write_json(directory / "prepared.json", asdict(prepared))

    prepared = load_prepared(build_once(entry, write))
    problems = [problem for prefix in prepared.prefixes for problem in check_indexed(prefix)]
    if problems:
        raise UserError([*problems, f"data.cache_dir={cache}: if these are files below it, delete it and run again"])
    return prepared


def check_splits(
    prepared: PreparedData, data: DataConfig, *, seq_length: int, splits: Sequence[str] = SPLITS
) -> list[str]:
    """Problems of the named splits that would yield no sample; empty when all is well. Needs no ranks."""
    return splits_too_small(prepared.prefixes, prepared.weights, data.split, seq_length, splits)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Indexed:
    """One source as indexed files."""

    prefixes: list[str]
    counts: UnitCounts
    is_text: bool = True


def _tokenizer(
    data: DataConfig, config: TokenizerConfig, sources: list[Source], cache: Path, show_progress: bool
) -> str:
    """Path of the user's tokenizer.json, or of one trained on the sources."""
    from scale_llm.data.tokenizer import Tokenizer
    from scale_llm.data.tokenizer_files import train_directory

    if config.path is not None:
        Tokenizer.load(config.path, config.eod_token)  # complains about a missing end-of-document token
        return tokenizer_file(config.path)
    entry = tokenizer_entry(sources, data, config, cache)

    def train(directory: Path) -> None:
        with byte_progress("train tokenizer", tokenizer_sample_bytes(sources), show_progress) as on_bytes:
            train_directory(tokenizer_sample(sources, data, on_bytes), config, directory)

    return str(build_once(entry, train) / "tokenizer.json")


def _index(
    source: Source, data: DataConfig, tokenizer, tokenizer_digest: str, cache: Path, show_progress: bool
) -> _Indexed:
    if source.kind == "indexed":
        lengths = [sequence_lengths(prefix) for prefix in source.files]
        return _Indexed(
            prefixes=list(source.files),
            counts=UnitCounts(
                num_documents=sum(len(each) for each in lengths),
                num_tokens=sum(int(each.sum(dtype="int64")) for each in lengths),
            ),
            is_text=False,
        )
    entry, name = tokens_entry(source, data, tokenizer_digest, tokenizer.eod, cache)
    parts = entry.with_name(f"{entry.name}.parts")

    def build(directory: Path) -> None:
        from scale_llm.data.indexing import index_files, token_dtype

        settings = IndexSettings(
            tokenizer=tokenizer.path, eod_token=tokenizer.backend.id_to_token(tokenizer.eod),
            dtype=token_dtype(tokenizer.vocab_size), embedded=source.kind == "embedded", text_field=data.fields.text,
            max_document_bytes=max_document_bytes(data.max_document_megabytes),
            drop_bad_rows=data.on_bad_row is BadRow.drop,
        )  # fmt: skip
        total = sum(os.path.getsize(file) for file in source.files)
        with byte_progress(f"index {source_name(source)}", total, show_progress) as on_bytes:
            counts = index_files(
                source.files, settings, str(directory / name), parts, workers=data.index_workers, on_bytes=on_bytes
            )
        if not counts.num_documents:
            raise UserError(f"data.path={source.files[0]}: holds no text; give files with documents in them")
        write_json(directory / "counts.json", asdict(counts))

    directory = build_once(entry, build)
    shutil.rmtree(parts, ignore_errors=True)
    counts = json.loads((directory / "counts.json").read_text(encoding="utf-8"))
    return _Indexed(prefixes=[str(directory / name)], counts=UnitCounts(**counts))


def _check_vocabulary(indexed: list[_Indexed], vocab_size: int) -> None:
    prefixes = [prefix for each in indexed for prefix in each.prefixes]
    problems = [problem for prefix in prefixes for problem in check_indexed(prefix, vocab_size)]
    if problems:
        raise UserError(problems)


def _collect(sources: list[Source], indexed: list[_Indexed], data: DataConfig, tokenizer, path: str) -> PreparedData:
    total = UnitCounts()
    for each in indexed:
        total.add(each.counts)
    return PreparedData(
        path=path,
        tokenizer_path=tokenizer.path,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        prefixes=[prefix for each in indexed for prefix in each.prefixes],
        weights=_weights(sources, indexed, data),
        num_documents=total.num_documents,
        num_tokens=total.num_tokens,
        num_bytes=total.num_bytes if all(each.is_text for each in indexed) else None,
        left_out=total.left_out(),
    )


def _weights(sources: list[Source], indexed: list[_Indexed], data: DataConfig) -> list[float] | None:
    """Weights of the prefixes; a source of several shares its weight by their tokens."""
    held = [sum(split_tokens(prefix, data.split, "train") for prefix in each.prefixes) for each in indexed]
    given = shares(sources, held, data.temperature)
    if given is None:
        return None
    weights: list[float] = []
    for share, each in zip(given, indexed, strict=True):
        tokens = [int(sequence_lengths(prefix).sum(dtype="int64")) for prefix in each.prefixes]
        weights += [share * count / sum(tokens) for count in tokens]
    return weights


def mixture_key(sources: list[Source], data: DataConfig) -> list[Any]:
    """What the shares of sources depend on beside their content and weights; empty where nothing is said of it."""
    epochs = [source.epochs for source in sources]
    said = data.temperature != 1 or any(each is not None for each in epochs)
    return ["mixture", epochs, data.temperature, data.split] if said else []
