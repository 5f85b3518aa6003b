"""A step that judges documents one by one, and accounts for each."""

from abc import abstractmethod
from time import perf_counter

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result

from scale_llm.curate.ledger import Ledger
from scale_llm.curate.words import TokenCounter

Verdict = bool | tuple[bool, str]
"""Whether a document stays, and why not. True with a reason: it stays, changed for that reason."""


class Judge(PipelineStep):
    """Counts documents and tokens in and out of `judge`, which subclasses write.

    A document whose `text` was changed is counted as changed, and counts its tokens anew; one without text left is
    removed.
    """

    type = "STEP"
    secret = False
    """The report does not show what a change has taken away."""

    def __init__(self, name: str, ledger: Ledger, counter: TokenCounter):
        self.name = name
        super().__init__()
        self.ledger, self.counter = ledger, counter
        self.reasons: list[str] = []
        """Why the document at hand was changed; `judge` may fill it."""

    def prepare(self, rank: int) -> None:
        """Loads what a shard needs."""

    @abstractmethod
    def judge(self, document: Document, position: int) -> Verdict:
        """Whether the document, the shard's `position`-th here, stays; may change its text."""

    def run(self, data, rank: int = 0, world_size: int = 1):
        self.prepare(rank)
        count = self.ledger.step(self.name)
        for position, document in enumerate(data):
            text, tokens, began = document.text, document.metadata["tokens"], perf_counter()
            self.reasons = []
            keep, reason = self._verdict(document, position)
            count.documents_in += 1
            count.tokens_in += tokens
            if keep and document.text is not text and document.text != text:
                tokens = document.metadata["tokens"] = self.counter(document.text)
                self.ledger.change(self.name, self.reasons or ["changed"], document, text, secret=self.secret)
                keep, reason = (True, None) if document.text.strip() else (False, "nothing left")
            count.seconds += perf_counter() - began
            if keep:
                count.documents_out += 1
                count.tokens_out += tokens
                yield document
            else:
                document.text = text
                self.ledger.remove(self.name, reason or self.name, document)

    def _verdict(self, document: Document, position: int) -> tuple[bool, str | None]:
        try:
            return get_filter_result(self.judge(document, position))
        except Exception as error:
            place = f"{document.metadata['file']}:{document.metadata['line']}"
            raise RuntimeError(f"{place}: {self.name} failed ({type(error).__name__}: {error})") from error


class Filtered(Judge):
    """One of datatrove's filters."""

    def __init__(self, name: str, ledger: Ledger, counter: TokenCounter, inner: BaseFilter):
        super().__init__(name, ledger, counter)
        self.inner = inner

    def judge(self, document: Document, position: int) -> Verdict:
        return self.inner.filter(document)
