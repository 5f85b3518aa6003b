"""Comparisons to arrays: their answers as sequences, those of one comparison behind each other, best first.

The arrays of writing.py for all sequences, and

groups.npy   int64 [n + 1], which sequences belong to each of n comparisons     margins.npy  float32 [n]
labels.npy   uint8 [n], of unpaired rows: is the answer desirable?

The sequences of a comparison begin with exactly the same tokens up to the first that counts. Where a tokenizer merges
the end of the prompt with the start of one answer, that token counts, and so do those of the other answers from the
same place on: the probabilities compared are then of the same text after the same tokens.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from scale_llm.config.data import TooLong
from scale_llm.config.stage import TrainOn
from scale_llm.data.chat.comparison import Comparison
from scale_llm.data.chat.preference_report import PreferenceReport
from scale_llm.data.chat.spans import OR_ALL
from scale_llm.data.chat.template import ChatTemplate, Encoded, Marked
from scale_llm.data.chat.turns import RowError
from scale_llm.data.chat.writing import tokenised, write_examples
from scale_llm.data.rows import Problems


@dataclass(kw_only=True, slots=True)
class ComparisonEncoder:
    """Turns comparisons into sequences; what cannot be any goes to `bad`, `long` or the report."""

    template: ChatTemplate
    seq_length: int
    on_too_long: TooLong
    bad: Problems
    long: Problems
    """Too long ones, where that is an error."""
    report: PreferenceReport

    def groups(self, comparisons: Iterable[Comparison]) -> Iterator[tuple[Comparison, list[Encoded]]]:
        for comparison, encoded in tokenised(self.template, self._marked(comparisons)):
            fitted = self._fitted(comparison, encoded)
            if fitted:
                yield comparison, fitted

    def _marked(self, comparisons: Iterable[Comparison]) -> Iterator[tuple[Comparison, list[Marked]]]:
        for comparison in comparisons:
            try:
                marked = self._answers(comparison)
            except RowError as error:
                self.bad.add(comparison.file, comparison.line, error.message.removesuffix(OR_ALL), error.kind)
                continue
            yield comparison, marked

    def _answers(self, comparison: Comparison) -> list[Marked]:
        prompt, first = comparison.prompt, len(comparison.prompt)
        marked = [
            self.template.mark(prompt + answer, comparison.tools, TrainOn.assistant, first)
            for answer in comparison.answers
        ]
        if len({_before(each) for each in marked}) > 1:
            raise RowError(
                "the chat template writes the prompt otherwise with each answer; give another in "
                "tokenizer.chat_template",
                "prompts differ",
            )
        return marked

    def _fitted(self, comparison: Comparison, encoded: list[Encoded]) -> list[Encoded]:
        """Sequences of at most `seq_length` tokens, no two the same; none if the comparison is no use."""
        place = comparison.file, comparison.line
        if not all(any(each.trained) for each in encoded):
            message = "the chat template gives no token of an answer; change the row or tokenizer.chat_template"
            self.bad.add(*place, message, "nothing trained")
            return []
        whole, shared = _sharing(encoded)
        fitted = _distinct(whole)
        if not self._enough(comparison, fitted):
            self.report.drop(*place, "all answers are the same", "equal answers")
            return []
        longest = max(len(each.tokens) for each in fitted)
        if longest > self.seq_length:
            fitted = self._cut(
                comparison,
                fitted,
                shared,
                f"{longest} tokens are more than the {self.seq_length} that model.seq_length allows",
            )
        if fitted:
            self.report.left_out += comparison.tied + len(encoded) - len(fitted)
        return fitted

    def _cut(self, comparison: Comparison, encoded: list[Encoded], shared: int, excess: str) -> list[Encoded]:
        """The answers without their ends; the prompt stays whole."""
        place = comparison.file, comparison.line
        if self.on_too_long is TooLong.fail:
            self.long.add(*place, f"{excess}; raise it, or set data.on_too_long=truncate or drop", "too long")
            return []
        if self.on_too_long is TooLong.drop:
            self.report.drop(*place, f"{excess}; raise it", "too long")
            return []
        if shared >= self.seq_length:
            message = f"{excess}, and the prompt fills it with {shared}; raise it"
            self.report.drop(*place, message, "prompt fills the sequence")
            return []
        cut = _distinct([Encoded(each.tokens[: self.seq_length], each.trained[: self.seq_length]) for each in encoded])
        if not self._enough(comparison, cut):
            self.report.drop(*place, f"{excess}, and the answers differ only later; raise it", "equal within length")
            return []
        self.report.truncate(*place, excess)
        return cut

    def _enough(self, comparison: Comparison, encoded: list[Encoded]) -> bool:
        return len(encoded) >= (1 if comparison.label is not None else 2)


def _before(marked: Marked) -> str:
    """The text before the answer. A sentinel is another character where an answer holds the usual one."""
    assert marked.answers is not None, "answers are marked"
    text = marked.text[: marked.answers[0][0]] if marked.answers else ""
    return text.replace(marked.sentinel, "") if marked.sentinel else text


def _sharing(encoded: Sequence[Encoded]) -> tuple[list[Encoded], int]:
    """The sequences with the same tokens before the first that counts, and the number of these."""
    prompts = [each.tokens[: each.trained.index(True)] for each in encoded]
    shared = len(os.path.commonprefix(prompts))
    return [
        Encoded(each.tokens, [*each.trained[:shared], *[True] * (len(prompt) - shared), *each.trained[len(prompt) :]])
        for each, prompt in zip(encoded, prompts, strict=True)
    ], shared


def _distinct(encoded: Sequence[Encoded]) -> list[Encoded]:
    """Without those that repeat a better one."""
    found: dict[tuple[int, ...], Encoded] = {}
    for each in encoded:
        found.setdefault(tuple(each.tokens), each)
    return list(found.values())


def write_comparisons(
    directory: Path, groups: Iterable[tuple[Comparison, list[Encoded]]], report: PreferenceReport
) -> None:
    """Writes the arrays; counts what was written in the report."""
    sizes: list[int] = []
    labels: list[bool] = []
    margins: list[float] = []
    counts = {True: [0, 0], False: [0, 0]}

    def sequences() -> Iterator[tuple[Comparison, Encoded]]:
        for comparison, encoded in groups:
            sizes.append(len(encoded))
            margins.append(comparison.margin)
            labels.append(bool(comparison.label))
            for place, each in enumerate(encoded):
                count = counts[place == 0 if comparison.label is None else comparison.label]
                count[0] += 1
                count[1] += sum(each.trained)
                yield comparison, each

    write_examples(directory, sequences(), report)
    starts = numpy.concatenate([[0], numpy.cumsum(sizes, dtype=numpy.int64)]).astype(numpy.int64)
    numpy.save(directory / "groups.npy", starts)
    numpy.save(directory / "margins.npy", numpy.array(margins, numpy.float32))
    if report.unpaired:
        numpy.save(directory / "labels.npy", numpy.array(labels, numpy.uint8))
    report.kept, report.answers, report.best = len(sizes), int(starts[-1]), counts[True][0]
    report.best_mean, report.others_mean = (round(tokens / max(number, 1), 1) for number, tokens in counts.values())
