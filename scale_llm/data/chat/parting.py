"""Where the prompt of a row ends and its answers begin."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scale_llm.config.data import ChatFormat, FieldsConfig
from scale_llm.data.chat.conversation import alpaca_question, openai_names, present, sharegpt_names
from scale_llm.data.chat.transcript import is_open_transcript, is_transcript, transcript
from scale_llm.data.chat.turns import Message, Names, RowError, as_turns

PROMPT_FIELDS = {
    ChatFormat.prompt_response: "prompt",
    ChatFormat.sharegpt: "conversations",
    ChatFormat.messages: "messages",
    ChatFormat.alpaca: "instruction",
}
"""Parts of data.fields; the first that a row has holds its prompt."""


@dataclass(kw_only=True, slots=True)
class Prompt:
    messages: list[Message]
    """Empty: the answers are whole conversations."""
    field: str = ""
    is_written_out: bool = False
    """As a transcript; answers may be some too."""


def prompt_of(values: dict[str, Any], form: ChatFormat, fields: FieldsConfig) -> Prompt:
    """The prompt of a row; form: what it is in."""
    if form is ChatFormat.auto:
        there = [form for form, key in PROMPT_FIELDS.items() if values.get(getattr(fields, key)) is not None]
        if not there:
            return Prompt(messages=[], is_written_out=True)
        form = there[0]
    key = PROMPT_FIELDS[form]
    field = getattr(fields, key)
    if form is ChatFormat.alpaca:
        return Prompt(messages=[alpaca_question(values, fields)], field=field)
    value = present(values, field, key)
    if isinstance(value, str) and is_open_transcript(value):
        return Prompt(messages=transcript(value, field), field=field, is_written_out=True)
    messages = as_turns(value, _names(value, fields), field, "user")
    if messages[-1]["role"] == "assistant":
        message = f"field {field!r} ends with an assistant turn; the prompt must end before the answer: remove the turn"
        raise RowError(message, "prompt ends with an answer")
    return Prompt(messages=messages, field=field)


def _names(value: Any, fields: FieldsConfig) -> Names:
    """What a turn calls its speaker and its text."""
    turn = value[0] if isinstance(value, list) and value else value
    is_sharegpt = isinstance(turn, dict) and turn.get(fields.sender) is not None and turn.get(fields.role) is None
    return sharegpt_names(fields) if is_sharegpt else openai_names(fields)


def whole_conversation(value: Any, where: str, prompt: Prompt, fields: FieldsConfig) -> list[Message]:
    """The conversation that ends with an answer. `value` is what follows the prompt, or all of it."""
    if isinstance(value, str) and prompt.is_written_out and is_transcript(value):
        said = transcript(value, where)
    else:
        said = as_turns(value, _names(value, fields), where, "assistant")
    if said[0]["role"] == "assistant":
        if not prompt.messages:
            raise no_prompt(f"{where} begins with an answer, and the row has no prompt")
        said = prompt.messages + said
    else:
        _check_begins_with(prompt, said, where)
    check_end(said, where)
    return said


def _check_begins_with(prompt: Prompt, messages: list[Message], where: str) -> None:
    """A conversation may have a system turn that the prompt lacks."""
    size = len(prompt.messages)
    starts = (0, 1) if messages[0]["role"] == "system" else (0,)
    if not any(messages[start : start + size] == prompt.messages for start in starts):
        raise RowError(
            f"{where} begins with a turn of role {messages[0]['role']}, but not with what {prompt.field!r} "
            "says; mend the row, or set data.fields",
            "prompt differs",
        )


def parting(whole: Sequence[list[Message]], names: Sequence[str]) -> int:
    """Where answers begin: with the assistant turn at, or next before, the first message in which they differ.

    Before it, where tools gave different results to the same call. What a user says is no answer, so a difference there
    means that the prompts differ. `names` are what errors call the conversations.
    """
    place = 0
    while place < min(map(len, whole)) - 1 and all(messages[place] == whole[0][place] for messages in whole):
        place += 1
    roles = {messages[place]["role"] for messages in whole}
    if roles & {"system", "user"}:
        raise RowError(
            f"the conversations differ in message {place + 1}, of role {' and '.join(sorted(roles))}; they must share "
            "the prompt: mend the row",
            "prompts differ",
        )
    while place and any(messages[place]["role"] != "assistant" for messages in whole):
        place -= 1
    if not place:
        raise no_prompt("nothing comes before the answers")
    for messages, where in zip(whole, names, strict=True):
        check_answer(messages[place:], where)
    return place


def check_end(messages: Sequence[Message], where: str) -> None:
    """A conversation ends with an answer."""
    if messages[-1]["role"] != "assistant":
        raise RowError(
            f"{where} ends with a turn of role {messages[-1]['role']}; it must end with the answer: mend the row",
            "no answer",
        )


def check_answer(messages: Sequence[Message], where: str) -> None:
    """An answer begins with an assistant turn, and none of them is empty."""
    role = messages[0]["role"]
    if role != "assistant":
        raise RowError(f"{where}: the answer begins with a turn of role {role}; mend the row", "no answer")
    for message in messages:
        if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise RowError(f"{where}: an empty answer; fill it or remove the row", "empty answer")


def no_prompt(what: str) -> RowError:
    return RowError(f"{what}; add the prompt or set data.fields.prompt", "no prompt")
