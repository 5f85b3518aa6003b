"""Special tokens: those that a template writes are tokens, the same letters in somebody's message are text.

A user who writes `<|im_end|>` must not end a turn. So before a template renders a conversation, `protect` puts a
sentinel (a private-use character that the conversation does not hold) into each such text, after its first letter; what
the tokenizer would still take for a special token in the rendering is then the template's. `encode_protected` reads
such a rendering with a twin of the tokenizer, in which special tokens are text and an alias that nobody can write
stands for each of them; the sentinels are taken out. Conversations without such text never come here.
"""

import bisect
import json
import re
from typing import Any, NamedTuple

import tokenizers

from scale_llm.data.tokenizer import Tokenizer

PRIVATE_USE = range(0xF0000, 0xFFFFE)
"""Unicode gives these no meaning, and texts hardly ever hold one."""


class Offsets(NamedTuple):
    """A text as tokens."""

    ids: list[int]
    spans: list[tuple[int, int]]
    """[begin, end) of each token in characters of the text that was encoded."""


class Vocabulary:
    """A tokenizer that says where its tokens lie, and knows its special ones."""

    def __init__(self, tokenizer: Tokenizer):
        self._backend = _copy(tokenizer.backend)
        self._backend.encode_special_tokens = False
        eod = tokenizer.backend.id_to_token(tokenizer.eod)
        if eod not in {token.content for token in self._backend.get_added_tokens_decoder().values()}:
            # An ordinary entry of the vocabulary, which the text of it would not give
            self._backend.add_special_tokens([tokenizers.AddedToken(eod, normalized=False)])
        added = self._backend.get_added_tokens_decoder()
        self.special = {
            token.content: (number, token) for number, token in added.items() if token.special and token.content
        }
        self._twins: dict[str, _Twin] = {}
        self.any_special = _any_of(list(self.special))
        """Matches a special token's text."""
        self._start = re.compile(f"(?={self.any_special.pattern})(?s:.)")  # also where two overlap

    def spelt_in(self, value: Any) -> bool:
        """Does `value` (strings in lists and objects) spell a special token?"""
        if isinstance(value, str):
            return bool(self.any_special.search(value))
        if isinstance(value, dict):
            return any(self.spelt_in(key) or self.spelt_in(each) for key, each in value.items())
        return isinstance(value, list | tuple) and any(self.spelt_in(each) for each in value)

    def protect(self, value: Any, sentinel: str) -> Any:
        """`value` with the sentinel in each special token's text."""
        if isinstance(value, str):
            return self._start.sub(lambda found: found[0] + sentinel, value)
        if isinstance(value, dict):
            return {self.protect(key, sentinel): self.protect(each, sentinel) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.protect(each, sentinel) for each in value]
        return value

    def encode(self, texts: list[str]) -> list[Offsets]:
        """Tokens of renderings without sentinels."""
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        return [Offsets(encoding.ids, encoding.offsets) for encoding in encodings]

    def encode_protected(self, text: str, sentinel: str) -> Offsets:
        """Tokens of a rendering with sentinels; offsets are those in `text`."""
        if sentinel not in self._twins:
            self._twins[sentinel] = _Twin(self._backend, self.special, sentinel)
        return self._twins[sentinel].encode(text)


def unused_character(value: Any) -> str:
    """A private-use character that no string in `value` holds."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return next(chr(code) for code in PRIVATE_USE if chr(code) not in text)


class _Twin:
    """A tokenizer to which special tokens are text, and their aliases are what they were."""

    def __init__(
        self, backend: tokenizers.Tokenizer, special: dict[str, tuple[int, tokenizers.AddedToken]], sentinel: str
    ):
        self.sentinel = sentinel
        self.alias = {text: f"{sentinel}{number}{sentinel}" for text, (number, _) in special.items()}
        self._backend = _copy(backend)
        self._backend.encode_special_tokens = True
        self._backend.add_tokens(
            [
                # What a special token takes of the spaces beside it, its alias takes too
                tokenizers.AddedToken(self.alias[text], lstrip=token.lstrip, rstrip=token.rstrip, normalized=False)
                for text, (_, token) in special.items()
            ]
        )
        self._ids = {self._backend.token_to_id(self.alias[text]): number for text, (number, _) in special.items()}
        # A token of one letter has its sentinel behind it, not within
        self._parts = re.compile(f"(?:{_any_of(list(special)).pattern})(?!{sentinel})|{sentinel}")

    def encode(self, text: str) -> Offsets:
        rewritten, places = self._rewritten(text)
        encoding = self._backend.encode(rewritten, add_special_tokens=False)
        ids = [self._ids.get(token, token) for token in encoding.ids]
        return Offsets(ids, [(_at(places, begin), _at(places, end)) for begin, end in encoding.offsets])

    def _rewritten(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        """(text with aliases and without sentinels, [(place in it, place in `text`)] where the two part)."""
        parts: list[str] = []
        places = [(0, 0)]
        done = length = 0
        for found in self._parts.finditer(text):
            alias = self.alias.get(found[0], "")
            parts += [text[done : found.start()], alias]
            length += found.start() - done
            places.append((length, found.start()))
            length += len(alias)
            done = found.end()
            places.append((length, done))
        return "".join([*parts, text[done:]]), places


def _at(places: list[tuple[int, int]], place: int) -> int:
    """Where a place of the rewritten text was before."""
    rewritten, original = places[bisect.bisect_right(places, place, key=lambda pair: pair[0]) - 1]
    return original + place - rewritten


def _any_of(tokens: list[str]) -> re.Pattern[str]:
    """Matches a token; of several that begin at a place the longest, as tokenizers do. Without tokens nothing."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _copy(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that reports spaces as part of their tokens: byte-level post-processors trim them off the offsets."""
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    return copy
