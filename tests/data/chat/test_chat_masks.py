"""Tokens and masks of real templates against what is written out by hand, token by token.

In the expectations `«x»` is one special token, everything else a token a letter; True is trained.
"""

import pytest
from written_templates import (
    LLAMA3,
    LLAMA3_SPECIAL,
    MISTRAL,
    MISTRAL_SPECIAL,
    PROMPTS_A_THOUGHT,
    QWEN25,
    QWEN25_SPECIAL,
    TAGGED,
    THINKING,
)

from scale_llm.config.stage import TrainOn
from scale_llm.data.chat.turns import RowError

NO, YES = False, True


def say(*turns: str) -> list[dict]:
    """Messages of `role: content`."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


@pytest.fixture
def llama3(load):
    return load(LLAMA3, LLAMA3_SPECIAL, "<|begin_of_text|>", "<|eot_id|>")


@pytest.fixture
def qwen(load):
    return load(QWEN25, QWEN25_SPECIAL, None, "<|im_end|>", plain=("<tool_call>", "</tool_call>"))


@pytest.fixture
def mistral(load):
    return load(MISTRAL, MISTRAL_SPECIAL, "<s>", "</s>")


@pytest.fixture
def tagged(load):
    return load(TAGGED, QWEN25_SPECIAL, None, "<|im_end|>")


def test_llama3_with_two_turns_and_a_system_prompt(llama3, written):
    encoded = llama3.encode(say("system: Be kind.", "user: Hi", "assistant: Hello ", "user: Bye", "assistant: Ciao"))
    assert written.tokens(llama3, encoded) == written.expected(
        ("«<|begin_of_text|>»«<|start_header_id|>»system«<|end_header_id|>»\n\nBe kind.«<|eot_id|>»", NO),
        ("«<|start_header_id|>»user«<|end_header_id|>»\n\nHi«<|eot_id|>»", NO),
        ("«<|start_header_id|>»assistant«<|end_header_id|>»\n\n", NO),
        ("Hello«<|eot_id|>»", YES),  # the template trims
        ("«<|start_header_id|>»user«<|end_header_id|>»\n\nBye«<|eot_id|>»", NO),
        ("«<|start_header_id|>»assistant«<|end_header_id|>»\n\n", NO),
        ("Ciao«<|eot_id|>»", YES),
    )


def test_qwen_does_not_train_the_newline_behind_a_turn(qwen, written):
    encoded = qwen.encode(say("system: S", "user: Hi", "assistant: Hé\n", "user: Go"))
    assert written.tokens(qwen, encoded) == written.expected(
        ("«<|im_start|>»system\nS«<|im_end|>»\n«<|im_start|>»user\nHi«<|im_end|>»\n«<|im_start|>»assistant\n", NO),
        ("H��\n«<|im_end|>»", YES),  # é is two bytes, each a token that is no letter by itself
        ("\n«<|im_start|>»user\nGo«<|im_end|>»\n", NO),
    )


def test_qwen_adds_its_own_system_prompt_and_it_is_not_trained(qwen, written):
    prompt = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    assert written.tokens(qwen, qwen.encode(say("user: a", "assistant: b"))) == written.expected(
        (f"«<|im_start|>»system\n{prompt}«<|im_end|>»\n«<|im_start|>»user\na«<|im_end|>»\n", NO),
        ("«<|im_start|>»assistant\n", NO),
        ("b«<|im_end|>»", YES),
        ("\n", NO),
    )


def test_qwen_trains_calls_of_tools_and_not_their_results(qwen):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        *say("system: S", "user: 1+1?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        *say("tool: 2", "tool: two", "assistant: It is 2."),
    ]
    encoded = qwen.encode(messages, [{"name": "add"}])
    decode = qwen.tokenizer.decode
    trained = decode([token for token, counts in zip(encoded.tokens, encoded.trained, strict=True) if counts])
    rest = decode([token for token, counts in zip(encoded.tokens, encoded.trained, strict=True) if not counts])
    # The header ends in a newline only where a text follows, so here the call's newline is the prompt's
    assert trained == '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>It is 2.<|im_end|>'
    assert rest == (
        '<|im_start|>system\nS\n\n# Tools\n\n<tools>\n{"name": "add"}\n</tools><|im_end|>\n'
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n\n"
        "<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\ntwo\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n\n"
    )


def test_mistral_ignores_the_generation_prompt(mistral, written):
    encoded = mistral.encode(say("user: Hi", "assistant: Hello", "user: Bye", "assistant: Ciao"))
    assert written.tokens(mistral, encoded) == written.expected(
        ("«<s>»«[INST]» Hi«[/INST]»", NO),
        (" Hello«</s>»", YES),
        ("«[INST]» Bye«[/INST]»", NO),
        (" Ciao«</s>»", YES),
    )


def test_mistral_with_tools(mistral, written):
    messages = [
        *say("user: ?"),
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
        *say("tool: 2", "assistant: two"),
    ]
    assert written.tokens(mistral, mistral.encode(messages)) == written.expected(
        ("«<s>»«[INST]» ?«[/INST]»", NO),
        ('«[TOOL_CALLS]» [{"name": "f"}]«</s>»', YES),
        ('«[TOOL_RESULTS]» {"content": "2"}«[/TOOL_RESULTS]»', NO),
        (" two«</s>»", YES),
    )


def test_mistral_drops_a_system_prompt_that_is_not_next_to_the_last_user_turn(mistral):
    """It renders the prompt only where the user speaks last, so no part of the conversation is a prefix of it."""
    messages = say("system: S", "user: a", "assistant: b")
    with pytest.raises(RowError, match=r"cannot mark the assistant's turn 3 .*; give .*generation.*stage.train_on=all"):
        mistral.encode(messages)
    whole = mistral.encode(messages, train_on=TrainOn.all)
    assert all(whole.trained[1:]) and whole.answers is None


def test_a_conversation_that_the_template_refuses(mistral):
    with pytest.raises(RowError, match="roles must alternate.*; change the row") as caught:
        mistral.encode(say("user: a", "user: b", "assistant: c"))
    assert caught.value.kind == "refused by the chat template"


@pytest.mark.parametrize("name", ["llama3", "qwen", "mistral", "tagged"])
def test_last_assistant_is_the_last_turn_alone(name, request, written):
    template = request.getfixturevalue(name)
    messages = say("user: a", "assistant: first", "user: b", "assistant: second", "user: c")
    both = written.tokens(template, template.encode(messages))
    last = written.tokens(template, template.encode(messages, train_on=TrainOn.last_assistant))
    end = {"llama3": "«<|eot_id|>»", "mistral": "«</s>»"}.get(name, "«<|im_end|>»")
    space = " " if name == "mistral" else ""
    assert "".join(token for token, trained in both if trained) == f"{space}first{end}{space}second{end}"
    assert "".join(token for token, trained in last if trained) == f"{space}second{end}"
    assert [token for token, _ in both] == [token for token, _ in last]


def test_all_is_every_token_but_the_first_of_the_sequence(llama3, qwen):
    messages = say("user: a", "assistant: b")
    encoded = llama3.encode(messages, train_on=TrainOn.all)
    assert encoded.trained == [False] + [True] * (len(encoded.tokens) - 1)
    assert encoded.answers == llama3.encode(messages).trained, "what the assistant wrote is known all the same"
    assert all(qwen.encode(messages, train_on=TrainOn.all).trained)  # has no such token


def test_generation_tags(tagged, written):
    encoded = tagged.encode(say("user: a", "assistant: b\n ", "user: c", "assistant: "))
    assert written.tokens(tagged, encoded) == written.expected(
        ("«<|im_start|>»user\na«<|im_end|>»\n«<|im_start|>»assistant\n", NO),
        ("b\n «<|im_end|>»", YES),
        ("\n«<|im_start|>»user\nc«<|im_end|>»\n«<|im_start|>»assistant\n", NO),
        ("«<|im_end|>»", YES),
        ("\n", NO),
    )


def test_tags_of_a_last_turn_in_two_parts(load, written):
    """Both parts of the last turn count, neither of the first."""
    template = load(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}|"
        "{% generation %}!{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
        ["<e>"],
        None,
        "<e>",
    )
    encoded = template.encode(
        say("user: a", "assistant: b", "user: c", "assistant: d"), train_on=TrainOn.last_assistant
    )
    assert written.tokens(template, encoded) == written.expected(("ab|!c", NO), ("d", YES), ("|", NO), ("!", YES))


@pytest.mark.parametrize("name", ["llama3", "qwen", "mistral", "tagged"])
def test_tokens_are_those_of_transformers(name, request):
    """And its mask, where the template has tags for it."""
    from transformers import PreTrainedTokenizerFast

    template = request.getfixturevalue(name)
    twin = PreTrainedTokenizerFast(tokenizer_file=template.tokenizer.path, **template.special)
    messages = say("user: a b", "assistant: c  d\n", "user:  é", "assistant: e")
    keys = {"chat_template": template.source.text, "return_dict": True, "return_assistant_tokens_mask": True}
    expected = twin.apply_chat_template(messages, tokenize=True, **keys)
    encoded = template.encode(messages)
    assert encoded.tokens == list(expected["input_ids"])
    if name == "tagged":
        assert encoded.trained == [bool(counts) for counts in expected["assistant_masks"]]
    text = twin.apply_chat_template(
        messages[:3], tokenize=False, chat_template=template.source.text, add_generation_prompt=True
    )
    assert template.prompt(messages[:3]) == twin.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    "line",
    [
        "{% macro line(m) %}{{ m.role }}>{% generation %}{{ m.content }}{% endgeneration %}<e>{% endmacro %}"
        "{% for m in messages %}{{ line(m) }}{% endfor %}",
        "{% for m in messages %}{% set line %}{{ m.role }}>{% generation %}{{ m.content }}{% endgeneration %}<e>"
        "{% endset %}{{ line }}{% endfor %}",
    ],
)
def test_tags_whose_place_is_not_known_are_not_believed(load, written, line: str):
    """The tags would give places before the roles; prefixes give the right ones, here with the roles."""
    template = load(line, ["<e>"], None, "<e>")
    assert written.tokens(template, template.encode(say("user: a", "assistant: b"))) == written.expected(
        ("user>a«<e>»", NO), ("assistant>b«<e>»", YES)
    )


def test_a_template_that_rewrites_earlier_turns(load, written):
    template = load(THINKING, QWEN25_SPECIAL, None, "<|im_end|>")
    one = template.encode(say("user: a", "assistant: hm</think>b"))
    assert "".join(token for token, trained in written.tokens(template, one) if trained) == "hm</think>b«<|im_end|>»"
    messages = say("user: a", "assistant: hm</think>b", "user: c", "assistant: hm</think>d")
    with pytest.raises(RowError, match="turn 2 .its rendering changes with what follows"):
        template.encode(messages)
    last = template.encode(messages, train_on=TrainOn.last_assistant)
    assert "".join(token for token, trained in written.tokens(template, last) if trained) == "hm</think>d«<|im_end|>»"


def test_a_generation_prompt_that_turns_do_not_begin_with(load, written):
    template = load(PROMPTS_A_THOUGHT, QWEN25_SPECIAL, None, "<|im_end|>")
    assert written.tokens(template, template.encode(say("user: a", "assistant: b"))) == written.expected(
        ("«<|im_start|>»user\na«<|im_end|>»\n", NO),
        ("«<|im_start|>»assistant\nb«<|im_end|>»", YES),
        ("\n", NO),
    )


def test_prompt_ends_where_the_answer_begins(llama3, mistral, qwen):
    for template in (llama3, mistral, qwen):
        question = say("user: a", "assistant: b", "user: c")
        encoded = template.encode([*question, *say("assistant: d")], train_on=TrainOn.last_assistant)
        assert template.prompt(question) == encoded.tokens[: encoded.trained.index(True)]
