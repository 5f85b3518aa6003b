"""Fill in the middle: nothing of a document is lost or made up; a sample depends on the seed and its index alone."""

import argparse
import inspect
import json
import random
from pathlib import Path

import numpy
import pytest
import tokenizers
import torch

from scale_llm.config.data import DataConfig, LoaderKind
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.data.datasets import SampleStream, build_dataset
from scale_llm.data.fim import FillInTheMiddle, tokens_join
from scale_llm.data.loader_choice import build_loader, dali_is_installed
from scale_llm.data.prepare import PreparedData, prepare
from scale_llm.data.tokenizer_json import fim_problems

SEQ = 255
MARKS = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>"]


@pytest.fixture(scope="module")
def prepared(embedded: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Paragraphs of source code as documents, some beyond ASCII, and a tokenizer with three more tokens."""
    directory = tmp_path_factory.mktemp("fim")
    backend = tokenizers.Tokenizer.from_file(embedded.tokenizer_path)
    backend.add_special_tokens(MARKS)
    backend.save(str(directory / "tokenizer.json"))
    paragraphs = inspect.getsource(argparse).split("\n\n")
    texts = [text if number % 7 else f"{text} 漢字 é" for number, text in enumerate(paragraphs)]
    (directory / "code.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = DataConfig(path=str(directory / "code.jsonl"))
    return prepare(data, TokenizerConfig(path=str(directory)), directory)


def build(prepared: PreparedData, cache: Path, split: str = "train", **changes) -> SampleStream:
    seed, number = changes.pop("seed", 1), changes.pop("num_samples", 400)
    data = DataConfig(split="80,10,10", **changes)
    return build_dataset(prepared, data, split=split, seq_length=SEQ, seed=seed, num_samples=number, cache_dir=cache)


def documents(row: numpy.ndarray, eod: int) -> list[numpy.ndarray]:
    """What lies between ends of document; the last may be cut off."""
    return numpy.split(row, numpy.flatnonzero(row == eod))


def in_order(tokens: list[int], prefix: int, middle: int, suffix: int) -> tuple[str, list[list[int]]]:
    """(order, start, middle and end) of a document that was put in another order."""
    if tokens[:2] == [prefix, suffix]:  # the end, then start and middle with no mark between them
        cut = tokens.index(middle)
        return "SPM", [tokens[cut + 1 :], [], tokens[2:cut]]
    first, second = tokens.index(suffix), tokens.index(middle)
    return "PSM", [tokens[1:first], tokens[second + 1 :], tokens[first + 1 : second]]


def test_documents_come_together_again(prepared: PreparedData, cache: Path):
    """Every whole document of a sample, by its text; both orders, cuts within tokens, and documents left alone."""
    plain, stream = build(prepared, cache), build(prepared, cache, fim_rate=0.7, fim_spm_rate=0.4)
    tokenizer = tokenizers.Tokenizer.from_file(prepared.tokenizer_path)
    prefix, middle, suffix = (tokenizer.token_to_id(mark) for mark in MARKS)
    text = lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)  # noqa: E731
    seen = {"PSM": 0, "SPM": 0, "alone": 0, "within a token": 0, "cut off": 0}
    for before, after in zip(plain.rows(0, 400), stream.rows(0, 400), strict=True):
        assert len(before) == len(after) == SEQ + 1
        pairs = list(zip(documents(before, prepared.eod), documents(after, prepared.eod), strict=False))
        for original, found in pairs[:-1]:
            ids, own = found[found != prepared.eod].tolist(), original[original != prepared.eod].tolist()
            if prefix not in ids:
                assert ids == own
                seen["alone"] += 1
                continue
            order, parts = in_order(ids, prefix, middle, suffix)
            assert "".join(map(text, parts)) == text(own)
            seen[order] += 1
            seen["within a token"] += sum(parts, []) != own
        seen["cut off"] += (after != before).any() and not (after[-1:] == prepared.eod).all()
    moved = seen["PSM"] + seen["SPM"]
    assert min(seen.values()) > 0 and moved > 50, seen
    assert abs(moved / (moved + seen["alone"]) - 0.7) < 0.1 and abs(seen["SPM"] / moved - 0.4) < 0.1, seen


def test_seed_and_index_alone_decide(prepared: PreparedData, cache: Path):
    """Any length of the run, any slice, another seed; rate 0 is no option at all; validation is text as it is."""
    options = {"fim_rate": 0.5}
    stream, longer = build(prepared, cache, **options), build(prepared, cache, num_samples=5000, **options)
    whole = stream.rows(0, 400)
    assert numpy.array_equal(whole, longer.rows(0, 400))
    assert all(numpy.array_equal(stream.rows(at, 3), whole[at : at + 3]) for at in (390, 0, 17))
    plain = build(prepared, cache)
    assert not numpy.array_equal(whole, plain.rows(0, 400))
    assert numpy.array_equal(build(prepared, cache, fim_rate=0.0).rows(0, 9), plain.rows(0, 9))
    fim = FillInTheMiddle(DataConfig(fim_rate=1.0), prepared.tokenizer_path, eod=prepared.eod, seed=1)
    rows = [plain.rows(3, 1)[0] for _ in range(3)]
    fim(rows[0], 3), fim(rows[1], 3), fim(rows[2], 4)
    assert numpy.array_equal(rows[0], rows[1]) and not numpy.array_equal(rows[0], rows[2])
    held_out = [build(prepared, cache, "validation", num_samples=20, **each).rows(0, 20) for each in ({}, options)]
    assert numpy.array_equal(*held_out)


@pytest.mark.parametrize("kind", list(LoaderKind)[:2], ids=lambda kind: kind.value)
def test_ranks_loaders_and_resumes_agree(prepared: PreparedData, cache: Path, kind: LoaderKind):
    if kind is LoaderKind.dali and not dali_is_installed():
        pytest.skip("NVIDIA DALI is not installed: pip install '.[dali]'")
    stream = build(prepared, cache, fim_rate=0.5)
    draw = random.Random(1)
    for size in (1, 2, 4):
        loaders = [
            build_loader(kind, stream, micro_batch_size=2, data_parallel_rank=rank, data_parallel_size=size,
                         num_workers=rank % 3, device=torch.device("cpu"))
            for rank in range(size)
        ]  # fmt: skip
        for consumed in (draw.randrange(300) for _ in range(5)):
            steps = zip(*(loader.global_batch(consumed, 8) for loader in loaders), strict=True)
            found = torch.cat([batch["tokens"] for step in steps for batch in step])
            assert torch.equal(found, torch.from_numpy(stream.rows(consumed, 8)[:, :-1]))
        for loader in loaders:
            loader.close()


def test_documents_stay_apart(prepared: PreparedData, cache: Path):
    """Positions, attention and loss are those of megatron-core for the rows as they are now; no document is added."""
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    resets = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}
    stream, plain = build(prepared, cache, fim_rate=0.8, **resets), build(prepared, cache)
    for start in range(0, 100, 10):
        rows, before = stream.rows(start, 10), plain.rows(start, 10)
        assert ((rows == prepared.eod).sum(1) <= (before == prepared.eod).sum(1)).all()
        batch = stream.batch_of(torch.from_numpy(rows))
        for number, tokens in enumerate(batch["tokens"]):
            mask, loss_mask, places = _get_ltor_masks_and_position_ids(tokens, prepared.eod, True, True, True, True)
            assert torch.equal(batch["attention_mask"][number], mask)
            assert torch.equal(batch["loss_mask"][number], loss_mask)
            assert torch.equal(batch["position_ids"][number], places)


def test_pieces_of_characters_are_cut_between_tokens(prepared: PreparedData):
    """Text that does not survive decoding must not be tokenised again."""
    fim = FillInTheMiddle(DataConfig(fim_rate=1.0), prepared.tokenizer_path, eod=prepared.eod, seed=1)
    assert fim.by_characters
    tokenizer = tokenizers.Tokenizer.from_file(prepared.tokenizer_path)
    half = tokenizer.encode("漢字 and more words", add_special_tokens=False).ids[1:]
    row = numpy.array([*half, *[prepared.eod] * 20], dtype=numpy.int64)
    changed = row.copy()
    fim(changed, 0)
    kept = [token for token in changed.tolist() if token < prepared.vocab_size - 3 and token != prepared.eod]
    assert sorted(kept) == sorted(half) and kept != half


def test_special_tokens_within_documents_stay_what_they_are(prepared: PreparedData):
    fim = FillInTheMiddle(DataConfig(fim_rate=1.0), prepared.tokenizer_path, eod=prepared.eod, seed=1)
    tokenizer = tokenizers.Tokenizer.from_file(prepared.tokenizer_path)
    tokens = [tokenizer.token_to_id(MARKS[0]), *tokenizer.encode("hello world and more", add_special_tokens=False).ids]
    row = numpy.array([*tokens, *[prepared.eod] * 20], dtype=numpy.int64)
    changed = row.copy()
    fim(changed, 0)
    kept = changed[changed != prepared.eod].tolist()
    assert sorted(kept) == sorted([*tokens, *map(tokenizer.token_to_id, MARKS)]) and kept != tokens


def test_tokenizers_whose_tokens_do_not_join(prepared: PreparedData, tmp_path: Path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<eod>": 2}, unk_token="a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.add_special_tokens(MARKS)
    words.save(str(tmp_path / "tokenizer.json"))
    assert not tokens_join(words) and tokens_join(tokenizers.Tokenizer.from_file(prepared.tokenizer_path))
    fim = FillInTheMiddle(DataConfig(fim_rate=1.0), str(tmp_path / "tokenizer.json"), eod=2, seed=1)
    row = numpy.array([0, 1, 1, 0, 1, 2, 2, 2], dtype=numpy.int64)
    fim(row, 7)
    assert (row >= 3).sum() == 3 and sorted(row[row < 2].tolist()) == [0, 0, 1, 1, 1]


def test_tokens_that_are_not_there(embedded: PreparedData, prepared: PreparedData):
    data = DataConfig(fim_rate=0.5)
    assert fim_problems(data, prepared.tokenizer_path) == [] == fim_problems(DataConfig(), None)
    assert len(fim_problems(data, embedded.tokenizer_path)) == 3
    assert "trained here has no tokens <fim_prefix>" in fim_problems(data, None)[0]
    assert fim_problems(data, None, MARKS) == []
    wrong = fim_problems(DataConfig(fim_rate=0.5, fim_middle_token="<|fim_middle|>"), prepared.tokenizer_path)
    assert len(wrong) == 1 and wrong[0].startswith("data.fim_middle_token=<|fim_middle|>: not in the vocabulary")
    assert "name one of <fim_prefix>, <fim_middle>, <fim_suffix>" in wrong[0]
