r"""Documents to the bytes of a .bin file, each word tokenised once.

Byte-level BPE cuts a text by a regular expression and tokenises each part by itself, and most of the library's time
goes into parts that it has seen. Here a text is cut into pieces between which the expression always cuts too, the token
ids of a piece are kept as bytes, and a document is their concatenation; the library is given new pieces alone.

Why the ids are the library's: let x be a character before a cut and y the one after it. A cut is made
  1. where x is an ASCII letter and y an ASCII digit, sign other than ' or space: every alternative of the expressions
     that takes an ASCII letter ends in letters, so none takes x and y;
  2. where x is no space and y is a space: only `\s` alternatives take a space after their first character, and they
     take no x. An expression whose signs take the ends of lines after them (`[\r\n]*`) is not cut before these.
No expression looks back, so what follows a cut does not depend on what is before it. They look ahead for one thing,
whether spaces end before a non-space; no piece ends in spaces unless the text does. NFC changes no ASCII character, nor
anything because of one that follows, nor makes a space of what is none.
Tokenizers of any other shape are left to the library: see `cutter_of`.
"""

import json
import re
import string
from array import array
from collections.abc import Iterator

import numpy as np
import tokenizers

from scale_llm.data.tokenizer import Tokenizer

_SIGNS = r"""0-9!"#$%&()*+,\-./:;<=>?@\[\\\]^_`{|}~"""
_SPACES, _ENDS = r"\t\x0b\x0c ", r"\r\n"
_DOUBTFUL = r"\x1c-\x1f\x85\xa0\u1680\u180e\u2000-\u200d\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"
"""Spaces beyond ASCII, and what one version of Unicode or another takes for one: no cut before or after them."""

_ASCII_SPACES, _ASCII_SIGNS = set("\t\v\f \r\n"), set(string.digits + string.punctuation) - {"'"}
_LETTERS = set(string.ascii_letters)
_NOT_BEFORE_A_SPACE = set(re.findall(f"[{_SPACES}{_ENDS}{_DOUBTFUL}]", "".join(map(chr, range(0x10000))))) | {""}

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_KEEP_ENDS = (_LLAMA3, _QWEN2)
"""Expressions of GPT-4, Llama 3 and Qwen, whose signs take the ends of lines that follow."""

CACHED_PIECES = 1 << 18
"""Some 60 MB a process; when there are more, it begins anew."""
_LONGEST_CACHED = 48
"""Characters: longer pieces (tables, writing without spaces) hardly come again."""


def _piece_pattern(cut_before: str, other: str) -> re.Pattern[str]:
    """Spaces and what follows: signs and a word up to the next sign or space, or else all up to a space."""
    gap, text = f"[{cut_before}{other}]", f"[^{cut_before}{other}]"
    return re.compile(
        rf"{gap}*[^A-Za-z{cut_before}{other}]*[A-Za-z]+(?=[{_SIGNS}{_SPACES}{_ENDS}]|\Z)"
        rf"|{gap}*{text}+(?:[{other}]{gap}*{text}+)*(?:[{other}]{gap}*\Z)?"
        rf"|{gap}+"
    )


_GPT2_PIECES = _piece_pattern(_SPACES + _ENDS, _DOUBTFUL)
_KEEP_ENDS_PIECES = _piece_pattern(_SPACES, _DOUBTFUL + _ENDS)


def cutter_of(backend: tokenizers.Tokenizer) -> re.Pattern[str] | None:
    """The pieces of texts for a tokenizer; None where its shape is not one that the proof above covers."""
    model, alphabet = backend.model, tokenizers.pre_tokenizers.ByteLevel.alphabet()
    if not isinstance(model, tokenizers.models.BPE) or model.dropout or None in map(model.token_to_id, alphabet):
        return None
    if model.end_of_word_suffix or model.continuing_subword_prefix:
        return None  # tokens are then not spelt with one letter a byte
    if backend.normalizer is not None and not isinstance(backend.normalizer, tokenizers.normalizers.NFC):
        return None
    if not all(token.special for token in backend.get_added_tokens_decoder().values()):
        return None  # the library finds these in the text before anything else
    parts = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer is not None else {}
    steps = parts["pretokenizers"] if parts.get("type") == "Sequence" else [parts]
    *splits, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not splits and last.get("use_regex", True):
        return _GPT2_PIECES
    if len(splits) == 1 and not last.get("use_regex", True) and _is_split(splits[0]):
        return _KEEP_ENDS_PIECES
    return None


