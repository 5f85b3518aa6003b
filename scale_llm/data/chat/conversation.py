"""Rows to conversations: messages, prompt and response, Alpaca, ShareGPT.

Pure functions. A row that is no conversation raises `RowError`; who reads the rows knows what to do with it. The pieces
(`turns`, `as_turns`, `conversation_weight`, ...) are of use to readers of other rows that hold turns, such as pairs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scale_llm.config.data import ChatFormat, FieldsConfig
from scale_llm.data.chat.turns import (
    Message,
    Names,
    RowError,
    as_turns,
    parsed,
    string,
    turns,
    unicode,
    unicode_throughout,
    what_is_there,
    wrong_type,
)
from scale_llm.data.rows import Row


@dataclass(kw_only=True, slots=True)
class Conversation:
    messages: list[Message]
    """With canonical roles: system, user, assistant, tool."""
    tools: list[dict[str, Any]] | None = None
    """Descriptions of functions, for the chat template."""
    weight: float = 1.0
    """What the loss of the conversation is multiplied by."""
    file: str = ""
    line: int = 0


def openai_names(fields: FieldsConfig) -> Names:
    return Names(fields.role, fields.content)


def sharegpt_names(fields: FieldsConfig) -> Names:
    return Names(fields.sender, fields.value)


def format_of(values: dict[str, Any], fields: FieldsConfig) -> ChatFormat:
    """The form of a row, by the fields that it has."""
    signs = {
        ChatFormat.messages: fields.messages,
        ChatFormat.sharegpt: fields.conversations,
        ChatFormat.prompt_response: fields.prompt,
        ChatFormat.alpaca: fields.instruction,
    }
    for form, name in signs.items():
        if values.get(name) is not None:
            return form
    wanted = ", ".join(repr(name) for name in signs.values())
    raise RowError(
        f"none of the fields {wanted} ({what_is_there(values)}); set data.fields and data.format", "no such field"
    )


def conversation_of(row: Row, form: ChatFormat, fields: FieldsConfig) -> Conversation:
    """The conversation that a row holds.

    Args:
        form: not auto; see `format_of`.

    Raises:
        RowError: without file and line, which the caller knows.
    """
    messages = with_system(READERS[form](row.values, fields), row.values, fields)
    check_assistant(messages)
    return Conversation(
        messages=messages,
        tools=conversation_tools(row.values, fields),
        weight=conversation_weight(row.values, fields),
        file=row.file,
        line=row.line,
    )


def present(values: dict[str, Any], field: str, key: str) -> Any:
    """The value of a field that must be there; `key` is the part of data.fields that names it."""
    value = values.get(field)
    if value is None:
        raise RowError(f"field {field!r} is missing ({what_is_there(values)}); set data.fields.{key}", "field missing")
    return value


def with_system(messages: list[Message], values: dict[str, Any], fields: FieldsConfig) -> list[Message]:
    """`messages` after the system prompt of the row, if it has one outside of them."""
    system = values.get(fields.system)
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise wrong_type(fields.system, system, "a string")
    if messages[0]["role"] == "system":
        raise RowError(f"a system turn and a field {fields.system!r}; leave one of them out", "two system prompts")
    return [{"role": "system", "content": unicode(system, fields.system)}, *messages]


def conversation_tools(values: dict[str, Any], fields: FieldsConfig) -> list[dict[str, Any]] | None:
    """Descriptions of functions: a list of objects, or that as JSON in a string (Parquet holds it so)."""
    tools = values.get(fields.tools)
    if isinstance(tools, str) and tools.strip():
        tools = parsed(tools)
    if not tools and isinstance(tools, list | str | None):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise wrong_type(fields.tools, tools, "a list of objects, or JSON of one")
    return unicode_throughout(tools, fields.tools)


def conversation_weight(values: dict[str, Any], fields: FieldsConfig) -> float:
    weight = values.get(fields.weight)
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise wrong_type(fields.weight, weight, "a number")
    if not math.isfinite(weight) or weight < 0:
        raise RowError(
            f"field {fields.weight!r} is {weight}; it must be a finite number, 0 or more: change it", "bad weight"
        )
    return float(weight)


def alpaca_question(values: dict[str, Any], fields: FieldsConfig) -> Message:
    """The input, if any, follows the instruction on a line of its own."""
    question = string(present(values, fields.instruction, "instruction"), fields.instruction)
    given = values.get(fields.input)
    if given is not None and given != "":
        question = f"{question}\n{string(given, fields.input)}"
    return {"role": "user", "content": question}


def check_assistant(messages: Sequence[Message]) -> None:
    """Somebody must answer, and say something."""
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise RowError(f"no assistant turn (roles: {roles}); add one or remove the row", "no assistant turn")
    for message in answers:
        if not message["content"].strip() and not message.get("tool_calls"):
            raise RowError("an empty assistant turn; fill it or remove the row", "empty assistant turn")


def _from_messages(values: dict[str, Any], fields: FieldsConfig) -> list[Message]:
    return turns(present(values, fields.messages, "messages"), openai_names(fields), fields.messages)


def _from_prompt(values: dict[str, Any], fields: FieldsConfig) -> list[Message]:
    names = openai_names(fields)
    asked = as_turns(present(values, fields.prompt, "prompt"), names, fields.prompt, "user")
    return asked + as_turns(present(values, fields.response, "response"), names, fields.response, "assistant")


def _from_alpaca(values: dict[str, Any], fields: FieldsConfig) -> list[Message]:
    question = alpaca_question(values, fields)
    answer = string(present(values, fields.output, "output"), fields.output)
    return [question, {"role": "assistant", "content": answer}]


def _from_sharegpt(values: dict[str, Any], fields: FieldsConfig) -> list[Message]:
    """A function_call is an assistant turn with the call as its text."""
    value = present(values, fields.conversations, "conversations")
    return turns(value, sharegpt_names(fields), fields.conversations)


READERS = {
    ChatFormat.messages: _from_messages,
    ChatFormat.prompt_response: _from_prompt,
    ChatFormat.alpaca: _from_alpaca,
    ChatFormat.sharegpt: _from_sharegpt,
}
