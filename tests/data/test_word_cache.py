"""Words tokenised once are the library's tokens, for every text, and other tokenizers are the library's work."""

import json
from array import array
from pathlib import Path

import pytest
import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

from scale_llm.data import word_cache
from scale_llm.data.tokenizer import Tokenizer, train_tokenizer
from scale_llm.data.word_cache import DocumentEncoder, cutter_of

hypothesis = pytest.importorskip("hypothesis", reason="texts come from hypothesis, of the dev extra")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

SAMPLE = [
    "the cat's hat, it isn't (here)\n\n    def f(x1):\n\t\treturn 'x' * 37.5\r\n",
    "Grüße 漢字 👋 é <|endoftext|>  x ",
]
SHAPES = {"gpt2": None, "llama3": word_cache._LLAMA3, "qwen2": word_cache._QWEN2}


def of_shape(trained: Tokenizer, shape: str) -> Tokenizer:
    """The same words, cut by another expression."""
    backend = tokenizers.Tokenizer.from_str(trained.backend.to_str())
    if SHAPES[shape]:
        split = pre_tokenizers.Split(Regex(SHAPES[shape]), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if shape == "qwen2":
        backend.normalizer = normalizers.NFC()
    return Tokenizer(backend, trained.eod, trained.path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(SAMPLE * 20, vocab_size=420, eod_token="<|endoftext|>", path=path)
    return Tokenizer.load(str(path), "<|endoftext|>")


@pytest.fixture(scope="module")
def encoders(trained: Tokenizer) -> dict[str, tuple[Tokenizer, DocumentEncoder]]:
    made = {shape: of_shape(trained, shape) for shape in SHAPES}
    return {shape: (tokenizer, DocumentEncoder(tokenizer, "uint16")) for shape, tokenizer in made.items()}


SPACES = " \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u180e\u2000\u2007\u200b\u2028\u202f\u205f\u2060\u3000\ufeff"
WORDS = st.sampled_from(
    [
        *SPACES, *"aé漢🦊1٣Ⅷ.(_'’\u0301\u212b\u1fef", "It", "'s", "'S", "n't", "e\u0301", "12345", "--", "\n\n",
        "<|endoftext|>",
    ]
)  # fmt: skip
TEXTS = st.one_of(st.lists(WORDS, max_size=12).map("".join), st.text(max_size=30))


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_the_ids_are_the_librarys(encoders, shape: str, texts: list[str]):
    """Cold or warm: the encoder keeps its words from one example to the next."""
    tokenizer, encoder = encoders[shape]
    assert encoder.has_proof
    assert encoder.encode(texts) == [array("H", ids).tobytes() for ids in tokenizer.encode_batch(texts)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_character_beside_a_cut(encoders, shape: str):
    """All but ideographs and Hangul, of which and of the planes beyond a sample: the library knows Unicode."""
    tokenizer, encoder = encoders[shape]
    sample = range(0x3400, 0xD800, 97), range(0x10000, 0x110000, 997)
    characters = [chr(code) for codes in (range(0x3400), *sample, range(0xF900, 0x10000)) for code in codes]
    for form in ("a{0} {0}a ", "{0}.{0}\n{0}1 ", "x{0}\t {0} "):
        texts = ["".join(form.format(each) for each in characters[i : i + 64]) for i in range(0, len(characters), 64)]
        assert encoder.encode(texts) == [array("H", ids).tobytes() for ids in tokenizer.encode_batch(texts)]


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_text_comes_back(encoders, text: str):
    """Text to tokens to text is exact, special tokens spelt out included."""
    tokenizer, encoder = encoders["gpt2"]
    assert tokenizer.decode(array("H", encoder.encode([text])[0])) == text


def test_the_expressions_are_those_in_use():
    """Letter for letter: a tokenizer.json with another one is left to the library."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert word_cache._QWEN2 == PRETOKENIZE_REGEX
    assert word_cache._LLAMA3 == PRETOKENIZE_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def test_little_is_asked_twice(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """The library sees a word once; long pieces are not kept, and a full cache begins anew."""
    asked: list[str] = []
    ask = trained.encode_batch
    monkeypatch.setattr(trained, "encode_batch", lambda texts: asked.extend(texts) or ask(texts))
    encoder = DocumentEncoder(trained, "int32")
    first = encoder.encode(["one two", "two three " + "x" * 99])
    assert "".join(asked).count("two") == 2  # at the start of a text, and after a space
    asked.clear()
    assert encoder.encode(["one two", "two three " + "x" * 99]) == first
    assert asked == [" " + "x" * 99]
    monkeypatch.setattr(word_cache, "CACHED_PIECES", 1)
    encoder.encode(["four"])
    assert encoder.encode(["one two", "two three " + "x" * 99]) == first


def dropout(shape: dict) -> None:
    shape["model"]["dropout"] = 0.1


def other_expression(shape: dict) -> None:
    split = {"type": "Split", "pattern": {"Regex": r"\w+|\W+"}, "behavior": "Isolated", "invert": False}
    byte_level = {**shape["pre_tokenizer"], "use_regex": False}
    shape["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}


def lower_case(shape: dict) -> None:
    shape["normalizer"] = {"type": "Lowercase"}


def prefix_space(shape: dict) -> None:
    shape["pre_tokenizer"]["add_prefix_space"] = True


def added_word(shape: dict) -> None:
    shape["added_tokens"].append({**shape["added_tokens"][0], "id": 420, "content": "at h", "special": False})


def end_of_word(shape: dict) -> None:
    shape["model"]["end_of_word_suffix"] = "Ġ"


def no_pre_tokenizer(shape: dict) -> None:
    shape["pre_tokenizer"] = None


@pytest.mark.parametrize(
    "change", [dropout, other_expression, lower_case, prefix_space, added_word, end_of_word, no_pre_tokenizer]
)
def test_other_shapes_are_left_to_the_library(trained: Tokenizer, change):
    shape = json.loads(trained.backend.to_str())
    change(shape)
    changed = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(shape)), trained.eod, trained.path)
    assert cutter_of(trained.backend) is not None and cutter_of(changed.backend) is None
    encoder = DocumentEncoder(changed, "uint16")
    if change is not dropout:
        assert encoder.encode(SAMPLE) == [array("H", ids).tobytes() for ids in changed.encode_batch(SAMPLE)]


def no_decoder(shape: dict) -> None:
    shape["decoder"] = None


def special_word(shape: dict) -> None:
    """One that merges reach: spelt out in a text it is text."""
    word, number = max(shape["model"]["vocab"].items(), key=lambda item: len(item[0]) * item[0].isalpha())
    shape["added_tokens"].append({**shape["added_tokens"][0], "id": number, "content": word, "special": True})


@pytest.mark.parametrize("change", [no_decoder, special_word])
def test_what_changes_nothing_of_the_tokens(trained: Tokenizer, change):
    shape = json.loads(trained.backend.to_str())
    change(shape)
    changed = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(shape)), trained.eod, trained.path)
    encoder = DocumentEncoder(changed, "uint16")
    texts = [*SAMPLE, " ".join(token["content"] for token in shape["added_tokens"])]
    assert encoder.has_proof
    assert encoder.encode(texts) == [array("H", ids).tobytes() for ids in changed.encode_batch(texts)]


def test_no_token_of_a_byte(trained: Tokenizer, tmp_path: Path):
    """Without a token for every byte the library leaves characters out: nothing to be cut by bytes."""
    shape = json.loads(trained.backend.to_str())
    del shape["model"]["vocab"]["Ā"]
    merges = [merge for merge in shape["model"]["merges"] if "Ā" not in merge]
    shape["model"]["merges"] = merges
    assert cutter_of(tokenizers.Tokenizer.from_str(json.dumps(shape))) is None
