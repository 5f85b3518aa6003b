"""What datatrove compares texts by, computed faster: the same letters, words and hashes."""

import unicodedata

import regex
import xxhash
from datatrove.utils.text import NUMBERS_PATTERN, PUNCTUATION_TRANS

from scale_llm.curate.repetition import n_grams
from scale_llm.curate.words import WORDS

_MARKS = regex.compile(r"\p{Mn}+")
_DIGIT = regex.compile(r"\p{Nd}")


def simplify(text: str) -> str:
    """datatrove's simplify_text with its default settings: lower case, numbers as 0, no punctuation, no accents. Steps
    that would change nothing are skipped."""
    text = text.lower()
    if _DIGIT.search(text):
        text = NUMBERS_PATTERN.sub("0", text)
    text = " ".join(text.translate(PUNCTUATION_TRANS).split())
    if text.isascii():
        return text
    return _MARKS.sub("", unicodedata.normalize("NFD", text)).strip()


def words_of(text: str) -> list[str]:
    return WORDS.word_tokenize(simplify(text))


def shingles(words: list[str], n: int) -> list[int]:
    """Hashes of all runs of n words, in their order: xxh64, as datatrove's."""
    return [xxhash.xxh64_intdigest(run) for run in map(" ".join, n_grams(words, n))]
