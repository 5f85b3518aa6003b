"""A byte-level tokenizer loses nothing, is the same every time, and refuses what it cannot work with."""

from pathlib import Path

import pytest

from scale_llm.config.errors import UserError
from scale_llm.data.tokenizer import Tokenizer, train_tokenizer

TEXTS = [
    "def f(x):\n    return x + 1\n" * 50,
    "Grüße an alle 👋, im Haus\n" * 50,
    "the cat sat on the mat " * 50,
]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    train_tokenizer(TEXTS, vocab_size=300, eod_token="<|endoftext|>", path=tmp_path / "tokenizer.json")
    return tmp_path


@pytest.mark.parametrize("text", [*TEXTS, "\x00\r\n\t", "漢字 and 🦊", "  <|endoftext|>  ", ""])
def test_any_text_comes_back(trained: Path, text: str):
    tokenizer = Tokenizer.load(str(trained), "<|endoftext|>")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    lengths = tokenizer.token_bytes()
    assert lengths and sum(lengths[token] for token in ids) == len(text.encode())
    assert lengths[tokenizer.eod] == 0
    assert tokenizer.eod not in ids  # spelt out in a document it is text, not the end of the document
    assert tokenizer.encode_batch([text]) == [ids]
    assert all(0 <= token < tokenizer.vocab_size == 300 for token in ids)


def test_special_tokens_on_request(trained: Path):
    tokenizer = Tokenizer.load(str(trained), "<|endoftext|>")
    assert tokenizer.encode("<|endoftext|>", special=True) == [tokenizer.eod]


def test_special_ids_are_those_of_special_tokens(trained: Path):
    """A token that was added and is text (special=false) is not among them."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(trained / "tokenizer.json"))
    backend.add_special_tokens(["<|im_end|>"])
    backend.add_tokens(["straightforward"])
    backend.save(str(trained / "tokenizer.json"))
    tokenizer = Tokenizer.load(str(trained), "<|endoftext|>")
    assert tokenizer.special_ids == {tokenizer.eod, 300}
    assert tokenizer.encode("straightforward") == [301]


def test_training_is_deterministic(trained: Path, tmp_path: Path):
    train_tokenizer(TEXTS, vocab_size=300, eod_token="<|endoftext|>", path=tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (trained / "tokenizer.json").read_bytes()


def test_truncation_of_an_exported_tokenizer_is_switched_off(trained: Path):
    """A tokenizer.json may carry truncation meant for inference; documents would be cut without a word."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(trained / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.save(str(trained / "tokenizer.json"))
    assert len(Tokenizer.load(str(trained), "<|endoftext|>").encode(TEXTS[0])) > 4


def test_mistakes(trained: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"tokenizer.eod_token=</s>.*<\|endoftext\|>"):
        Tokenizer.load(str(trained), "</s>")
    with pytest.raises(UserError, match="tokenizer.path=/nowhere"):
        Tokenizer.load("/nowhere", "</s>")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="not a tokenizer.json"):
        Tokenizer.load(str(tmp_path / "bad.json"), "</s>")
    with pytest.raises(UserError, match="at least 257"):
        train_tokenizer(TEXTS, vocab_size=100, eod_token="</s>", path=tmp_path / "x.json")
