"""A tokenizer of one token a byte, with the special tokens that a test names."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers

from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.data.chat.template import ChatTemplate, Encoded

MakeTokenizer = Callable[..., Path]


@pytest.fixture
def make_tokenizer(tmp_path: Path) -> MakeTokenizer:
    """Writes a tokenizer's directory: make(special tokens, tokenizer_config.json, chat_template.jinja)."""

    def make(special: list[str], settings: dict | None = None, template: str | None = None, plain: tuple = ()) -> Path:
        directory = tmp_path / f"tokenizer_{len(list(tmp_path.glob('tokenizer_*')))}"
        directory.mkdir()
        vocabulary = {
            letter: place for place, letter in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
        }
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        # Real byte-level tokenizers trim offsets; spans must not suffer from it
        backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
        backend.add_special_tokens(special)
        backend.add_tokens(list(plain))
        backend.save(str(directory / "tokenizer.json"))
        if settings is not None:
            (directory / "tokenizer_config.json").write_text(json.dumps(settings))
        if template is not None:
            (directory / "chat_template.jinja").write_text(template)
        return directory

    return make


@pytest.fixture
def load(make_tokenizer: MakeTokenizer) -> Callable[..., ChatTemplate]:
    """load(template, special tokens, bos, eos) -> ChatTemplate."""

    def loaded(template: str, special: list[str], bos: str | None, eos: str, plain: tuple = ()) -> ChatTemplate:
        directory = make_tokenizer(special, {"bos_token": bos, "eos_token": {"content": eos}}, template, plain)
        return ChatTemplate.load(str(directory), TokenizerConfig(path=str(directory), eod_token=eos))

    return loaded


@pytest.fixture
def written() -> SimpleNamespace:
    """Token-by-token comparison with what is written out by hand."""
    return SimpleNamespace(tokens=_tokens, expected=_expected)


def _tokens(template: ChatTemplate, encoded: Encoded) -> list[tuple[str, bool]]:
    """(token, trained) of an encoding; special tokens in guillemets, so that text that looks like them differs."""
    special = {number for number, _ in template.vocabulary.special.values()}
    decode = template.tokenizer.decode
    names = [f"«{decode([each])}»" if each in special else decode([each]) for each in encoded.tokens]
    return list(zip(names, encoded.trained, strict=True))


def _expected(*segments: tuple[str, bool]) -> list[tuple[str, bool]]:
    """The same of texts: `«x»` is one special token, all else a token a letter."""
    found = []
    for text, trained in segments:
        while text:
            if text.startswith("«"):
                name, text = text[: text.index("»") + 1], text[text.index("»") + 1 :]
            else:
                name, text = text[0], text[1:]
            found.append((name, trained))
    return found
