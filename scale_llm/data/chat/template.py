"""Conversations to tokens by a chat template, and which of the tokens the loss counts.

Templates are rendered as transformers does it: Jinja's sandbox, with `{% generation %}`. Special tokens are only those
that the template writes (literal.py); the spans of assistant turns are the template's own (spans.py). A date that a
template would take from the clock is fixed where the template lets it be (`date_string`), or data made anew on another
day would differ.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from scale_llm.config.errors import UserError
from scale_llm.config.stage import TrainOn
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.data.chat.literal import Offsets, Vocabulary, unused_character
from scale_llm.data.chat.spans import (
    Rendering,
    Span,
    has_usable_tags,
    last_turn,
    prefix_spans,
    tagged_spans,
    without_trailing_space,
)
from scale_llm.data.chat.template_files import PLAIN, TemplateSource, special_tokens, template_source
from scale_llm.data.chat.turns import Message, RowError
from scale_llm.data.tokenizer import Tokenizer
from scale_llm.data.tokenizer_json import tokenizer_file

FORMAT = 1
"""Raised when the same template and conversation would give other tokens."""
DATE = "26 Jul 2024"
"""What Llama's templates take for today where nobody tells them."""

Tools = list[dict[str, Any]] | None


class Encoded(NamedTuple):
    """A conversation as tokens."""

    tokens: list[int]
    trained: list[bool]
    """For each token: does the loss count it as a target?"""
    answers: list[bool] | None = None
    """For each token: is it one of those and the assistant's? None: the template cannot tell."""


class Marked(NamedTuple):
    """A rendered conversation."""

    text: str
    answers: list[Span] | None
    """Characters of the assistant's turns; None: the template cannot tell."""
    whole: bool
    """The loss counts all characters, not the answers' alone."""
    sentinel: str | None
    """Stands in texts that look like special tokens, if there are any."""


