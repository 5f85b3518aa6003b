"""Indexed files: read back by megatron-core, and refused when damaged."""

import shutil
from pathlib import Path

import numpy
import pytest

from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.data import corpus
from scale_llm.data.index_work import IndexSettings
from scale_llm.data.indexed_check import check_indexed, sequence_lengths
from scale_llm.data.indexing import index_files
from scale_llm.data.megatron import IndexedDataset
from scale_llm.data.prepare import PreparedData
from scale_llm.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(embedded: PreparedData) -> Tokenizer:
    return Tokenizer.load(embedded.tokenizer_path, TokenizerConfig().eod_token)


def index(files: list[str], tokenizer: Tokenizer, prefix: Path, **settings):
    """Indexes files here, in one process."""
    made = IndexSettings(
        **{"tokenizer": tokenizer.path, "eod_token": "<|endoftext|>", "dtype": "uint16", "text_field": "text",
           "max_document_bytes": 1 << 20, "drop_bad_rows": False, **settings}
    )  # fmt: skip
    return index_files(files, made, str(prefix), prefix.with_name("parts"), workers=1)


@pytest.fixture(scope="session")
def indexed_once(web: str, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = tmp_path_factory.mktemp("indexed") / "web_text_document"
    index([web], tokenizer, prefix)
    return str(prefix)


@pytest.fixture
def indexed(indexed_once: str, tmp_path: Path) -> str:
    """Copies that a test may damage."""
    for extension in (".bin", ".idx"):
        shutil.copy(indexed_once + extension, tmp_path)
    return str(tmp_path / "web_text_document")


def test_round_trip(web: str, tokenizer: Tokenizer, tmp_path: Path):
    """What megatron-core reads back is every document's text and then one end of document."""
    texts = list(corpus.read_file(web, "text", corpus.Problems()))
    prefix = str(tmp_path / "web_text_document")
    counts = index([web], tokenizer, Path(prefix))
    dataset = IndexedDataset(prefix)
    assert dataset.index.dtype is numpy.uint16
    assert len(dataset) == len(texts) == counts.num_documents == len(dataset.document_indices) - 1
    for text, ids in zip(texts, dataset, strict=False):
        assert ids[-1] == tokenizer.eod and tokenizer.eod not in ids[:-1]
        assert tokenizer.decode(ids[:-1].tolist()) == text
    assert counts.num_tokens == dataset.sequence_lengths.sum()
    assert counts.num_bytes == sum(len(text.encode()) for text in texts)
    assert sequence_lengths(prefix).tolist() == dataset.sequence_lengths.tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "parts",
        "web_text_document.bin",
        "web_text_document.idx",
    ]


def test_a_whole_pair_passes(indexed: str, tokenizer: Tokenizer):
    assert check_indexed(indexed, tokenizer.vocab_size) == []


@pytest.mark.parametrize("keep", [0, 5, 20, 33, 34, 500, -1, -8])
def test_truncated_index(indexed: str, keep: int):
    """Wherever the file ends: in the magic, the header, the lengths, or one byte before its end."""
    content = Path(indexed + ".idx").read_bytes()
    Path(indexed + ".idx").write_bytes(content[:keep])
    (problem,) = check_indexed(indexed)
    assert "truncated" in problem and indexed in problem and "again" in problem


def test_index_of_another_bin(indexed: str, embedded: PreparedData, tmp_path: Path):
    other = str(tmp_path / "other")
    shutil.copy(indexed + ".idx", other + ".idx")
    shutil.copy(embedded.prefixes[0] + ".bin", other + ".bin")
    (problem,) = check_indexed(other)
    assert "does not belong to this .bin" in problem


def test_truncated_bin_absent_bin_and_no_index_at_all(indexed: str):
    content = Path(indexed + ".bin").read_bytes()
    Path(indexed + ".bin").write_bytes(content[:-2])
    assert "does not belong" in check_indexed(indexed)[0]
    Path(indexed + ".bin").write_bytes(b"")
    assert "holds no tokens" in check_indexed(indexed)[0]
    Path(indexed + ".bin").unlink()
    assert "No such file" in check_indexed(indexed)[0]
    Path(indexed + ".idx").write_bytes(b"PK\x03\x04 something else entirely")
    Path(indexed + ".bin").write_bytes(content)
    assert "no Megatron index" in check_indexed(indexed)[0]


def test_damaged_pointers(indexed: str):
    """The right sizes, but a pointer that leads outside."""
    content = bytearray(Path(indexed + ".idx").read_bytes())
    place = 34 + 4 * len(sequence_lengths(indexed)) + 8
    content[place : place + 8] = (1 << 40).to_bytes(8, "little")
    Path(indexed + ".idx").write_bytes(content)
    assert "points outside" in check_indexed(indexed)[0]


def test_tokens_beyond_the_vocabulary(indexed: str):
    (problem,) = check_indexed(indexed, vocab_size=300)
    assert "300 tokens" in problem and "tokenizer.path" in problem
