"""Tokenised comparisons: prepared once, then found again and mapped. For reward models, DPO and its like, and KTO.

cache_dir/preferences/<fingerprint>/   arrays (see preference_writing.py), report.json, prepared.json
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scale_llm.config.data import DataConfig
from scale_llm.config.errors import UserError
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.data.chat.embedded import embedded_comparisons
from scale_llm.data.chat.examples import Examples
from scale_llm.data.chat.preference_report import PreferenceReport, preference_lines
from scale_llm.data.chat.prepared import PreparedChat, load_prepared, prepare_chat
from scale_llm.data.chat.reading import bad_rows, no_usable_row, read_comparisons
from scale_llm.data.progress import byte_progress
from scale_llm.data.rows import Problems

if TYPE_CHECKING:
    from scale_llm.data.chat.template import ChatTemplate

__all__ = [
    "Kind",
    "Preferences",
    "PreparedPreferences",
    "load_preferences",
    "preference_lines",
    "prepare_preferences",
]

FORMAT = 3
"""Raised when the same input would give other files, so that old cache entries are left alone."""
Kind = Literal["pairs", "unpaired"]
"""pairs: comparisons of two or more answers; unpaired: single answers, desirable or not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedPreferences(PreparedChat):
    """What ranks need to know of the comparisons."""

    kind: Kind
    num_comparisons: int
    num_sequences: int
    num_tokens: int
    num_trained: int
    """Tokens of answers."""


class Preferences:
    """The comparisons of a directory; arrays are mapped, not read."""

    def __init__(self, directory: str | Path, files: list[str], kind: Kind = "pairs"):
        """files: the report's, which `where` names."""
        self.sequences = Examples(directory, files)
        """Prompt and answer, one after the other; `trained` is true from the answer's first token on."""
        self.groups = self.sequences.array("groups.npy")
        """int64 [n + 1]: comparison i has sequences groups[i] to groups[i + 1], best first."""
        self.margins = self.sequences.array("margins.npy")
        """float32 [n]"""
        self.labels = self.sequences.array("labels.npy") if kind == "unpaired" else None
        """uint8 [n]: is the answer desirable? None for comparisons."""
        self._check("groups.npy", self.groups[-1], len(self.sequences))
        self._check("margins.npy", len(self.margins), len(self))
        self._check("labels.npy", len(self) if self.labels is None else len(self.labels), len(self))

    def __len__(self) -> int:
        return len(self.groups) - 1

    def members(self, index: int) -> range:
        """The sequences of a comparison, best first."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return range(int(self.groups[index]), int(self.groups[index + 1]))

    def where(self, index: int) -> str:
        """`file:line` of the row."""
        return self.sequences.where(self.members(index)[0])

    def _check(self, name: str, found: int, wanted: int) -> None:
        if found != wanted:
            raise self.sequences.damaged(name)


def prepare_preferences(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    *,
    kind: Kind,
    seq_length: int,
    cache_dir: str | Path,
    show_progress: bool = False,
) -> PreparedPreferences:
    """Tokenises the comparisons of `data`, or finds what an earlier call made of the same input.

    Any number of processes may call this at once: one does the work, the others wait for it.

    Raises:
        UserError: with every problem found.
    """

    def build(directory: Path, files: list[str], template: "ChatTemplate") -> tuple[dict[str, Any], dict[str, Any]]:
        report = _build(directory, files, data, template, kind, seq_length, show_progress)
        counts = {"num_comparisons": report["kept"], "num_sequences": report["answers"]}
        counts |= {"num_tokens": report["tokens"], "num_trained": report["trained_tokens"]}
        return report, {"kind": kind, **counts}

    facts = [FORMAT, kind, seq_length]
    return prepare_chat(
        PreparedPreferences, "preferences", data, tokenizer, facts=facts, cache_dir=cache_dir, build=build
    )


def load_preferences(prepared: PreparedPreferences | str | Path) -> Preferences:
    """Maps the comparisons that `prepare_preferences` wrote."""
    found = prepared if isinstance(prepared, PreparedPreferences) else load_prepared(PreparedPreferences, prepared)
    return Preferences(Path(found.path).parent, found.report["files"], found.kind)


def _build(
    directory: Path,
    files: list[str],
    data: DataConfig,
    template: "ChatTemplate",
    kind: Kind,
    seq_length: int,
    progress: bool,
) -> dict[str, Any]:
    """Writes the arrays; returns the report."""
    from scale_llm.data.chat.preference_writing import ComparisonEncoder, write_comparisons

    unpaired = kind == "unpaired"
    report = PreferenceReport(files=list(files), unpaired=unpaired)
    bad = bad_rows(data.on_bad_row, report)
    encoder = ComparisonEncoder(
        template=template,
        seq_length=seq_length,
        on_too_long=data.on_too_long,
        bad=bad,
        long=Problems(),
        report=report,
    )
    with byte_progress("tokenise comparisons", sum(os.path.getsize(file) for file in files), progress) as on_bytes:
        if data.path is None:
            comparisons = embedded_comparisons(files, on_bytes, unpaired=unpaired)
        else:
            comparisons = read_comparisons(files, data, bad, on_bytes, unpaired=unpaired)
        write_comparisons(directory, encoder.groups(comparisons), report)
    problems = bad.found + encoder.long.found
    finished = report.finished()
    if not problems:
        problems = _unusable(data, finished)
    if problems:
        raise UserError(problems)
    return finished


def _unusable(data: DataConfig, report: dict[str, Any]) -> list[str]:
    """What is wrong with the rows as a whole."""
    if not report["kept"]:
        return [no_usable_row(data.path, report)]
    if report["unpaired"] and report["best"] in (0, report["kept"]):
        names = [f"undesirable ({data.fields.label}=false)", f"desirable ({data.fields.label}=true)"]
        there, other = names[::-1] if report["best"] else names
        return [
            f"data.path={data.path}: all {report['kept']} answers are {there}; an unpaired loss such as KTO needs "
            f"{other} ones too: add some, or set data.fields.label"
        ]
    return []
