"""The turns of a conversation: lists of objects with a speaker and a text, and what can be wrong with them."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from scale_llm.config.errors import UserError
from scale_llm.data.rows import NOT_JSON, encodable

Message = dict[str, Any]
"""role, content, and what else the row gives (tool_calls, name, reasoning_content, ...)."""

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""Names of speakers and what chat templates call them."""


class RowError(UserError):
    """What is wrong with one row, and the remedy; `kind` is what such rows are counted under."""

    def __init__(self, message: str | Sequence[str], kind: str = "bad row"):
        super().__init__(message)
        self.kind = kind

    @property
    def message(self) -> str:
        return self.problems[0]


class Names(NamedTuple):
    """Fields of a turn."""

    role: str
    content: str


def turns(value: Any, names: Names, field: str) -> list[Message]:
    """The turns in a field: a list of objects; no field or an empty list is an error."""
    if not isinstance(value, list):
        raise wrong_type(field, value, "a list of objects")
    if not value:
        raise RowError(f"field {field!r}: an empty conversation; remove the row", "empty conversation")
    return [_turn(each, names, f"{field}[{place}]") for place, each in enumerate(value)]


def as_turns(value: Any, names: Names, field: str, role: str) -> list[Message]:
    """The turns in a field that holds a text (then spoken by `role`), one turn, or a list of them."""
    if isinstance(value, str):
        return [{"role": role, "content": unicode(value, field)}]
    if isinstance(value, dict):
        return [_turn(value, names, field)]
    if isinstance(value, list):
        return turns(value, names, field)
    raise wrong_type(field, value, "a string or a list of objects")


def _turn(value: Any, names: Names, where: str) -> Message:
    if not isinstance(value, dict):
        raise wrong_type(where, value, "an object")
    # Parquet gives every turn every field, absent ones as None
    rest = {key: each for key, each in value.items() if each is not None and key not in names}
    role = _role(value, names, where)
    content = value.get(names.content)
    calls = _tool_calls(rest.pop("tool_calls", None), where)
    if calls and role == "assistant":
        rest["tool_calls"] = calls
        content = "" if content is None else content
    if content is None:
        raise RowError(
            f"{where}: field {names.content!r} is missing ({what_is_there(value)}); set data.fields", "field missing"
        )
    text = string(content, f"{where}.{names.content}")
    return {**unicode_throughout(rest, where), "role": role, "content": text}


def _role(value: dict[str, Any], names: Names, where: str) -> str:
    role = value.get(names.role)
    if role is None:
        raise RowError(
            f"{where}: field {names.role!r} is missing ({what_is_there(value)}); set data.fields", "field missing"
        )
    if not isinstance(role, str):
        raise wrong_type(f"{where}.{names.role}", role, "a string")
    if role not in ROLES:
        raise RowError(f"{where}: unknown role {role!r}; known are {', '.join(ROLES)}: rename it", "unknown role")
    return ROLES[role]


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls with their arguments as objects: templates print them as JSON, and a string would be quoted twice."""
    if not calls and isinstance(calls, list | None):
        return []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise wrong_type(f"{where}.tool_calls", calls, "a list of objects")
    return [_with_parsed_arguments(call) for call in calls]


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_parsed_arguments(call["function"])}
    arguments = parsed(call.get("arguments"))
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def parsed(value: Any) -> Any:
    """The value of JSON in a string; what is none stays as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except NOT_JSON:
        return value


def string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise wrong_type(where, value, "a string")
    return unicode(value, where)


def unicode(value: str, where: str) -> str:
    if not encodable(value):
        raise RowError(f"{where} holds half of a surrogate pair; remove the row", "no Unicode text")
    return value


def unicode_throughout(value: Any, where: str) -> Any:
    """`value`, if all its text is Unicode."""
    if value:
        unicode(json.dumps(value, ensure_ascii=False, default=str), where)
    return value


def wrong_type(where: str, value: Any, wanted: str) -> RowError:
    return RowError(f"{where} is {_kind(value)}, not {wanted}; change it or set data.fields", "wrong type")


def _kind(value: Any) -> str:
    names = {
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        dict: "an object",
        list: "a list",
    }
    return names.get(type(value), type(value).__name__)


def what_is_there(values: dict[str, Any]) -> str:
    return f"fields: {', '.join(key for key, value in values.items() if value is not None) or 'none'}"
