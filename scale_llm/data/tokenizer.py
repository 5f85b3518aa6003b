"""Text to tokens: a byte-level BPE trained here, or a tokenizer.json of the user's own."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import tokenizers

from scale_llm.config.errors import UserError
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.data.tokenizer_json import file_digest, tokenizer_file

DEFAULT_EOD = TokenizerConfig().eod_token
SMALLEST_VOCABULARY = 257
"""256 bytes and the end-of-document token."""


class Tokenizer:
    """A `tokenizers` tokenizer and its end-of-document token.

    It is also what megatron-core's dataset configuration wants of a tokenizer: `eod`, `vocab_size` and
    `unique_identifiers`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eod: int, path: str):
        self.backend = backend
        self.path = path
        self.eod = eod
        # Vocabularies may have holes; what a model needs is room for the highest id.
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        # A tokenizer.json may carry these for inference; they would silently cut or fill documents.
        backend.no_truncation()
        backend.no_padding()

    @classmethod
    def load(cls, path: str, eod_token: str | None) -> "Tokenizer":
        """Reads a tokenizer.json, or the one in a directory. eod_token: None where documents have no end (eod: -1)."""
        file = tokenizer_file(path)
        try:
            backend = tokenizers.Tokenizer.from_file(file)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"tokenizer.path={path}: not a tokenizer.json ({error}); export it again") from error
        if eod_token is None:
            return cls(backend, -1, file)
        eod = backend.token_to_id(eod_token)
        if eod is None:
            raise UserError(_no_eod(backend, path, eod_token))
        return cls(backend, eod, file)

    @property
    def unique_identifiers(self) -> dict[str, str]:
        return {"class": type(self).__name__, "sha256": file_digest(self.path), "eod": str(self.eod)}

    @property
    def special_ids(self) -> set[int]:
        """Tokens that mark something and stand for no text: ends of turns and documents, padding and their like."""
        return {number for number, added in self.backend.get_added_tokens_decoder().items() if added.special}

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids. Special tokens spelt out in the text are plain text unless `special`."""
        self.backend.encode_special_tokens = not special
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of many documents, on all cores. A document cannot contain an end of document."""
        self.backend.encode_special_tokens = True
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def token_bytes(self) -> list[int] | None:
        """UTF-8 bytes that each token stands for [vocab_size], special tokens 0; None unless byte-level.

        With it the bits per byte of any stretch of tokens are exact.
        """
        if not isinstance(self.backend.decoder, tokenizers.decoders.ByteLevel):
            return None
        lengths = [0] * self.vocab_size
        for token, number in self.backend.get_vocab(with_added_tokens=False).items():
            lengths[number] = len(token)  # byte-level tokens are spelt with one letter a byte
        for number, added in self.backend.get_added_tokens_decoder().items():
            lengths[number] = 0 if added.special else len(added.content.encode("utf-8"))
        return lengths

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False)


class TextStream:
    """Tokens to text as they come: the texts together are what `decode` makes of all tokens.

    A character may take several tokens, so a token may add no text yet. Each is decoded after the last that did, as
    decoders treat the first token of a text in a way of its own, and no further back, or long texts would be slow.
    """

    HALF = "\ufffd"
    """What decoders write for a character's first bytes."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._tokens: list[int] = []
        self._told = 0  # of these tokens, that have given their text

    def add(self, token: int) -> str:
        """The text that this token completes; often none."""
        self._tokens.append(token)
        return self._next(whole=False)

    def rest(self) -> str:
        """What is left when no more tokens come: bytes that are no character, if anything."""
        return self._next(whole=True)

    def _next(self, *, whole: bool) -> str:
        text = self._decode(self._tokens)
        if text.endswith(self.HALF) and not whole:
            return ""
        new = text[len(self._decode(self._tokens[: self._told])) :]
        if new:
            self._tokens = self._tokens[self._told :]
            self._told = len(self._tokens)
        return new


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, eod_token: str, path: Path, special_tokens: Sequence[str] = ()
) -> None:
    """Trains a byte-level BPE, for which no text is unknown, and writes it to `path`, a
    tokenizer.json.

    The end-of-document token has id 0, the other special tokens those after it. A small corpus may give fewer than
    `vocab_size` tokens.
    """
    problems = _special_token_problems(eod_token, special_tokens)
    if vocab_size < (smallest := SMALLEST_VOCABULARY + len(special_tokens)):
        with_special = f", {1 + len(special_tokens)} of them special" if special_tokens else ""
        problems.append(
            f"tokenizer.vocab_size={vocab_size}: a byte-level one needs at least {smallest} tokens{with_special}"
        )
    if problems:
        raise UserError(problems)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eod_token, *special_tokens],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    _save(backend, path)


def _special_token_problems(eod_token: str, special_tokens: Sequence[str]) -> list[str]:
    known = [eod_token, *special_tokens]
    twice = dict.fromkeys(token for token in special_tokens if known.count(token) > 1 or not token)
    return [
        f"tokenizer.special_tokens: {token!r} is empty, there twice or the end of documents; remove it"
        for token in twice
    ]


def gpt2_tokenizer(vocab_file: str, merge_file: str, path: Path) -> None:
    """Writes the tokenizer.json of GPT-2's vocab.json and merges.txt."""
    try:
        backend = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(vocab_file, merge_file))
    except Exception as error:  # the library raises plain Exception
        raise UserError(
            f"--vocab-file={vocab_file}: not one of GPT-2 ({error}); give vocab.json and merges.txt"
        ) from error
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    if backend.token_to_id(DEFAULT_EOD) is not None:
        backend.add_special_tokens([DEFAULT_EOD])
    _save(backend, path)


def default_eod(file: str) -> str:
    """The end of text that tokenizer_config.json beside a tokenizer.json names, or GPT-2's."""
    try:
        token = json.loads(Path(file).with_name("tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
    except (OSError, ValueError, KeyError):
        return DEFAULT_EOD
    return (token["content"] if isinstance(token, dict) else token) or DEFAULT_EOD


def _save(backend: tokenizers.Tokenizer, path: Path) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    backend.save(str(temporary))
    os.replace(temporary, path)


def _no_eod(backend: tokenizers.Tokenizer, path: str, eod_token: str) -> str:
    special = sorted(token.content for token in backend.get_added_tokens_decoder().values() if token.special)
    candidates = f"one of {', '.join(special[:20])}" if special else "a token of it"
    return f"tokenizer.eod_token={eod_token}: not in the vocabulary of {path}; set it to {candidates}"
