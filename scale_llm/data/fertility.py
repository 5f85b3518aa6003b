"""How well tokenizers fit text, by language and source: tokens per word, bytes per token, words split, unknown.

A word is a run of letters, digits, marks and apostrophes; in scripts without spaces (Chinese, Japanese, Korean) each
character is one. Tokens per word counts all tokens of a text, those of its signs and spaces too, as Rust et al. 2021
(fertility); a word is split where more than one token has a part of it.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from scale_llm.data.tokenizer import Tokenizer

_SPACELESS = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_SPACELESS}]|(?:(?![{_SPACELESS}])[\w\u0300-\u036f'’])+")
LONGEST_CHARACTERS = 100_000
"""Of a text, from its start: where tokens lie costs a hundred bytes each."""


class Text(NamedTuple):
    source: str
    text: str


@dataclass(slots=True)
class Fit:
    """Of one tokenizer on some texts."""

    tokens: int = 0
    split_words: int = 0
    unknown: int = 0
    """Tokens that stand for anything the vocabulary lacks."""


@dataclass(slots=True)
class Group:
    """Texts of one language or source."""

    documents: int = 0
    words: int = 0
    bytes: int = 0
    fits: list[Fit] = field(default_factory=list)

    def as_dict(self, names: Sequence[str]) -> dict[str, Any]:
        return {
            "documents": self.documents, "words": self.words, "bytes": self.bytes,
            "tokenizers": {name: self._measures(fit) for name, fit in zip(names, self.fits, strict=True)},
        }  # fmt: skip

    def _measures(self, fit: Fit) -> dict[str, float | int]:
        return {
            "tokens": fit.tokens,
            "tokens_per_word": fit.tokens / max(self.words, 1),
            "bytes_per_token": self.bytes / max(fit.tokens, 1),
            "split_words": fit.split_words / max(self.words, 1),
            "unknown": fit.unknown / max(fit.tokens, 1),
        }


def fertility(
    texts: Iterable[Text], tokenizers: dict[str, Tokenizer], language_of: Callable[[str], str]
) -> dict[str, Any]:
    """The report as plain values: {"all": ..., "language": {name: ...}, "source": {name: ...}}, most text first."""
    total, languages, sources = _group(tokenizers), dict[str, Group](), dict[str, Group]()
    for source, whole in texts:
        text = whole[:LONGEST_CHARACTERS]
        groups = (
            total,
            languages.setdefault(language_of(text), _group(tokenizers)),
            sources.setdefault(source, _group(tokenizers)),
        )
        spans = np.array([word.span() for word in _WORD.finditer(text)], dtype=np.int64).reshape(-1, 2)
        fits = [_fit(tokenizer, text, spans) for tokenizer in tokenizers.values()]
        for group in groups:
            group.documents += 1
            group.words += len(spans)
            group.bytes += len(text.encode())
            for kept, fit in zip(group.fits, fits, strict=True):
                kept.tokens += fit.tokens
                kept.split_words += fit.split_words
                kept.unknown += fit.unknown
    names = list(tokenizers)
    tables = {"language": languages, "source": sources}
    return {
        "tokenizers": {name: each.vocab_size for name, each in tokenizers.items()},
        "all": total.as_dict(names),
        **{
            kind: {name: groups[name].as_dict(names) for name in sorted(groups, key=lambda name: -groups[name].bytes)}
            for kind, groups in tables.items()
        },
    }


def _group(tokenizers: dict[str, Tokenizer]) -> Group:
    return Group(fits=[Fit() for _ in tokenizers])


def _fit(tokenizer: Tokenizer, text: str, words: np.ndarray) -> Fit:
    """words: begin and end of each in characters [n, 2]."""
    tokenizer.backend.encode_special_tokens = True
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    places = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    touching = np.searchsorted(places[:, 0], words[:, 1], "left") - np.searchsorted(places[:, 1], words[:, 0], "right")
    name = getattr(tokenizer.backend.model, "unk_token", None)
    unknown = tokenizer.backend.token_to_id(name) if name else None
    count = 0 if unknown is None else encoding.ids.count(unknown)
    return Fit(len(places), int((touching > 1).sum()), count)


_COLUMNS = (
    ("tokens per word", "tokens_per_word", "{:.2f}"),
    ("bytes per token", "bytes_per_token", "{:.2f}"),
    ("words split", "split_words", "{:.1%}"),
    ("unknown", "unknown", "{:.2%}"),
)


def as_markdown(report: dict[str, Any]) -> str:
    """Tables of the report."""
    names = ", ".join(f"{name} ({size:,} tokens)" for name, size in report["tokenizers"].items())
    parts = [f"# Fertility\n{names}", _table("", {"all": report["all"]})]
    parts += [f"## By {kind}\n" + _table(kind, report[kind]) for kind in ("language", "source")]
    return "\n\n".join(parts) + "\n"


def _table(kind: str, groups: dict[str, Any]) -> str:
    heads = [kind, "documents", "words", "MB", "tokenizer", *(head for head, _, _ in _COLUMNS)]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * 3 + "---|" + "---:|" * len(_COLUMNS)]
    for name, group in groups.items():
        about = [name, f"{group['documents']:,}", f"{group['words']:,}", f"{group['bytes'] / 1e6:.2f}"]
        for tokenizer, measures in group["tokenizers"].items():
            cells = [form.format(measures[key]) for _, key, form in _COLUMNS]
            lines.append(f"| {' | '.join([*about, tokenizer, *cells])} |")
            about = [""] * 4
    return "\n".join(lines)
