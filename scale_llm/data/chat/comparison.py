"""Rows to comparisons: a prompt with two or more answers, or with one that has a label.

Each row is read by the fields that it has (their names: data.fields):

    chosen, rejected      two answers; a field may hold the whole conversation instead
    answers               two or more, best first or with ranks or scores (ranking.py)
    completion, label     one (KTO); or a conversation of any form and a label

before them prompt, conversations, messages or instruction (data.format says which, where there are several). Without
any of these the answers must be whole conversations (messages, or transcripts, see transcript.py): the prompt is what
they begin with alike.

Pure functions; `RowError` without file and line, as in conversation.py.
"""

from dataclasses import dataclass
from typing import Any

from scale_llm.config.data import ChatFormat, FieldsConfig
from scale_llm.data.chat.conversation import (
    READERS,
    conversation_tools,
    conversation_weight,
    format_of,
    present,
    with_system,
)
from scale_llm.data.chat.parting import check_answer, check_end, no_prompt, parting, prompt_of, whole_conversation
from scale_llm.data.chat.ranking import Ranked, answers_field, number, ranked
from scale_llm.data.chat.turns import Message, RowError, what_is_there, wrong_type
from scale_llm.data.rows import Row


@dataclass(kw_only=True, slots=True)
class Comparison:
    prompt: list[Message]
    answers: list[list[Message]]
    """Best first; of an unpaired row there is one. Each begins and ends with an assistant turn."""
    label: bool | None = None
    """Of an unpaired row: is the answer desirable?"""
    margin: float = 0.0
    tools: list[dict[str, Any]] | None = None
    weight: float = 1.0
    tied: int = 0
    """Answers of the row that were left out because they are as good as one before."""
    file: str = ""
    line: int = 0


def comparison_of(row: Row, form: ChatFormat, fields: FieldsConfig) -> Comparison:
    """The comparison of two or more answers that a row holds.

    form: what the prompt is in; auto: the first there is of prompt, conversations, messages, instruction.
    """
    values = row.values
    found = _answers(values, fields)
    prompt = prompt_of(values, form, fields)
    whole = [whole_conversation(value, where, prompt, fields) for where, value in found.answers]
    place = parting(whole, [where for where, _ in found.answers])
    return Comparison(
        prompt=with_system(whole[0][:place], values, fields),
        answers=[messages[place:] for messages in whole],
        margin=0.0 if values.get(fields.margin) is None else number(values[fields.margin], fields.margin),
        tied=found.tied,
        **_rest(row, fields),
    )


def labelled_of(row: Row, form: ChatFormat, fields: FieldsConfig) -> Comparison:
    """The one answer and its label that a row holds."""
    values = row.values
    if values.get(fields.chosen) is not None and values.get(fields.label) is None:
        raise RowError(
            f"a pair ({what_is_there(values)}); rows of an unpaired loss have {fields.completion!r} and "
            f"{fields.label!r}: write two rows, or choose a loss of pairs",
            "a pair",
        )
    prompt, answer = _completed(values, form, fields)
    return Comparison(
        prompt=with_system(prompt, values, fields), answers=[answer], label=_label(values, fields), **_rest(row, fields)
    )


def _rest(row: Row, fields: FieldsConfig) -> dict[str, Any]:
    return {
        "tools": conversation_tools(row.values, fields),
        "weight": conversation_weight(row.values, fields),
        "file": row.file,
        "line": row.line,
    }


def _answers(values: dict[str, Any], fields: FieldsConfig) -> Ranked:
    names = (fields.chosen, fields.rejected)
    if any(values.get(name) is not None for name in names):
        keys = ("chosen", "rejected")
        return Ranked([(name, present(values, name, key)) for name, key in zip(names, keys, strict=True)], 0)
    field = answers_field(values, fields)
    if field is not None:
        return ranked(values, field, fields)
    if values.get(fields.completion) is not None:
        raise RowError(
            f"an unpaired row ({what_is_there(values)}); a comparison has {fields.chosen!r} and {fields.rejected!r}: "
            "write both in one row, or choose an unpaired loss such as KTO",
            "an unpaired row",
        )
    raise RowError(
        f"neither {fields.chosen!r} and {fields.rejected!r} nor {fields.answers!r} ({what_is_there(values)}); "
        "set data.fields",
        "no such field",
    )


def _completed(values: dict[str, Any], form: ChatFormat, fields: FieldsConfig) -> tuple[list[Message], list[Message]]:
    """(prompt, answer) of an unpaired row."""
    where = fields.completion
    if values.get(where) is None and _holds_conversation(values, form, fields):
        form = format_of(values, fields) if form is ChatFormat.auto else form
        whole, where = READERS[form](values, fields), "the conversation"
        check_end(whole, where)
        place = len(whole) - 1
    else:
        value = present(values, where, "completion")
        prompt = prompt_of(values, form, fields)
        whole = whole_conversation(value, where, prompt, fields)
        size = len(prompt.messages)
        place = size if size and whole[:size] == prompt.messages else len(whole) - 1
    if not place:
        raise no_prompt("nothing comes before the answer")
    check_answer(whole[place:], where)
    return whole[:place], whole[place:]


def _holds_conversation(values: dict[str, Any], form: ChatFormat, fields: FieldsConfig) -> bool:
    """Does a row hold its answer in the same fields as for fine-tuning?"""
    signs = {
        ChatFormat.messages: fields.messages,
        ChatFormat.sharegpt: fields.conversations,
        ChatFormat.prompt_response: fields.response,
        ChatFormat.alpaca: fields.output,
    }
    return any(values.get(name) is not None for each, name in signs.items() if form in (each, ChatFormat.auto))


def _label(values: dict[str, Any], fields: FieldsConfig) -> bool:
    label = present(values, fields.label, "label")
    if isinstance(label, bool) or (isinstance(label, int) and label in (0, 1)):
        return bool(label)
    raise wrong_type(fields.label, label, "true or false")
