"""Words and sentences as the rules see them: without a model, the same on every machine."""

import re
from functools import lru_cache

from datatrove.utils.text import split_into_words
from datatrove.utils.word_tokenizers import WordTokenizer

_SPACELESS = "\u2e80-\u303f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
"""Scripts that put no space between words: there each character counts as a word."""

_WORD = re.compile(rf"[{_SPACELESS}]|[^\s{_SPACELESS}]+")
_HAS_SPACELESS = re.compile(rf"[{_SPACELESS}]")
_END = re.compile(r"(?<=[.!?\u2026])[\"'\u201d\u2019)\]]*\s+|(?<=[\u3002\uff01\uff1f])|\n+")


class Words(WordTokenizer):
    """What datatrove's steps are given in place of spaCy's tokenizer.

    A word is what stands between spaces, its punctuation with it, as Gopher's thresholds count them (Rae et al. 2021);
    a tokenizer that parts punctuation would fail one document in eight at `min_alphabetic_words_ratio`.
    """

    def word_tokenize(self, text: str) -> list[str]:
        if text.isascii() or not _HAS_SPACELESS.search(text):
            return text.split()
        return _WORD.findall(text)

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """(begin, end) of sentences, which together are the text without space at its ends."""
        spans, begin = [], 0
        for end in _END.finditer(text):
            if text[begin : end.start()].strip():
                spans.append((begin, end.end()))
                begin = end.end()
        if text[begin:].strip():
            spans.append((begin, len(text)))
        return spans

    def sent_tokenize(self, text: str) -> list[str]:
        return [text[begin:end].strip() for begin, end in self.span_tokenize(text)]

    # datatrove caches words by (text, tokenizer), and steps that were pickled apart must still share them
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Words)

    def __hash__(self) -> int:
        return hash(Words)


WORDS = Words()


class TokenCounter:
    """Tokens of a text: words, or those of a tokenizer.json."""

    def __init__(self, path: str | None):
        self._path = path

    def __call__(self, text: str) -> int:
        if self._path is None:
            return len(split_into_words(text, WORDS))  # which the rules, the next to ask, find in its cache
        return len(_tokenizer(self._path).encode(text, add_special_tokens=False).ids)


@lru_cache(maxsize=1)
def _tokenizer(path: str):
    import tokenizers

    return tokenizers.Tokenizer.from_file(path)
