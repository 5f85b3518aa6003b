"""Rows to comparisons: each form, and what can be wrong with each."""

import pytest

from scale_llm.config.data import ChatFormat, FieldsConfig
from scale_llm.data.chat.comparison import Comparison, comparison_of, labelled_of
from scale_llm.data.chat.turns import RowError
from scale_llm.data.rows import Row

USER = {"role": "user", "content": "Q"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
BADDER = {"role": "assistant", "content": "badder"}
PAIR = {"chosen": "good", "rejected": "bad"}
HUMAN = {"from": "human", "value": "Q"}


def read(values: dict, form: str = "auto", unpaired: bool = False, **fields: str) -> Comparison:
    reader = labelled_of if unpaired else comparison_of
    return reader(Row(values, "f", 3), ChatFormat(form), FieldsConfig(**fields))


def refused(values: dict, **keys) -> RowError:
    with pytest.raises(RowError) as caught:
        read(values, **keys)
    return caught.value


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "Q", **PAIR},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": USER, "chosen": GOOD, "rejected": "bad"},
        {"prompt": "Q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},  # UltraFeedback, binarised
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {"instruction": "Q", "input": "", **PAIR},
        {
            "conversations": [HUMAN],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"},
        {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"},
        {"prompt": "Q", "answers": ["good", "bad"]},
        {"prompt": "Q", "responses": ["bad", [GOOD]], "ranks": [2, 1]},
        {"prompt": "Q", "answers": ["bad", "good"], "scores": [-0.5, 3]},
        # messages as of the chosen answer beside: the prompt's field goes first
        {"prompt": "Q", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
    ],
)
def test_every_form_of_a_pair(values: dict):
    found = read(values)
    assert found.prompt == [USER]
    assert [[turn["content"].strip() for turn in answer] for answer in found.answers] == [["good"], ["bad"]]
    assert all(answer[0]["role"] == "assistant" for answer in found.answers)
    assert (found.label, found.margin, found.weight, found.tied, found.file, found.line) == (None, 0, 1, 0, "f", 3)


def test_every_field_has_a_name_of_its_own():
    renamed = {"prompt": "p", "chosen": "c", "rejected": "r", "margin": "m", "weight": "w", "system": "s"}
    found = read({"p": "Q", "c": "good", "r": "bad", "m": 1, "w": 0.5, "s": "S"}, **renamed)
    assert found.prompt == [{"role": "system", "content": "S"}, USER]
    assert found.answers == [[GOOD], [BAD]] and (found.margin, found.weight) == (1.0, 0.5)
    for order in ({"ranks": "o"}, {"scores": "o"}):
        found = read({"p": "Q", "l": ["good", "bad"], "o": [7, 8]}, prompt="p", answers="l", **order)
        assert found.answers == ([[GOOD], [BAD]] if "ranks" in order else [[BAD], [GOOD]])
    found = read({"p": "Q", "a": "bad", "y": False}, unpaired=True, prompt="p", completion="a", label="y")
    assert found.answers == [[BAD]] and found.label is False
    found = read({"t": [{"who": "user", "says": "Q"}], **PAIR}, conversations="t", sender="who", value="says")
    assert found.prompt == [USER]


def test_the_prompt_is_what_conversations_begin_with_alike():
    system = {"role": "system", "content": "S"}
    start = [system, USER, BADDER, USER]
    found = read({"chosen": [*start, GOOD], "rejected": [*start, BAD]})
    assert found.prompt == start and found.answers == [[GOOD], [BAD]]
    found = read({"prompt": "Q", "chosen": [system, USER, GOOD], "rejected": [system, USER, BAD]})
    assert found.prompt == [system, USER]
    longer = read({"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD]})
    assert longer.answers == [[GOOD, USER, GOOD], [BAD]]
    shorter = read({"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]})
    assert shorter.prompt == [USER] and shorter.answers == [[GOOD], [GOOD, USER, BAD]]


def test_the_same_conversation_twice_leaves_an_answer():
    """For the encoder, which counts them."""
    found = read({"chosen": [USER, GOOD], "rejected": [USER, GOOD]})
    assert found.prompt == [USER] and found.answers == [[GOOD], [GOOD]]


def test_an_answer_may_use_tools():
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    results = [{"role": "tool", "content": text} for text in "12"]
    tool = {"name": "f"}
    values = {"chosen": [USER, call, results[0], GOOD], "rejected": [USER, call, results[1], BAD], "tools": [tool]}
    found = read(values)
    assert found.prompt == [USER] and found.tools == [tool]
    assert [len(answer) for answer in found.answers] == [3, 3]
    found = read({**values, "rejected": [USER, call, results[0], BAD]})
    assert found.prompt == [USER, call, results[0]] and found.answers == [[GOOD], [BAD]]


def test_transcripts():
    text = "\n\nHuman: Q\n\n2\n\nAssistant: a: b\n\nHuman:\n\nAssistant: "
    found = read({"chosen": text + "good", "rejected": text + "bad"})
    assert found.prompt == [
        {"role": "user", "content": "Q\n\n2"},
        {"role": "assistant", "content": "a: b"},
        {"role": "user", "content": ""},
    ]
    assert found.answers == [[GOOD], [BAD]]
    # Who asks about a transcript has not written one
    asked = "Human: hi\n\nAssistant: hello\n\nWho spoke?"
    found = read({"prompt": asked, "chosen": asked, "rejected": "bad"})
    assert found.prompt[0]["content"] == found.answers[0][0]["content"] == asked


def test_lists_are_in_order_of_rank_or_score():
    answers = ["bad", "good", "badder"]
    for order in ({"ranks": [2, 1, 3]}, {"scores": [0, 0.5, -1]}, {"ranks": [2, 1, 3], "scores": [0, -1, 1]}):
        assert read({"prompt": "Q", "answers": answers, **order}).answers == [[GOOD], [BAD], [BADDER]]
    assert read({"prompt": "Q", "answers": answers}).answers == [[BAD], [GOOD], [BADDER]]


def test_of_answers_that_tie_the_first_stays():
    found = read({"prompt": "Q", "answers": ["bad", "good", "badder"], "scores": [1, 2, 1]})
    assert found.answers == [[GOOD], [BAD]] and found.tied == 1
    found = read({"prompt": "Q", "answers": ["bad", "good"], "ranks": [1, 1]})
    assert len(found.answers) == 1 and found.tied == 1


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "Q", "completion": "good", "label": True},
        {"prompt": [USER], "completion": [GOOD], "label": 1},
        {"prompt": "Q", "completion": [USER, GOOD], "label": True},
        {"completion": [USER, GOOD], "label": True},
        {"messages": [USER, GOOD], "label": True},
        {"conversations": [HUMAN, {"from": "gpt", "value": "good"}], "label": True},
        {"prompt": "Q", "response": "good", "label": True},
        {"instruction": "Q", "output": "good", "label": True},
        {"prompt": "\n\nHuman: Q\n\nAssistant:", "completion": " good", "label": True},
    ],
)
def test_every_form_of_an_unpaired_row(values: dict):
    found = read(values, unpaired=True)
    assert found.prompt == [USER] and found.label is True
    assert [turn["content"].strip() for turn in found.answers[0]] == ["good"] and len(found.answers) == 1


def test_an_unpaired_answer_begins_behind_the_prompt():
    found = read({"prompt": "Q", "completion": [USER, BAD, USER, GOOD], "label": False, "system": "S"}, unpaired=True)
    assert found.prompt == [{"role": "system", "content": "S"}, USER] and found.answers == [[BAD, USER, GOOD]]
    found = read({"messages": [USER, BAD, USER, GOOD], "label": False}, unpaired=True)
    assert found.prompt == [USER, BAD, USER] and found.answers == [[GOOD]]


@pytest.mark.parametrize(
    "values, message, kind",
    [
        ({"prompt": "Q"}, "neither 'chosen' and 'rejected' nor 'answers' (fields: prompt); set", "no such field"),
        ({"prompt": "Q", "chosen": "a"}, "field 'rejected' is missing (fields: prompt, chosen); set", "field missing"),
        ({"prompt": "Q", "chosen": "a", "rejected": " "}, "rejected: an empty answer; fill it", "empty answer"),
        ({"prompt": "Q", "chosen": "", "rejected": ""}, "chosen: an empty answer; fill it", "empty answer"),
        ({"prompt": "Q", "chosen": [], "rejected": "a"}, "empty conversation; remove", "empty conversation"),
        ({"prompt": "Q", "chosen": 1, "rejected": "a"}, "chosen is a number, not a string or a list", "wrong type"),
        (PAIR, "chosen begins with an answer, and the row has no prompt; add", "no prompt"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "has no prompt; add the prompt or set data.fields.prompt", "no prompt"),
        (
            {"prompt": "Q", "chosen": [USER], "rejected": [USER, BAD]},
            "chosen ends with a turn of role user",
            "no answer",
        ),
        (
            {"prompt": "P", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "chosen begins with a turn of role user, but not with what 'prompt' says; mend",
            "prompt differs",
        ),
        (
            {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "P"}, BAD]},
            "the conversations differ in message 1, of role user; they must share the prompt",
            "prompts differ",
        ),
        (
            {"prompt": "Q", "chosen": [GOOD, USER, GOOD], "rejected": [GOOD, {**USER, "content": "P"}, BAD]},
            "the conversations differ in message 3, of role user",
            "prompts differ",
        ),
        (
            {"prompt": [USER, BAD], **PAIR},
            "'prompt' ends with an assistant turn; the prompt",
            "prompt ends with an answer",
        ),
        ({"prompt": "Q", **PAIR, "margin": "1"}, "margin is a string, not a number", "wrong type"),
        ({"prompt": "Q", **PAIR, "margin": float("nan")}, "margin is nan; it must be a finite", "bad number"),
        ({"prompt": "Q", **PAIR, "weight": -1}, "'weight' is -1; it must", "bad weight"),
        ({"prompt": "Q", "answers": "a"}, "answers is a string, not a list of answers", "wrong type"),
        ({"prompt": "Q", "answers": ["a"]}, "'answers' has 1 of the two or more answers", "too few answers"),
        ({"prompt": "Q", "answers": ["a", ""]}, "answers[1]: an empty answer", "empty answer"),
        (
            {"prompt": "Q", "answers": ["a", "b"], "ranks": [1]},
            "'ranks' has 1 numbers for 2 of",
            "wrong number of ranks",
        ),
        ({"prompt": "Q", "answers": ["a", "b"], "ranks": [1, True]}, "ranks[1] is true or false, not", "wrong type"),
        ({"prompt": "Q", "answers": ["a", "b"], "scores": 1}, "scores is a number, not a list of", "wrong type"),
        (
            {"prompt": "Q", "completion": "a", "label": True},
            "an unpaired row (fields: prompt, completion,",
            "an unpaired row",
        ),
        ({"chosen": "\n\nHuman: a\ud800\n\nAssistant: b", "rejected": "x"}, "surrogate pair", "no Unicode text"),
    ],
)
def test_rows_that_are_no_comparison(values: dict, message: str, kind: str):
    error = refused(values)
    assert message in error.message and error.kind == kind


@pytest.mark.parametrize(
    "values, message, kind",
    [
        ({"prompt": "Q", "label": True}, "field 'completion' is missing (fields: prompt, label); set", "field missing"),
        ({"prompt": "Q", "completion": "a"}, "field 'label' is missing (fields: prompt, completion)", "field missing"),
        ({"prompt": "Q", "completion": "a", "label": "yes"}, "label is a string, not true or false", "wrong type"),
        ({"prompt": "Q", "completion": "a", "label": 2}, "label is a number, not true or false", "wrong type"),
        ({"prompt": "Q", "completion": " ", "label": 0}, "completion: an empty answer", "empty answer"),
        ({"messages": [USER], "label": 0}, "the conversation ends with a turn of role user", "no answer"),
        ({"messages": [GOOD], "label": 0}, "nothing comes before the answer; add the prompt", "no prompt"),
        ({"completion": "a", "label": 0}, "completion begins with an answer, and the row has no", "no prompt"),
        ({"prompt": "Q", **PAIR}, "a pair (fields: prompt, chosen, rejected); rows of an unpaired", "a pair"),
        (
            {"prompt": "Q", "completion": [USER, USER, GOOD], "label": 0},
            "the answer begins with a turn of",
            "no answer",
        ),
    ],
)
def test_rows_that_are_no_unpaired_answer(values: dict, message: str, kind: str):
    error = refused(values, unpaired=True)
    assert message in error.message and error.kind == kind


def test_the_format_says_where_the_prompt_is():
    values = {"prompt": "Q", "instruction": "I", **PAIR}
    assert read(values).prompt[0]["content"] == "Q"
    assert read(values, "alpaca").prompt[0]["content"] == "I"
    assert "set data.fields.conversations" in refused(values, form="sharegpt").message
