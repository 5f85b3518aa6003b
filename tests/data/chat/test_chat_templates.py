"""Where templates come from, the built-in one, and templates that fail."""

import json
from pathlib import Path

import pytest
import tokenizers

from scale_llm.config.errors import UserError
from scale_llm.config.stage import TrainOn
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.data.chat.template import ChatTemplate
from scale_llm.data.chat.turns import RowError

ASKED = [{"role": "user", "content": "a"}]
BOTH = [*ASKED, {"role": "assistant", "content": "b"}]
EOD = "<|endoftext|>"
NO, YES = False, True


def loaded(directory: Path, **keys) -> ChatTemplate:
    return ChatTemplate.load(str(directory), TokenizerConfig(path=str(directory), eod_token=EOD, **keys))


def test_the_first_template_that_is_there(make_tokenizer, tmp_path: Path):
    settings = {"chat_template": "from settings"}
    everything = make_tokenizer([EOD], settings, "from file")
    (tmp_path / "mine.jinja").write_text("mine")
    assert loaded(everything, chat_template=str(tmp_path / "mine.jinja")).render(BOTH).text == "mine"
    assert loaded(everything).render(BOTH).text == "from file"
    assert loaded(everything / "tokenizer.json").render(BOTH).text == "from file"
    assert loaded(make_tokenizer([EOD], settings)).render(BOTH).text == "from settings"
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "usual"}]
    assert loaded(make_tokenizer([EOD], {"chat_template": several})).render(BOTH).text == "usual"
    assert loaded(make_tokenizer([EOD])).source.path.endswith("plain.jinja")
    assert loaded(make_tokenizer([EOD], {"chat_template": None})).source.path.endswith("plain.jinja")


@pytest.mark.parametrize(
    "settings, keys, text",
    [
        (
            None,
            {"chat_template": "/no/such.jinja"},
            "tokenizer.chat_template=/no/such.jinja: no such file; give a Jinja",
        ),
        (
            {"chat_template": [{"name": "rag", "template": ""}]},
            {},
            "chat_template has rag and no default; write the one",
        ),
    ],
)
def test_no_template_where_one_is_named(make_tokenizer, settings, keys, text):
    with pytest.raises(UserError, match=text):
        loaded(make_tokenizer([EOD], settings), **keys)


def test_special_tokens_of_the_template(make_tokenizer):
    show = "{{ bos_token }}|{{ eos_token }}"
    directory = make_tokenizer([EOD, "<s>", "<e>"], {"bos_token": {"content": "<s>"}, "eos_token": "<e>"}, show)
    (directory / "special_tokens_map.json").write_text(json.dumps({"bos_token": "no", "pad_token": "<p>"}))
    assert loaded(directory).render(BOTH).text == "<s>|<e>"
    assert loaded(directory).special["pad_token"] == "<p>"
    assert loaded(make_tokenizer([EOD], {"bos_token": None}, show)).render(BOTH).text == f"|{EOD}"


def test_plain_template(make_tokenizer, written):
    template = loaded(make_tokenizer([EOD]))
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": f"a{EOD}"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}, {"name": "g"}]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "b"},
    ]
    assert written.tokens(template, template.encode(messages, [{"name": "f"}])) == written.expected(
        ('<|system|>\nFunctions:\n{"name": "f"}\n', NO),
        (f"<|system|>\nS\n<|user|>\na{EOD}\n<|assistant|>\n", NO),
        ('{"name": "f"}\n{"name": "g"}' + f"«{EOD}»", YES),
        ("\n<|tool|>\n1\n<|assistant|>\n", NO),
        (f"b«{EOD}»", YES),
        ("\n", NO),
    )
    assert template.tokenizer.decode(template.prompt(ASKED)) == "<|user|>\na\n<|assistant|>\n"


def test_plain_template_begins_as_the_base_model_expects(make_tokenizer, written):
    """With its first token, and ends turns with the end of document even where the tokenizer names another token."""
    template = loaded(make_tokenizer([EOD, "<s>", "<e>"], {"bos_token": "<s>", "eos_token": "<e>"}))
    encoded = template.encode(BOTH)
    assert written.tokens(template, encoded) == written.expected(
        ("«<s>»<|user|>\na\n<|assistant|>\n", NO), (f"b«{EOD}»", YES), ("\n", NO)
    )


def test_an_end_of_document_that_is_an_ordinary_token_is_one_token(tmp_path: Path):
    """A vocabulary may hold it without calling it special."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={x: i for i, x in enumerate([*letters, EOD])}, merges=[])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.save(str(tmp_path / "tokenizer.json"))
    encoded = loaded(tmp_path).encode([*ASKED, {"role": "assistant", "content": EOD}])
    assert [token for token, trained in zip(encoded.tokens, encoded.trained, strict=True) if trained].count(256) == 1
    assert sum(encoded.trained) == len(EOD) + 1


def test_words_across_the_border_of_a_span(tmp_path: Path):
    """A token that begins before a turn and ends in it is trained; spaces that offsets leave out are not lost."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=[EOD], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["user: the answer  "] * 50, trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    template = loaded(tmp_path)
    decode = template.tokenizer.decode

    def parts(content: str) -> list[tuple[str, bool]]:
        encoded = template.encode([{"role": "user", "content": content}])
        return [(decode([token]), counts) for token, counts in zip(encoded.tokens, encoded.trained, strict=True)]

    assert parts(" the answer") == [("user", NO), (":", NO), (" ", NO), (" the", YES), (" answer", YES)]
    assert parts(" ") == [("user", NO), (":", NO), ("  ", YES)]


def test_all_needs_no_spans(load):
    template = load("{{ messages[0].content }}", ["<e>"], None, "<e>")
    assert template.encode(BOTH, train_on=TrainOn.all).trained == [True]


@pytest.mark.parametrize("text", ["{% if %}", "{% for x in y %}"])
def test_a_template_that_is_not_jinja_is_no_fault_of_the_row(make_tokenizer, text: str):
    template = loaded(make_tokenizer([EOD], None, text))
    with pytest.raises(UserError, match="chat_template.jinja:1: not a Jinja template") as caught:
        template.encode(BOTH)
    assert not isinstance(caught.value, RowError)


@pytest.mark.parametrize("text", ["{{ messages[9].content + 'x' }}", "{{ messages + 1 }}", "{{ 1 / 0 }}"])
def test_a_template_that_fails(make_tokenizer, text: str):
    with pytest.raises(RowError, match="the chat template refuses the conversation"):
        loaded(make_tokenizer([EOD], None, text)).encode(BOTH)


def test_templates_cannot_reach_python(make_tokenizer):
    with pytest.raises(RowError, match="unsafe|refuses"):
        loaded(make_tokenizer([EOD], None, "{{ messages.__class__.__mro__[1].__subclasses__() }}")).encode(BOTH)


def test_digest(make_tokenizer):
    one = loaded(make_tokenizer([EOD], None, "x"))
    assert one.digest == loaded(make_tokenizer([EOD], None, "x")).digest
    others = [make_tokenizer([EOD], None, "y"), make_tokenizer([EOD], {"bos_token": EOD}, "x"), make_tokenizer([EOD])]
    assert len({one.digest, *(loaded(each).digest for each in others)}) == 4
