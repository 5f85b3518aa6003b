"""Which characters of a rendered conversation the assistant wrote: as the template itself gives it.

A template with `{% generation %}` tags says so. For any other, an assistant turn is what comes between the rendering of
all before it, generation prompt included, and the rendering that ends with it, if each continues the one before. The
rendering is never searched for markers or for the messages' text: either may occur anywhere.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from scale_llm.data.chat.turns import Message, RowError

BLOCK_TAG = re.compile(r"\{%[-+]?\s*(\w+)(.*?)%\}", re.DOTALL)
Span = tuple[int, int]
"""[begin, end) in characters."""


class Rendering(NamedTuple):
    text: str
    generated: list[Span]
    """What stands within generation tags."""


Render = Callable[[list[Message], bool], Rendering]
"""(messages, with generation prompt)."""
OR_ALL = ", or set stage.train_on=all"
"""The end of a remedy that only stages with such a key have."""


def has_usable_tags(template: str) -> bool:
    """Has a template generation tags, all of them where their place in the text is known?

    What a macro, a call, a filter or a `set` block holds is put into the text later, and transformers, which counts the
    characters before a tag, does not see those in front of it there.
    """
    depth = tags = 0
    for word, rest in BLOCK_TAG.findall(template):
        captures = word in ("macro", "call", "filter") or (word == "set" and "=" not in rest)
        depth += captures - (word in ("endmacro", "endcall", "endfilter", "endset"))
        tags += word == "generation"
        if word == "generation" and depth:
            return False
    return tags > 0


def last_turn(messages: list[Message]) -> int:
    """The place of the assistant's last turn."""
    return _assistants(messages)[-1]


def tagged_spans(render: Render, messages: list[Message], first: int | None) -> Rendering:
    """The spans of the tags; from message `first` on, those that are not there without it."""
    whole = render(messages, False)
    if first is None:
        return whole
    try:
        before = len(render(messages[:first], False).generated)
    except RowError:  # templates may refuse a conversation that ends with a user
        before = len(whole.generated) - len(_assistants(messages[first:]))
    return Rendering(whole.text, whole.generated[before:])


def prefix_spans(render: Render, messages: list[Message], first: int | None) -> Rendering:
    """Turns, from message `first` on, by prefixes; `RowError` where the rendering of a part is no prefix of the whole.

    Where only the generation prompt does not fit (some templates prompt with the start of a thought that they drop from
    finished turns), the turn begins before its header.
    """
    text = render(messages, False).text
    places = [place for place in _assistants(messages) if place >= (first or 0)]
    return Rendering(text, [_turn(render, messages, place, text) for place in places])


def without_trailing_space(text: str, span: Span, special: re.Pattern[str]) -> Span:
    """A span without the white space behind its last special token: a model stops at that token."""
    ends = [found.end() for found in special.finditer(text, *span)]
    return (span[0], ends[-1]) if ends and text[ends[-1] : span[1]].isspace() else span


def _assistants(messages: list[Message]) -> list[int]:
    return [place for place, message in enumerate(messages) if message["role"] == "assistant"]


def _turn(render: Render, messages: list[Message], place: int, text: str) -> Span:
    reason = "its rendering changes with what follows"
    through = text if place + 1 == len(messages) else render(messages[: place + 1], False).text
    if text.startswith(through):
        for with_prompt in (True, False):
            try:
                before = render(messages[:place], with_prompt).text
            except RowError as error:
                reason = f"without it, {error.message.split(';')[0]}"
                continue
            if through.startswith(before):
                return len(before), len(through)
            reason = "what comes before it is rendered otherwise without it"
    raise RowError(
        f"the chat template cannot mark the assistant's turn {place + 1} ({reason}); give tokenizer.chat_template a "
        f"template with {{% generation %}} tags{OR_ALL}",
        "spans not marked",
    )
