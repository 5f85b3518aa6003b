"""Conversations to arrays on disk: tokenised in batches, fitted to the sequence length, written as they come.

tokens.bin   int32 [sum of lengths]    trained.bin  uint8 [sum of lengths]: 1 where the loss counts the token,
                                                    3 where it is the assistant's too
starts.npy   int64 [n + 1]             weights.npy  float32 [n]
where.npy    int64 [n], line (or row) from 1       files.npy  int32 [n], which of the report's files
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy

from scale_llm.config.data import TooLong
from scale_llm.config.stage import TrainOn
from scale_llm.data.chat.conversation import Conversation
from scale_llm.data.chat.reading import Report
from scale_llm.data.chat.template import ChatTemplate, Encoded, Marked
from scale_llm.data.chat.turns import RowError
from scale_llm.data.rows import Problems

BATCH_CHARACTERS = 1 << 20
"""Text tokenised at a time, enough to keep all cores busy."""
ANSWER = numpy.uint8(2)
"""The bit of `trained` that says so of the assistant's tokens."""
Item = TypeVar("Item")


class Placed(Protocol):
    """What a sequence was made of."""

    @property
    def file(self) -> str: ...
    @property
    def line(self) -> int: ...
    @property
    def weight(self) -> float: ...


@dataclass(kw_only=True, slots=True)
class Encoder:
    """Turns conversations into examples; what cannot be one goes to `bad`, `long` or the report."""

    template: ChatTemplate
    train_on: TrainOn
    seq_length: int
    on_too_long: TooLong
    bad: Problems
    long: Problems
    """Too long ones, where that is an error."""
    report: Report

    def examples(self, conversations: Iterable[Conversation]) -> Iterator[tuple[Conversation, Encoded]]:
        for conversation, (encoded,) in tokenised(self.template, self._marked(conversations)):
            fitted = self._fitted(conversation, encoded)
            if fitted is not None:
                self.report.unmarked += not any(fitted.answers or ())
                yield conversation, fitted

    def _marked(self, conversations: Iterable[Conversation]) -> Iterator[tuple[Conversation, list[Marked]]]:
        for conversation in conversations:
            try:
                marked = self.template.mark(conversation.messages, conversation.tools, self.train_on)
            except RowError as error:
                self.bad.add(conversation.file, conversation.line, error.message, error.kind)
                continue
            yield conversation, [marked]

    def _fitted(self, conversation: Conversation, encoded: Encoded) -> Encoded | None:
        """The example, of at most `seq_length` tokens, or None."""
        place = conversation.file, conversation.line
        if not any(encoded.trained):
            message = "the chat template gives no token that the loss could count; change the row or stage.train_on"
            self.bad.add(*place, message, "nothing trained")
            return None
        if len(encoded.tokens) <= self.seq_length:
            return encoded
        excess = f"{len(encoded.tokens)} tokens are more than the {self.seq_length} that model.seq_length allows"
        if self.on_too_long is TooLong.fail:
            self.long.add(*place, f"{excess}; raise it, or set data.on_too_long=truncate or drop", "too long")
            return None
        if self.on_too_long is TooLong.drop:
            self.report.drop(*place, f"{excess}; raise it", "too long")
            return None
        within = slice(self.seq_length)
        answers = None if encoded.answers is None else encoded.answers[within]
        cut = Encoded(encoded.tokens[within], encoded.trained[within], answers)
        if not any(cut.trained):
            self.report.drop(*place, f"{excess}, and only later ones count; raise it", "nothing trained within length")
            return None
        self.report.truncate(*place, excess)
        return cut


def tokenised(
    template: ChatTemplate, marked: Iterable[tuple[Item, list[Marked]]]
) -> Iterator[tuple[Item, list[Encoded]]]:
    """Each item with its texts as tokens, many texts at a time."""
    for batch in _batches(marked):
        encoded = iter(template.tokenise([text for _, texts in batch for text in texts]))
        for item, texts in batch:
            yield item, [next(encoded) for _ in texts]


def _batches(marked: Iterable[tuple[Item, list[Marked]]]) -> Iterator[list[tuple[Item, list[Marked]]]]:
    batch: list[tuple[Item, list[Marked]]] = []
    size = 0
    for item, texts in marked:
        batch.append((item, texts))
        size += sum(len(each.text) for each in texts)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_examples(directory: Path, examples: Iterable[tuple[Placed, Encoded]], report: Report) -> None:
    """Writes the arrays; counts what was written in the report."""
    lengths: list[int] = []
    weights: list[float] = []
    where: list[int] = []
    files: list[int] = []
    numbers = {file: number for number, file in enumerate(report.files)}
    with open(directory / "tokens.bin", "wb") as tokens, open(directory / "trained.bin", "wb") as trained:
        for conversation, encoded in examples:
            numpy.array(encoded.tokens, numpy.int32).tofile(tokens)
            counted = numpy.array(encoded.trained, numpy.uint8)
            report.trained_tokens += int(counted.sum(dtype=numpy.int64))
            if encoded.answers is not None:
                counted |= ANSWER * numpy.logical_and(counted, encoded.answers)
            counted.tofile(trained)
            lengths.append(len(encoded.tokens))
            weights.append(conversation.weight)
            where.append(conversation.line)
            files.append(numbers[conversation.file])
    starts = numpy.concatenate([[0], numpy.cumsum(lengths, dtype=numpy.int64)]).astype(numpy.int64)
    numpy.save(directory / "starts.npy", starts)
    numpy.save(directory / "weights.npy", numpy.array(weights, numpy.float32))
    numpy.save(directory / "where.npy", numpy.array(where, numpy.int64))
    numpy.save(directory / "files.npy", numpy.array(files, numpy.int32))
    report.kept, report.tokens, report.longest = len(lengths), int(starts[-1]), max(lengths, default=0)
