"""Tokenised conversations: prepared once, then found again and mapped.

cache_dir/examples/<fingerprint>/   arrays (see writing.py), report.json, prepared.json
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from scale_llm.config.data import DataConfig
from scale_llm.config.errors import UserError
from scale_llm.config.stage import TrainOn
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.data.chat.embedded import embedded_conversations
from scale_llm.data.chat.prepared import PreparedChat, load_prepared, prepare_chat
from scale_llm.data.chat.reading import Report, bad_rows, no_usable_row, read_conversations, report_lines
from scale_llm.data.progress import byte_progress
from scale_llm.data.rows import Problems
from scale_llm.data.splits import SPLITS, split_ranges

if TYPE_CHECKING:
    from scale_llm.data.chat.template import ChatTemplate

__all__ = [
    "Example",
    "Examples",
    "PreparedExamples",
    "load_examples",
    "prepare_examples",
    "report_lines",
    "split_indices",
]

FORMAT = 3
"""Raised when the same input would give other files, so that old cache entries are left alone."""
SPLIT_KEY = 20260101
"""Of the permutation that splits are cut from: not the run's seed, or another seed would train on validation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedExamples(PreparedChat):
    """What ranks need to know of the examples."""

    num_examples: int
    num_tokens: int
    num_trained: int
    """Tokens that the loss counts."""


class Example(NamedTuple):
    tokens: numpy.ndarray
    """int64 [s]"""
    trained: numpy.ndarray
    """bool [s]: does the loss count the token as a target?"""
    weight: float
    answers: numpy.ndarray
    """bool [s]: is it one of those and the assistant's?"""


class _Places(NamedTuple):
    """Where each example was read."""

    files: numpy.ndarray
    """int32 [n]: which of the report's"""
    lines: numpy.ndarray
    """int64 [n]"""


class Examples:
    """The examples of a directory; arrays are mapped, not read."""

    def __init__(self, directory: str | Path, files: list[str]):
        """files: the report's, which `where` names."""
        self.directory = Path(directory)
        self.files = files
        self.starts = self.array("starts.npy")
        self.weights = self.array("weights.npy")
        """float32 [n]"""
        count = int(self.starts[-1])
        self._tokens = self._flat("tokens.bin", numpy.int32, count)
        self._trained = self._flat("trained.bin", numpy.uint8, count)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> numpy.ndarray:
        """Tokens of each example, int64 [n]."""
        return numpy.diff(self.starts)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = slice(int(self.starts[index]), int(self.starts[index + 1]))
        tokens, trained = self._tokens[part].astype(numpy.int64), self._trained[part]
        return Example(tokens, trained.astype(bool), float(self.weights[index]), trained > 1)

    def where(self, index: int) -> str:
        """`file:line` of the row."""
        return f"{self.files[self._places.files[index]]}:{self._places.lines[index]}"

    @cached_property
    def _places(self) -> "_Places":
        return _Places(self.array("files.npy"), self.array("where.npy"))

    def array(self, name: str) -> numpy.ndarray:
        """One of the directory's arrays."""
        try:
            return numpy.load(self.directory / name, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise self.damaged(name) from error

    def _flat(self, name: str, dtype: type, count: int) -> numpy.ndarray:
        path = self.directory / name
        if not path.is_file() or path.stat().st_size != count * numpy.dtype(dtype).itemsize:
            raise self.damaged(name)
        return numpy.memmap(path, dtype, mode="r")

    def damaged(self, name: str) -> UserError:
        return UserError(f"{self.directory / name}: missing or damaged; delete {self.directory} and run again")


class AssistantTokens:
    """The same examples where the assistant's tokens alone count, whatever is trained on. See TokenSequences."""

    def __init__(self, examples: Examples):
        self._examples = examples
        self.lengths = examples.lengths

    def __getitem__(self, index: int) -> Example:
        example = self._examples[index]
        return example._replace(trained=example.answers)


def prepare_examples(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    *,
    train_on: TrainOn,
    seq_length: int,
    cache_dir: str | Path,
    show_progress: bool = False,
) -> PreparedExamples:
    """Tokenises the conversations of `data`, or finds what an earlier call made of the same input.

    Any number of processes may call this at once: one does the work, the others wait for it.

    Raises:
        UserError: with every problem found.
    """

    def build(directory: Path, files: list[str], template: "ChatTemplate") -> tuple[dict[str, Any], dict[str, Any]]:
        report = _build(directory, files, data, template, train_on, seq_length, show_progress)
        counts = {"num_examples": report["kept"], "num_tokens": report["tokens"]}
        return report, {**counts, "num_trained": report["trained_tokens"]}

    facts = [FORMAT, train_on.value, seq_length]
    return prepare_chat(PreparedExamples, "examples", data, tokenizer, facts=facts, cache_dir=cache_dir, build=build)


def load_examples(prepared: PreparedExamples | str | Path) -> Examples:
    """Maps the examples that `prepare_examples` wrote."""
    found = prepared if isinstance(prepared, PreparedExamples) else load_prepared(PreparedExamples, prepared)
    return Examples(Path(found.path).parent, found.report["files"])


def split_indices(num_examples: int, split: str, name: str) -> numpy.ndarray:
    """Which examples belong to train, validation or test: int64, in an order that is always the same.

    A share of a fixed random permutation, so a fair sample. At least one of three or more is for validation if it has a
    share at all.

    Args:
        split: as in data.split, "949,50,1".
    """
    # Sorting raw random words gives the same permutation whatever numpy's own shuffle comes to be
    words = numpy.random.Philox(key=SPLIT_KEY).random_raw(num_examples)
    order = numpy.argsort(words, kind="stable").astype(numpy.int64)
    ranges = split_ranges(split, num_examples)
    sizes = {each: end - begin for each, (begin, end) in ranges.items()}
    shares = dict(zip(SPLITS, map(float, split.split(",")), strict=False))
    if shares.get("validation") and num_examples >= 3 and not sizes["validation"]:
        sizes[max(sizes, key=lambda each: sizes[each])] -= 1
        sizes["validation"] = 1
    begin = sum(sizes[each] for each in SPLITS[: SPLITS.index(name)])
    return order[begin : begin + sizes[name]]


def empty_splits(split: str, count: int, what: str, names: Iterable[str]) -> list[str]:
    """Problems of the named splits that none of `count` examples falls to."""
    return [
        f"data.split={split}: leaves none of {count} {what} for {name}; raise its share, or give more data"
        + (" (or train.eval_iters=0)" if name == "validation" else "")
        for name in names
        if not len(split_indices(count, split, name))
    ]


def _build(
    directory: Path, files: list[str], data: DataConfig, template, train_on: TrainOn, seq_length: int, progress: bool
) -> dict[str, Any]:
    """Writes the arrays; returns the report."""
    from scale_llm.data.chat.writing import Encoder, write_examples

    report = Report(files=list(files))
    bad = bad_rows(data.on_bad_row, report)
    encoder = Encoder(
        template=template,
        train_on=train_on,
        seq_length=seq_length,
        on_too_long=data.on_too_long,
        bad=bad,
        long=Problems(),
        report=report,
    )
    with byte_progress("tokenise conversations", sum(os.path.getsize(file) for file in files), progress) as on_bytes:
        if data.path is None:
            conversations = embedded_conversations(files, on_bytes)
        else:
            conversations = read_conversations(files, data, bad, on_bytes)
        write_examples(directory, encoder.examples(conversations), report)
    problems = bad.found + encoder.long.found
    finished = report.finished()
    if not problems and not report.kept:
        problems = [no_usable_row(data.path, finished)]
    if problems:
        raise UserError(problems)
    return finished
