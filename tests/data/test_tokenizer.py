"""A byte-level tokenizer loses nothing, is the same every time, and refuses what it cannot work with."""

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from scale_llm.config.errors import UserError
from scale_llm.data.tokenizer import TextStream, Tokenizer, train_tokenizer

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


TEXT = "naïve 日本語 🎉🏳️‍🌈 x  y\n\n ends"


def sentences() -> tokenizers.Tokenizer:
    """Llama 2's way: ▁ for spaces, the first of a text removed, characters without a token as bytes."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    vocabulary = {piece: place for place, piece in enumerate([*bytes_, "▁", *"navexyds", "日"])}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


@pytest.mark.parametrize("kind", ["byte level", "bytes where there is no token"])
def test_text_comes_as_its_characters_are_whole(tmp_path, kind):
    """Piece by piece it is the text that all tokens together decode to, and no piece ends within a character."""
    if kind == "byte level":
        train_tokenizer(["abc"], vocab_size=300, eod_token="<|endoftext|>", path=tmp_path / "tokenizer.json")
        loaded = Tokenizer.load(str(tmp_path), "<|endoftext|>")
        tokens, decode = loaded.encode(TEXT), loaded.decode
    else:
        backend = sentences()
        tokens, decode = backend.encode(TEXT).ids, backend.decode
    stream = TextStream(decode)
    pieces = [stream.add(token) for token in tokens]
    assert "".join(pieces) == TEXT == decode(tokens) and not any("\ufffd" in piece for piece in pieces)
    assert stream.rest() == "" and sum(bool(piece) for piece in pieces) > 20, "not all at the end"
    cut = TextStream(decode)
    half = tokens[: next(place for place, piece in enumerate(pieces) if not piece and place > 3) + 1]
    assert "".join(map(cut.add, half)) + cut.rest() == decode(half)
