"""datatrove's filters with our words, from the configuration."""

import functools
import unicodedata
from pathlib import Path
from urllib.parse import urlsplit

from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    URLFilter,
)
from datatrove.utils._import_utils import ASSETS_PATH
from datatrove.utils.text import split_into_words

from scale_llm.config.curate import C4Config, CurateConfig, FineWebConfig, GopherConfig, RepetitionConfig
from scale_llm.curate.ledger import Ledger
from scale_llm.curate.repetition import Repetition
from scale_llm.curate.step import Filtered, Judge, Verdict
from scale_llm.curate.words import WORDS, TokenCounter


def rules(cfg: CurateConfig, ledger: Ledger, counter: TokenCounter) -> list[Judge]:
    """Steps of rules on single documents, in their order."""
    made: dict[str, Judge] = {}
    if cfg.language.enabled:
        made["language"] = Language(cfg, ledger, counter)
    if cfg.repetition.enabled:
        made["repetition"] = Filtered("repetition", ledger, counter, repetition(cfg.repetition))
    if cfg.gopher.enabled:
        made["gopher"] = Gopher(cfg.gopher, ledger, counter)
    if cfg.c4.enabled:
        made["c4"] = C4("c4", ledger, counter, c4(cfg.c4))
    if cfg.fineweb.enabled:
        made["fineweb"] = Filtered("fineweb", ledger, counter, fineweb(cfg.fineweb))
    if cfg.toxicity.enabled:
        made["toxicity"] = Toxicity(cfg, ledger, counter)
    return list(made.values())


def repetition(cfg: RepetitionConfig) -> Repetition:
    return Repetition(
        dup_line_frac=cfg.duplicate_line_fraction,
        dup_para_frac=cfg.duplicate_paragraph_fraction,
        dup_line_char_frac=cfg.duplicate_line_character_fraction,
        dup_para_char_frac=cfg.duplicate_paragraph_character_fraction,
        top_n_grams=tuple(enumerate(cfg.top_n_grams, start=2)),
        dup_n_grams=tuple(enumerate(cfg.duplicate_n_grams, start=5)),
        language=WORDS,
    )


def gopher(cfg: GopherConfig) -> GopherQualityFilter:
    return GopherQualityFilter(
        min_doc_words=max(cfg.min_words, 1),  # of nothing there is no average
        max_doc_words=cfg.max_words,
        min_avg_word_length=cfg.min_average_word_length,
        max_avg_word_length=cfg.max_average_word_length,
        max_symbol_word_ratio=cfg.max_symbol_word_ratio,
        max_bullet_lines_ratio=cfg.max_bullet_lines_ratio,
        max_ellipsis_lines_ratio=cfg.max_ellipsis_lines_ratio,
        max_non_alpha_words_ratio=cfg.min_alphabetic_words_ratio,
        min_stop_words=None,  # see Gopher
        language=WORDS,
    )


class Gopher(Filtered):
    """datatrove's filter, with stop words in any case: its own finds none in a text of capitals."""

    def __init__(self, cfg: GopherConfig, ledger: Ledger, counter: TokenCounter):
        super().__init__("gopher", ledger, counter, gopher(cfg))
        self.stop_words, self.least = {word.lower() for word in cfg.stop_words}, cfg.min_stop_words

    def judge(self, document: Document, position: int) -> Verdict:
        verdict = super().judge(document, position)
        if verdict is not True or not self.least:
            return verdict
        words = set(split_into_words(document.text.lower(), WORDS))
        return True if len(self.stop_words & words) >= self.least else (False, "gopher_enough_stop_words")


class C4(Filtered):
    """datatrove's filter, which takes lines out of documents; its counts of them are the reasons."""

    def prepare(self, rank: int) -> None:
        self.inner.stat_update = self._note

    def _note(self, *labels: str, **_: object) -> None:
        for label in labels:
            if label.startswith("line-filter-"):
                self.reasons.append(label.removeprefix("line-filter-"))

    def judge(self, document: Document, position: int) -> Verdict:
        verdict = super().judge(document, position)
        self.reasons = sorted(set(self.reasons)) or ["space or citations"]
        return verdict


def c4(cfg: C4Config) -> C4QualityFilter:
    return C4QualityFilter(
        remove_citations=cfg.citations,
        filter_no_terminal_punct=cfg.terminal_punctuation,
        min_num_sentences=cfg.min_sentences or -1,
        min_words_per_line=cfg.min_words_per_line or -1,
        max_word_length=cfg.max_word_length or -1,
        filter_lorem_ipsum=cfg.lorem_ipsum,
        filter_javascript=cfg.javascript,
        filter_curly_bracket=cfg.curly_brackets,
        filter_policy=cfg.policy,
        language=WORDS,
    )


