"""What curation does to documents: one dataclass for each step, and the whole of one curation.

Thresholds without another source are those of datatrove's filters. Gopher: Rae et al. 2021, appendix A. C4: Raffel et
al. 2020, section 2.2. FineWeb: Penedo et al. 2024, section 3.
"""

from dataclasses import dataclass, field
from typing import Any

from scale_llm.config.cluster import ClusterConfig
from scale_llm.config.data import BadRow


@dataclass(kw_only=True, slots=True)
class UrlConfig:
    enabled: bool = True
    column: str = "url"
    """Field of a row that holds the address; documents without one pass."""
    lists: bool = True
    """Use the lists of domains, addresses and words that datatrove brings along (adult content, malware, phishing);
    0.8 GB of memory in each task that meets an address."""
    blocked_domains: list[str] = field(default_factory=list)
    """Registered domains (example.org) or hosts (shop.example.org)."""
    blocked_words: list[str] = field(default_factory=list)
    """Words that an address must not have as a part between signs."""


@dataclass(kw_only=True, slots=True)
class ExtractConfig:
    timeout_seconds: float = 10.0
    """After which a page's extraction is given up; the page is removed and counted."""
    favour_precision: bool = True
    """Rather lose text of a page than keep its navigation."""


@dataclass(kw_only=True, slots=True)
class LanguageConfig:
    enabled: bool = True
    languages: list[str] = field(default_factory=lambda: ["en"])
    """ISO 639-1 codes to keep."""
    min_score: float = 0.4
    """Least probability, as py3langid gives it, of the likeliest language."""
    characters: int = 1000
    """How much of a document is looked at, from its middle."""


@dataclass(kw_only=True, slots=True)
class RepetitionConfig:
    enabled: bool = True
    duplicate_line_fraction: float = 0.3
    duplicate_paragraph_fraction: float = 0.3
    duplicate_line_character_fraction: float = 0.2
    duplicate_paragraph_character_fraction: float = 0.2
    top_n_grams: list[float] = field(default_factory=lambda: [0.2, 0.18, 0.16])
    """Largest share of characters in the most frequent n-gram: for 2, 3, 4, ... words."""
    duplicate_n_grams: list[float] = field(default_factory=lambda: [0.15, 0.14, 0.13, 0.12, 0.11, 0.10])
    """Largest share of characters in n-grams that came before: for 5, 6, 7, ... words."""


@dataclass(kw_only=True, slots=True)
class GopherConfig:
    enabled: bool = True
    min_words: int = 50
    max_words: int = 100_000
    min_average_word_length: float = 3
    max_average_word_length: float = 10
    max_symbol_word_ratio: float = 0.1
    max_bullet_lines_ratio: float = 0.9
    max_ellipsis_lines_ratio: float = 0.3
    min_alphabetic_words_ratio: float = 0.8
    stop_words: list[str] = field(default_factory=lambda: ["the", "be", "to", "of", "and", "that", "have", "with"])
    """English; give those of the language that is kept, or none with min_stop_words=0."""
    min_stop_words: int = 2
    """Different stop words that a document must have."""


@dataclass(kw_only=True, slots=True)
class C4Config:
    enabled: bool = True
    terminal_punctuation: bool = False
    """Remove lines that do not end in punctuation. FineWeb measured that this removes too much."""
    min_sentences: int = 3
    min_words_per_line: int = 5
    """Shorter lines are removed."""
    max_word_length: int = 1000
    curly_brackets: bool = True
    """Remove documents with a curly bracket, most of which hold code."""
    lorem_ipsum: bool = True
    javascript: bool = True
    """Remove lines that mention JavaScript."""
    policy: bool = True
    """Remove lines that mention terms of use, privacy policy or cookies."""
    citations: bool = True
    """Take [1], [edit] and [citation needed] out of lines."""


@dataclass(kw_only=True, slots=True)
class FineWebConfig:
    enabled: bool = True
    min_punctuated_lines_ratio: float = 0.12
    max_short_lines_ratio: float = 0.67
    short_line_characters: int = 30
    max_duplicate_characters_ratio: float = 0.01
    """Share of characters in lines that came before."""
    max_new_lines_per_word: float = 0.3


@dataclass(kw_only=True, slots=True)
class ToxicityConfig:
    enabled: bool = True
    words: str | None = None
    """A file with a word or phrase on each line; None: the words that datatrove's URL filter bans."""
    max_share: float = 0.01
    """Largest share of a document's words that may be on the list."""
    min_words: int = 3
    """Documents with fewer of them stay."""


