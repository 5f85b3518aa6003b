"""Rows of four forms to one; every fault named with its remedy."""

import json

import pytest

from scale_llm.config.data import ChatFormat, FieldsConfig
from scale_llm.data.chat.conversation import conversation_of, format_of, sharegpt_names
from scale_llm.data.chat.turns import RowError, as_turns, turns
from scale_llm.data.rows import Row

ASKED = [{"role": "user", "content": "Q"}]
BOTH = [*ASKED, {"role": "assistant", "content": "A"}]


def read(values: dict, fields: FieldsConfig | None = None, form: ChatFormat | None = None):
    fields = fields or FieldsConfig()
    return conversation_of(Row(values, "f", 3), form or format_of(values, fields), fields)


@pytest.mark.parametrize(
    "values",
    [
        {"messages": BOTH},
        {"messages": [{"role": "human", "content": "Q"}, {"role": "bot", "content": "A"}]},
        {"prompt": "Q", "response": "A"},
        {"prompt": ASKED, "response": "A", "system": ""},
        {"prompt": ASKED, "response": BOTH[1:]},
        {"prompt": ASKED, "response": BOTH[1]},
        {"instruction": "Q", "input": "", "output": "A"},
        {"instruction": "Q", "output": "A"},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"messages": None, "conversations": [{"from": "user", "value": "Q"}, {"from": "model", "value": "A"}]},
    ],
)
def test_forms(values: dict):
    found = read(values)
    assert (found.messages, found.tools, found.weight, found.file, found.line) == (BOTH, None, 1.0, "f", 3)


def test_fields_are_renamed():
    fields = FieldsConfig(prompt="question", response="answer", system="who", weight="w", role="by", content="text")
    found = read({"question": "Q", "answer": "A", "who": "S", "w": 2}, fields)
    assert found.messages == [{"role": "system", "content": "S"}, *BOTH]
    assert found.weight == 2.0
    fields = FieldsConfig(messages="chat", role="by", content="text")
    assert read({"chat": [{"by": "user", "text": "Q"}, {"by": "gpt", "text": "A"}]}, fields).messages == BOTH
    fields = FieldsConfig(conversations="c", sender="s", value="v")
    assert read({"c": [{"s": "human", "v": "Q"}, {"s": "gpt", "v": "A"}]}, fields).messages == BOTH
    fields = FieldsConfig(instruction="i", input="n", output="o")
    assert read({"i": "Q", "n": "more", "o": "A"}, fields).messages[0]["content"] == "Q\nmore"


def test_roles():
    names = ["system", "human", "function_call", "observation", "function", "ipython", "tool", "gpt"]
    found = read({"conversations": [{"from": name, "value": "x"} for name in names]})
    roles = ["system", "user", "assistant", "tool", "tool", "tool", "tool", "assistant"]
    assert [message["role"] for message in found.messages] == roles


def test_other_fields_of_a_turn_stay_but_do_not_stand_for_its_role_and_content():
    turn = {"from": "gpt", "value": "A", "role": "x", "content": "y", "reasoning_content": "hm"}
    found = read({"conversations": [{"from": "human", "value": "Q"}, turn]})
    assert found.messages[1] == {"role": "assistant", "content": "A", "reasoning_content": "hm"}


def test_calls_of_tools():
    """Arguments as JSON in a string, as OpenAI's interface gives them, become objects; absent fields of Parquet go."""
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    messages = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [call], "name": None}, BOTH[1]]
    found = read({"messages": messages, "tools": json.dumps([{"name": "f"}])})
    assert found.tools == [{"name": "f"}]
    assert found.messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"a": [1]}}}],
    }
    assert call["function"]["arguments"] == '{"a": [1]}'  # the row itself is left as it was
    assert read({"messages": BOTH, "tools": []}).tools is None


def test_the_format_goes_before_the_fields():
    values = {"messages": BOTH, "prompt": "P", "response": "R"}
    assert format_of(values, FieldsConfig()) is ChatFormat.messages
    assert read(values, form=ChatFormat.prompt_response).messages[0]["content"] == "P"