class ChatTemplate:
    def __init__(self, source: TemplateSource, special: dict[str, str], tokenizer: Tokenizer):
        """special: {name in the template: text} of special tokens."""
        self.source = source
        self.special = special
        self.tokenizer = tokenizer
        self.has_tags = has_usable_tags(source.text)

    @classmethod
    def load(cls, tokenizer_path: str, tokenizer_config: TokenizerConfig) -> "ChatTemplate":
        """The template of the configuration, else the tokenizer's own, else the built-in one.

        tokenizer_path: a tokenizer.json, or its directory.
        """
        eod = tokenizer_config.eod_token
        tokenizer = Tokenizer.load(tokenizer_path, eod)
        directory = Path(tokenizer_file(tokenizer_path)).parent
        source = template_source(directory, tokenizer_config)
        special = special_tokens(directory, eod)
        if source.path == str(PLAIN):
            special["eos_token"] = eod
        return cls(source, special, tokenizer)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """Made when it is first asked for: a copy of a large tokenizer takes a second, a digest needs none."""
        return Vocabulary(self.tokenizer)

    @property
    def digest(self) -> str:
        """Names all that the tokens of a conversation depend on, but the tokenizer."""
        content = json.dumps([FORMAT, DATE, self.source.text, self.special], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def encode(self, messages: list[Message], tools: Tools = None, train_on: TrainOn = TrainOn.assistant) -> Encoded:
        """Tokens of a conversation, and which the loss counts.

        assistant, last_assistant: those of the assistant's turns, the token that ends a turn among them, white space
        after that not. all: every one but a leading beginning-of-sequence token, which nothing predicts.

        Raises:
            RowError: what the template, or its spans, cannot do with this conversation.
        """
        return self.tokenise([self.mark(messages, tools, train_on)])[0]

    def prompt(self, messages: list[Message], tools: Tools = None) -> list[int]:
        """Tokens after which the assistant's answer is generated."""
        messages, tools, sentinel = self._protected(messages, tools)
        text = self.render(messages, tools, add_generation_prompt=True).text
        return self.tokenise([Marked(text, None, True, sentinel)])[0].tokens

    def mark(self, messages: list[Message], tools: Tools, train_on: TrainOn, first: int | None = None) -> Marked:
        """The first half of `encode`: text and spans.

        first: with train_on=assistant, the message from which on turns count.
        """
        messages, tools, sentinel = self._protected(messages, tools)
        first = last_turn(messages) if train_on is TrainOn.last_assistant else first
        try:
            text, answers = self._answers(messages, tools, first)
        except RowError:
            if train_on is not TrainOn.all:
                raise
            text, answers = self.render(messages, tools).text, None
        return Marked(text, answers, train_on is TrainOn.all, sentinel)

    def _answers(self, messages: list[Message], tools: Tools, first: int | None) -> Rendering:
        """Text, and spans of the assistant's turns from message `first` on."""
        find = tagged_spans if self.has_tags else prefix_spans

        def render(some: list[Message], with_prompt: bool) -> Rendering:
            return self.render(some, tools, add_generation_prompt=with_prompt)

        text, spans = find(render, messages, first)
        return Rendering(text, [without_trailing_space(text, span, self.vocabulary.any_special) for span in spans])

    def tokenise(self, batch: list[Marked]) -> list[Encoded]:
        """The second half of `encode`, for many conversations at once."""
        plain = iter(self.vocabulary.encode([marked.text for marked in batch if marked.sentinel is None]))
        return [
            self._encoded(
                marked,
                self.vocabulary.encode_protected(marked.text, marked.sentinel) if marked.sentinel else next(plain),
            )
            for marked in batch
        ]

    def render(self, messages: list[Message], tools: Tools = None, add_generation_prompt: bool = False) -> Rendering:
        """The text that the template makes of a conversation."""
        import jinja2
        from transformers.utils import chat_template_utils

        render_jinja_template: Any = chat_template_utils.render_jinja_template  # its types say less than it returns
        try:
            texts, generated = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self.source.text,
                return_assistant_tokens_mask=self.has_tags,
                add_generation_prompt=add_generation_prompt,
                date_string=DATE,
                **self.special,
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"{self.source.path}:{error.lineno}: not a Jinja template ({error.message}); mend it"
            ) from None
        # A template is a program of somebody else's, and fails in any way that expressions can
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            message = f"the chat template refuses the conversation ({error}); change the row or tokenizer.chat_template"
            raise RowError(message, "refused by the chat template") from error
        return Rendering(texts[0], [(begin, end) for begin, end in generated[0]] if self.has_tags else [])

    def _protected(self, messages: list[Message], tools: Tools) -> tuple[list[Message], Tools, str | None]:
        if not self.vocabulary.spelt_in([messages, tools]):
            return messages, tools, None
        sentinel = unused_character([messages, tools])
        return self.vocabulary.protect(messages, sentinel), self.vocabulary.protect(tools, sentinel), sentinel

    def _encoded(self, marked: Marked, tokens: Offsets) -> Encoded:
        answers = None if marked.answers is None else _within(tokens.spans, marked.answers)
        if answers is not None and not marked.whole:
            return Encoded(tokens.ids, answers, answers)
        trained = [True] * len(tokens.ids)
        bos = self.vocabulary.special.get(self.special.get("bos_token", ""))
        if bos and tokens.ids and tokens.ids[0] == bos[0]:
            trained[0] = False
        return Encoded(tokens.ids, trained, answers)


def _within(tokens: list[Span], spans: list[Span]) -> list[bool]:
    """Which tokens hold a character of the spans. Both in ascending order; a token of no width lies where it begins."""
    trained = []
    place = 0
    for begin, end in tokens:
        while place < len(spans) and spans[place][1] <= begin:
            place += 1
        trained.append(place < len(spans) and spans[place][0] < max(end, begin + 1))
    return trained