@dataclass(kw_only=True, slots=True)
class QualityConfig:
    enabled: bool = True
    reference: Any = None
    """Files of good text that the model learns from; None: a sample of the documents that have passed the rules."""
    train_megabytes: float = 20.0
    """Text that the model is trained on."""
    max_perplexity: float | None = None
    """Of a character; None: that of the model's own text times `tolerance`."""
    tolerance: float = 3.0
    """How many times the median perplexity of held-out training documents a document may have."""


@dataclass(kw_only=True, slots=True)
class ExactConfig:
    enabled: bool = True


@dataclass(kw_only=True, slots=True)
class NearConfig:
    enabled: bool = True
    n_grams: int = 3
    """Words of a shingle."""
    buckets: int = 32
    hashes_per_bucket: int = 5
    """Two documents are compared if all hashes of a bucket are equal: of similarity s, with probability
    1-(1-s^hashes_per_bucket)^buckets."""
    min_similarity: float = 0.6
    """Least share of equal hashes, which estimates the Jaccard similarity of shingles, among near duplicates."""
    seed: int = 1


@dataclass(kw_only=True, slots=True)
class SentencesConfig:
    enabled: bool = True
    span: int = 3
    """Sentences in a row that are looked for; one of the documents that have them keeps them."""
    min_words: int = 50
    """A document that lost sentences and has fewer words left is removed."""


@dataclass(kw_only=True, slots=True)
class DecontaminateConfig:
    enabled: bool = True
    against: Any = None
    """Evaluation sets: files, globs or directories of JSONL, JSON, Parquet or text. None: nothing to look for."""
    fields: list[str] = field(default_factory=list)
    """Fields of their rows to look for; empty: every field that holds text."""
    n_grams: int = 13
    """Words in a row, without case and punctuation, that make a document contaminated."""
    shortest: int = 8
    """Texts with fewer words than n_grams are looked for whole if they have at least as many as this."""


@dataclass(kw_only=True, slots=True)
class PiiConfig:
    enabled: bool = True
    email: bool = True
    phone: bool = True
    phone_region: str = "US"
    """Country whose numbers may be without +CODE."""
    ip: bool = True
    """Public IPv4 and IPv6 addresses."""
    card: bool = True
    """Numbers of payment cards with a right Luhn digit."""
    national_ids: list[str] = field(default_factory=lambda: ["us", "gb", "fr", "es", "it", "nl", "br", "in"])
    """Countries whose personal numbers are masked, where their check digits are right."""


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    examples: int = 3
    """Removed documents that the report shows for each reason."""
    label: str | None = None
    """Field of the input that says what is wrong with a document, for recall and precision by kind in the report: the
    name of a step (near), of one of its reasons (pii.email), a list of these, or clean."""


@dataclass(kw_only=True, slots=True)
class CurateConfig:
    """The steps, in their order."""

    text: str = "text"
    """Field of JSONL and Parquet rows that holds the document."""
    max_document_megabytes: float = 16.0
    """Larger documents are not read, and counted."""
    shard_megabytes: float = 256.0
    """Input of one unit of work: small files together; large files of plain JSONL are cut at ends of lines."""
    tokenizer: str | None = None
    """tokenizer.json that counts tokens; None: a token is a word, or a Chinese or Japanese character."""
    keep_removed: bool = True
    """Write removed documents, with step and reason, to removed/."""
    compression: bool = True
    """Write gzip."""
    url: UrlConfig = field(default_factory=UrlConfig)
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    repetition: RepetitionConfig = field(default_factory=RepetitionConfig)
    gopher: GopherConfig = field(default_factory=GopherConfig)
    c4: C4Config = field(default_factory=C4Config)
    fineweb: FineWebConfig = field(default_factory=FineWebConfig)
    toxicity: ToxicityConfig = field(default_factory=ToxicityConfig)
    exact: ExactConfig = field(default_factory=ExactConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    near: NearConfig = field(default_factory=NearConfig)
    sentences: SentencesConfig = field(default_factory=SentencesConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    pii: PiiConfig = field(default_factory=PiiConfig)
    report: ReportConfig = field(default_factory=ReportConfig)


@dataclass(kw_only=True, slots=True)
class CurationConfig:
    """The whole of one curation."""

    input: Any
    """Files, globs or directories: WARC, JSONL, JSON, Parquet or text, compressed (.gz, .bz2, .xz, .zst) or not."""
    output: str
    """Directory for documents/, removed/ and the report. The same command again resumes."""
    tasks: int | None = None
    """Units of work at once; None: the cores of this machine, on Slurm no limit. The output does not depend on it."""
    on_bad_row: BadRow = BadRow.drop
    """A row that cannot be read: leave it out, counted and listed in the report, or stop."""
    curate: CurateConfig = field(default_factory=CurateConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