def test_pieces_read_the_sides_of_a_preference():
    """As a reader of pairs will: conversations, chosen and rejected objects; or lists; or strings."""
    names = sharegpt_names(FieldsConfig())
    assert turns([{"from": "human", "value": "Q"}], names, "conversations") == ASKED
    assert as_turns({"from": "gpt", "value": "A"}, names, "chosen", "assistant") == BOTH[1:]
    assert as_turns("A", names, "chosen", "assistant") == BOTH[1:]


def message(role: str = "assistant", content: object = "A", **more: object) -> dict:
    return {"messages": [*ASKED, {"role": role, "content": content, **more}]}


@pytest.mark.parametrize(
    "values, kind, text",
    [
        (
            message("narrator"),
            "unknown role",
            r"messages\[1\]: unknown role 'narrator'; known are system, user, human, ",
        ),
        (message("user"), "no assistant turn", r"no assistant turn \(roles: user\); add one"),
        (message(content=" \n"), "empty assistant turn", "an empty assistant turn; fill it"),
        (message(content=None), "field missing", r"messages\[1\]: field 'content' is missing \(fields: role\); set"),
        (message(content=7), "wrong type", r"messages\[1\].content is a number, not a string; change it"),
        (message(content=[{"type": "text"}]), "wrong type", "content is a list, not a string"),
        (message(role=None), "field missing", r"field 'role' is missing \(fields: content\)"),
        (message(role=1), "wrong type", r"messages\[1\].role is a number, not a string"),
        (message(tool_calls={"a": 1}), "wrong type", r"tool_calls is an object, not a list of objects"),
        (message(content="\ud83d"), "no Unicode text", "half of a surrogate pair; remove the row"),
        (message(content="", tool_calls=[{"name": "\ud83d"}]), "no Unicode text", "half of a surrogate pair"),
        ({"messages": []}, "empty conversation", "field 'messages': an empty conversation; remove"),
        ({"messages": "hi"}, "wrong type", "messages is a string, not a list of objects"),
        ({"messages": ["hi"]}, "wrong type", r"messages\[0\] is a string, not an object"),
        (
            {"prompt": "Q", "answer": "A"},
            "field missing",
            r"'response' is missing \(fields: prompt, answer\); set data",
        ),
        ({"prompt": 1, "response": "A"}, "wrong type", "prompt is a number, not a string or a list"),
        ({"prompt": [], "response": "A"}, "empty conversation", "'prompt'"),
        ({"prompt": "Q", "response": ""}, "empty assistant turn", "empty assistant turn"),
        ({"instruction": "Q", "input": 1, "output": "A"}, "wrong type", "input is a number, not a string"),
        (
            {"instruction": "Q"},
            "field missing",
            "field 'output' is missing .fields: instruction.; set data.fields.output",
        ),
        ({"text": "Q"}, "no such field", r"none of the fields 'messages', .* \(fields: text\); set data.fields and"),
        ({}, "no such field", "fields: none"),
        ({"messages": BOTH, "weight": float("nan")}, "bad weight", "field 'weight' is nan; it must be a finite number"),
        ({"messages": BOTH, "weight": -1}, "bad weight", "is -1"),
        ({"messages": BOTH, "weight": float("inf")}, "bad weight", "is inf"),
        ({"messages": BOTH, "weight": "1"}, "wrong type", "weight is a string, not a number"),
        ({"messages": BOTH, "weight": True}, "wrong type", "weight is true or false, not a number"),
        ({"messages": BOTH, "system": 1}, "wrong type", "system is a number, not a string"),
        ({"messages": BOTH, "tools": "none"}, "wrong type", "tools is a string, not a list of objects, or JSON of one"),
        ({"messages": BOTH, "tools": [1]}, "wrong type", "tools is a list, not a list of objects"),
        (
            {"messages": [{"role": "system", "content": "a"}, *BOTH], "system": "b"},
            "two system prompts",
            "leave one of them out",
        ),
    ],
)
def test_faults(values: dict, kind: str, text: str):
    with pytest.raises(RowError, match=text) as caught:
        read(values)
    assert caught.value.kind == kind
    assert ";" in caught.value.message or ":" in caught.value.message  # a remedy


def test_a_weight_of_nothing_is_fine():
    assert read({"messages": BOTH, "weight": 0}).weight == 0.0