def _is_split(step: dict) -> bool:
    pattern = (step.get("pattern") or {}).get("Regex")
    plain = step.get("behavior") == "Isolated" and not step.get("invert")
    return step.get("type") == "Split" and pattern in _KEEP_ENDS and plain


class DocumentEncoder:
    """Documents to bytes: the ids that `Tokenizer.encode_batch` gives, as a .bin file holds them."""

    def __init__(self, tokenizer: Tokenizer, dtype: str):
        """dtype: numpy's name of the .bin file's type."""
        self._tokenizer, self._typecode = tokenizer, np.dtype(dtype).char
        self._pattern = cutter_of(tokenizer.backend)
        self._ids: dict[str, bytes] = {}
        self._normalized = tokenizer.backend.normalizer is not None
        # Of what merges can reach: byte-level tokens are spelt with one letter a byte, special ones among them too
        self._lengths = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        for token, number in tokenizer.backend.get_vocab(with_added_tokens=False).items():
            self._lengths[number] = len(token)

    @property
    def has_proof(self) -> bool:
        """Whether words are tokenised once; otherwise every document is the library's work."""
        return self._pattern is not None

    def encode(self, texts: list[str]) -> list[bytes]:
        """The ids of each text, without an end of document."""
        if self._pattern is None:
            return list(map(self._bytes, self._tokenizer.encode_batch(texts)))
        documents = list(map(self._pattern.findall, texts))
        missing = [piece for piece in set().union(*documents) if piece not in self._ids]
        for piece, ids in self._encode_pieces(missing):
            self._ids[piece] = ids
        ids_of = self._ids.__getitem__
        encoded = [b"".join(map(ids_of, pieces)) for pieces in documents]
        self._forget(missing)
        return encoded

    def _forget(self, added: list[str]) -> None:
        if len(self._ids) > CACHED_PIECES:
            self._ids.clear()
            return
        for piece in added:
            if len(piece) > _LONGEST_CACHED:
                del self._ids[piece]

    def _bytes(self, ids: list[int]) -> bytes:
        return array(self._typecode, ids).tobytes()

    def _encode_pieces(self, pieces: list[str]) -> Iterator[tuple[str, bytes]]:
        """Pieces in a row, as one text, take half the time; the bytes of its tokens say where a piece ends."""
        if self._normalized:  # tokens are then not the bytes of the text
            yield from zip(pieces, map(self._bytes, self._tokenizer.encode_batch(pieces)), strict=True)
            return
        rows = list(self._rows(pieces))
        ids = self._tokenizer.encode_batch(["".join(row) for row in rows])
        flat = np.concatenate([np.array(each, dtype=np.int64) for each in ids] or [np.zeros(0, dtype=np.int64)])
        in_order = [piece for row in rows for piece in row]
        token_ends = np.cumsum(self._lengths[flat])
        piece_ends = np.cumsum([len(piece.encode()) for piece in in_order], dtype=np.int64)
        last = np.searchsorted(token_ends, piece_ends)
        assert np.array_equal(token_ends[last], piece_ends), "a token crosses a cut"
        content, size, begin = flat.astype(self._typecode).tobytes(), np.dtype(self._typecode).itemsize, 0
        for piece, end in zip(in_order, ((last + 1) * size).tolist(), strict=True):
            yield piece, content[begin:end]
            begin = end

    def _rows(self, pieces: list[str]) -> Iterator[list[str]]:
        """Pieces that may stand one after another: between them would be a cut, were they a text."""
        spaces = _ASCII_SPACES if self._pattern is _GPT2_PIECES else _ASCII_SPACES - {"\r", "\n"}
        row: list[str] = []
        for piece in pieces:
            first, before = piece[0], row[-1][-1] if row else ""
            if not (
                before not in _NOT_BEFORE_A_SPACE and first in spaces
                or before in _LETTERS and (first in _ASCII_SIGNS or first in _ASCII_SPACES)
            ):  # fmt: skip
                if row:
                    yield row
                row = []
            row.append(piece)
        if row:
            yield row