def fineweb(cfg: FineWebConfig) -> FineWebQualityFilter:
    return FineWebQualityFilter(
        line_punct_thr=cfg.min_punctuated_lines_ratio,
        short_line_thr=cfg.max_short_lines_ratio,
        short_line_length=cfg.short_line_characters,
        char_duplicates_ratio=cfg.max_duplicate_characters_ratio,
        new_line_ratio=cfg.max_new_lines_per_word,
        language=WORDS,
    )


class Url(Judge):
    """Addresses on datatrove's lists or the user's; a document without an address stays."""

    def __init__(self, cfg: CurateConfig, ledger: Ledger, counter: TokenCounter):
        super().__init__("url", ledger, counter)
        self.cfg = cfg.url

    def prepare(self, rank: int) -> None:
        cfg = self.cfg
        self.inner = url_filter(tuple(cfg.blocked_domains), tuple(cfg.blocked_words), cfg.lists)

    def judge(self, document: Document, position: int) -> Verdict:
        url = document.metadata["fields"].get(self.cfg.column)
        if not isinstance(url, str) or not url:
            self.ledger.table("notes")["documents without an address"] += 1
            return True
        if urlsplit(url).hostname in self.cfg.blocked_domains:  # also where no registry knows the domain
            return False, "domain"
        document.metadata["url"] = url
        return self.inner.filter(document)


@functools.lru_cache(maxsize=1)
def url_filter(domains: tuple[str, ...], words: tuple[str, ...], lists: bool) -> URLFilter:
    """datatrove's filter, one a process: its lists, read at the first address, take seconds and 0.8 GB."""
    from tldextract import TLDExtract

    made = URLFilter(extra_domains=domains, banned_words=words, use_integrated_lists=lists)
    # Its default asks the network for a newer list of suffixes; the one that it brings is the same everywhere
    made.tldextractor = TLDExtract(suffix_list_urls=(), cache_dir=None)
    return made


class Language(Judge):
    """py3langid's naive Bayes over byte n-grams (Lui and Baldwin 2012), whose model travels in its wheel."""

    def __init__(self, cfg: CurateConfig, ledger: Ledger, counter: TokenCounter):
        super().__init__("language", ledger, counter)
        self.cfg = cfg.language

    def prepare(self, rank: int) -> None:
        self.classify = identifier().classify
        self.languages = self.ledger.table("language in")

    def judge(self, document: Document, position: int) -> Verdict:
        text, characters = document.text, self.cfg.characters
        begin = max(0, (len(text) - characters) // 2)
        language, score = self.classify(text[begin : begin + characters])
        document.metadata["language"] = language
        self.languages[language] += 1
        if language not in self.cfg.languages:
            return False, language
        return (True, "") if score >= self.cfg.min_score else (False, f"{language} unsure")


@functools.cache
def identifier():
    """The model, loaded once a process: that takes most of a second."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


class Toxicity(Judge):
    """Documents too large a share of whose words are on a list; single hits are names, medicine or news too often."""

    def __init__(self, cfg: CurateConfig, ledger: Ledger, counter: TokenCounter):
        super().__init__("toxicity", ledger, counter)
        self.cfg = cfg.toxicity

    def prepare(self, rank: int) -> None:
        entries = {normal(line) for line in word_list(self.cfg.words).splitlines() if line.strip()}
        self.single = {entry for entry in entries if " " not in entry}
        self.phrases = {entry for entry in entries if " " in entry}
        self.longest = max((entry.count(" ") + 1 for entry in self.phrases), default=1)

    def judge(self, document: Document, position: int) -> Verdict:
        words = normal(document.text).split()
        hits = sum(word in self.single for word in words)
        for length in range(2, self.longest + 1):
            runs = (" ".join(words[i : i + length]) for i in range(len(words) - length + 1))
            hits += length * sum(run in self.phrases for run in runs)
        toxic = hits >= max(1, self.cfg.min_words) and hits > self.cfg.max_share * len(words)
        return (False, "words of the list") if toxic else True


def word_list(path: str | None) -> str:
    """The user's list, or the words that datatrove bans from addresses; # begins a comment there."""
    if path is not None:
        return Path(path).expanduser().read_text(encoding="utf-8")
    banned = Path(ASSETS_PATH, "banned_words.txt").read_text(encoding="utf-8")
    return "\n".join(line for line in banned.splitlines() if not line.startswith("#"))


_SIGNS = {i: " " for i in range(0x110000) if i < 0x2FFF and unicodedata.category(chr(i))[0] in "PSZ"}


def normal(text: str) -> str:
    """Lower case, signs as spaces."""
    return " ".join(text.lower().translate(_SIGNS).split())
