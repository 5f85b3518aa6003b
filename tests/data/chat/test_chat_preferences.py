"""Comparisons on disk: what is in them, policies, the cache, the embedded pairs, real ones."""

import json
import subprocess
import sys
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers

from scale_llm.config.data import BadRow, DataConfig, FieldsConfig, TooLong
from scale_llm.config.errors import UserError
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.data.chat import preferences, writing
from scale_llm.data.chat.embedded import embedded_comparisons, embedded_conversations
from scale_llm.data.chat.examples import split_indices
from scale_llm.data.chat.prepared import load_prepared
from scale_llm.data.corpus import embedded_files
from scale_llm.data.tokenizer import Tokenizer

EOD = "<|endoftext|>"
HEAD = "<|user|>\nQ\n<|assistant|>\n"
PAIR = {"prompt": "Q", "chosen": "AB", "rejected": "C"}
KTO = [{"prompt": "Q", "completion": "A", "label": True}, {"prompt": "Q", "completion": "B", "label": False}]
SHAREGPT = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "preference_sharegpt_en.json"


@pytest.fixture
def tokenizer(make_tokenizer) -> TokenizerConfig:
    return TokenizerConfig(path=str(make_tokenizer([EOD])), eod_token=EOD)


@pytest.fixture
def prepared(tokenizer: TokenizerConfig, tmp_path: Path):
    """prepared(data, **changes) -> PreparedPreferences."""

    def make(data: DataConfig, **keys):
        keys = {"kind": "pairs", "seq_length": 100, "cache_dir": tmp_path / "cache", **keys}
        return preferences.prepare_preferences(data, tokenizer, **keys)

    return make


def write(file: Path, *rows: object) -> str:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(file)


def texts(found: preferences.Preferences, tokenizer: TokenizerConfig) -> list[list[tuple[str, str]]]:
    """For each comparison, (prompt, what counts) of its sequences."""
    decode = Tokenizer.load(tokenizer.path, EOD).decode
    examples = [[found.sequences[place] for place in found.members(index)] for index in range(len(found))]
    return [
        [(decode(each.tokens[: each.trained.argmax()]), decode(each.tokens[each.trained])) for each in group]
        for group in examples
    ]


def test_arrays(prepared, tokenizer, tmp_path: Path):
    ranked = {"prompt": "Q", "answers": ["A", "BB", "CCC"], "scores": [1, 3, 2], "weight": 0.5}
    file = write(tmp_path / "a.jsonl", {**PAIR, "margin": 0.25}, "", ranked)
    ready = prepared(DataConfig(path=file))
    found = preferences.load_preferences(ready)
    assert texts(found, tokenizer) == [
        [(HEAD, f"AB{EOD}"), (HEAD, f"C{EOD}")],
        [(HEAD, f"BB{EOD}"), (HEAD, f"CCC{EOD}"), (HEAD, f"A{EOD}")],
    ]
    assert len(found) == 2 and len(found.sequences) == 5
    assert list(found.groups) == [0, 2, 5] and found.groups.dtype == numpy.int64
    assert list(found.margins) == [0.25, 0] and found.margins.dtype == numpy.float32
    assert found.labels is None
    assert list(found.sequences.lengths) == [29, 28, 29, 30, 28]
    assert [each.weight for each in found.sequences] == [1, 1, 0.5, 0.5, 0.5]
    assert [found.where(place) for place in (0, 1)] == [f"{file}:1", f"{file}:3"]
    assert (ready.num_comparisons, ready.num_sequences, ready.num_tokens, ready.num_trained) == (2, 5, 144, 14)
    assert (ready.kind, ready.eod, ready.vocab_size) == ("pairs", 256, 257)
    assert ready.report == json.loads((Path(ready.path).parent / "report.json").read_text())
    assert preferences.preference_lines(ready.report) == [
        "2 comparisons of 2 rows: 5 sequences, 144 tokens, 14 of them in answers; longest 30, mean 28.8",
        "chosen: 2, mean 3.0 tokens; rejected: 3, mean 2.7",
    ]
    assert load_prepared(preferences.PreparedPreferences, Path(ready.path).parent) == ready
    for place in (-1, 2):
        with pytest.raises(IndexError):
            found.where(place)


def test_token_by_token(load, tmp_path: Path):
    """The header of an answer belongs to the prompt; its end of turn counts, the line break behind it does not."""
    text = (
        "{% for message in messages %}<|im_start|>{{ message.role }}:{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    special = ["<|im_start|>", "<|im_end|>"]
    template = load(text, special, None, "<|im_end|>")
    config = TokenizerConfig(path=template.tokenizer.path, eod_token="<|im_end|>")
    row = {"prompt": "Q", "chosen": "a<|im_end|>", "rejected": "ab"}
    ready = preferences.prepare_preferences(
        DataConfig(path=write(tmp_path / "a.jsonl", row)), config, kind="pairs", seq_length=99, cache_dir=tmp_path
    )
    found = preferences.load_preferences(ready)
    encode = template.tokenizer.encode
    prompt = encode("<|im_start|>user:Q<|im_end|>\n<|im_start|>assistant:", special=True)
    answers = [encode("a<|im_end|>") + encode("<|im_end|>\n", special=True), encode("ab<|im_end|>\n", special=True)]
    for place, answer in enumerate(answers):
        example = found.sequences[place]
        assert list(example.tokens) == prompt + answer
        assert list(example.trained) == [False] * len(prompt) + [True] * (len(answer) - 1) + [False]


def test_all_turns_of_an_answer_count(prepared, tokenizer, tmp_path: Path):
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    other = [turns[0], {"role": "assistant", "content": "B"}]
    file = write(tmp_path / "a.jsonl", {"chosen": turns + turns, "rejected": other + turns})
    found = texts(preferences.load_preferences(prepared(DataConfig(path=file))), tokenizer)
    assert found == [[(HEAD, f"A{EOD}A{EOD}"), (HEAD, f"B{EOD}A{EOD}")]]


def test_a_token_across_the_border_counts_in_both(make_tokenizer, tmp_path: Path):
    """Here ":" and "x" make one token. The prompt that both share ends before it, and in both the text after that
    counts, so the two are compared on the same condition."""
    text = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    directory = make_tokenizer([EOD], None, text)
    settings = json.loads((directory / "tokenizer.json").read_text())
    settings["pre_tokenizer"]["use_regex"] = False  # else punctuation and letters stay apart
    settings["model"]["vocab"][":x"] = 300
    settings["model"]["merges"] = [[":", "x"]]
    (directory / "tokenizer.json").write_text(json.dumps(settings))
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    file = write(tmp_path / "a.jsonl", {"prompt": "Q", "chosen": "xy", "rejected": "y"})
    ready = preferences.prepare_preferences(
        DataConfig(path=file),
        TokenizerConfig(path=str(directory), eod_token=EOD),
        kind="pairs", seq_length=99, cache_dir=tmp_path,
    )  # fmt: skip
    sequences = preferences.load_preferences(ready).sequences
    tokens = [[backend.id_to_token(token) for token in each.tokens] for each in sequences]
    assert tokens == [["u", ":", "Q", "a", ":x", "y"], ["u", ":", "Q", "a", ":", "y"]]
    assert [list(each.trained) for each in sequences] == [[False] * 4 + [True] * 2] * 2


def test_a_template_must_write_the_same_prompt(make_tokenizer, tmp_path: Path):
    text = (
        "{{ messages[-1].content[0] }}{% if messages[-1].role == 'assistant' %}{% generation %}"
        "{{ messages[-1].content }}{% endgeneration %}{% endif %}"
    )
    config = TokenizerConfig(path=str(make_tokenizer([EOD], None, text)), eod_token=EOD)
    data = DataConfig(path=write(tmp_path / "a.jsonl", {**PAIR, "rejected": "AC"}, PAIR))
    keys = {"kind": "pairs", "seq_length": 99, "cache_dir": tmp_path}
    with pytest.raises(UserError, match="a.jsonl:2: the chat template writes the prompt otherwise .*; give another"):
        preferences.prepare_preferences(data, config, **keys)
    data.on_bad_row = BadRow.drop
    report = preferences.prepare_preferences(data, config, **keys).report
    assert (report["kept"], report["dropped"]) == (1, {"prompts differ": 1})


def test_answers_may_hold_any_character(prepared, tokenizer, tmp_path: Path):
    """A special token's text in the prompt is protected by a character that depends on the answer."""
    file = write(tmp_path / "a.jsonl", {"prompt": EOD, "chosen": "\U000f0000", "rejected": EOD})
    (group,) = texts(preferences.load_preferences(prepared(DataConfig(path=file))), tokenizer)
    prompt = HEAD.replace("Q", EOD)
    assert group == [(prompt, f"\U000f0000{EOD}"), (prompt, f"{EOD}{EOD}")]


def test_an_answer_that_cannot_be_marked_has_a_remedy_of_this_stage(make_tokenizer, tmp_path: Path):
    text = "{{ messages | length }}{{ messages[-1].content }}"
    config = TokenizerConfig(path=str(make_tokenizer([EOD], None, text)), eod_token=EOD)
    data = DataConfig(path=write(tmp_path / "a.jsonl", PAIR))
    with pytest.raises(UserError, match="cannot mark") as caught:
        preferences.prepare_preferences(data, config, kind="pairs", seq_length=99, cache_dir=tmp_path)
    assert caught.value.problems[0].endswith("with {% generation %} tags")


ROWS = [
    PAIR,
    "not json",
    {"prompt": "Q", "chosen": "A"},
    {**PAIR, "rejected": "AB"},
    {**PAIR, "rejected": " "},
    {**PAIR, "margin": "x"},
]


def test_bad_rows_are_an_error_that_lists_them(prepared, tmp_path: Path):
    """Answers that are the same are none."""
    file = write(tmp_path / "a.jsonl", *ROWS)
    with pytest.raises(UserError) as caught:
        prepared(DataConfig(path=file))
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [f"{file}:{n}" for n in (2, 3, 5, 6)]
    assert not list((tmp_path / "cache").rglob("tokens.bin"))


def test_bad_rows_are_dropped_and_counted(prepared, tmp_path: Path):
    report = prepared(DataConfig(path=write(tmp_path / "a.jsonl", *ROWS), on_bad_row=BadRow.drop)).report
    assert (report["rows"], report["kept"], report["answers"]) == (6, 1, 2)
    assert report["dropped"] == {
        "not JSON": 1, "field missing": 1, "equal answers": 1, "empty answer": 1, "wrong type": 1,
    }  # fmt: skip


@pytest.mark.parametrize("policy", BadRow)
def test_equal_answers_are_always_dropped(prepared, tokenizer, tmp_path: Path, policy: BadRow):
    """Those that the template makes equal too; of longer lists the ones that repeat a better one."""
    ranked = {"prompt": "Q", "answers": ["A", "B", "A", "C"], "ranks": [1, 2, 3, 2]}
    tied = {"prompt": "Q", "answers": ["A", "B"], "scores": [1, 1]}
    trimmed = {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: A "}
    file = write(tmp_path / "a.jsonl", {**PAIR, "rejected": "AB"}, ranked, tied, trimmed)
    ready = prepared(DataConfig(path=file, on_bad_row=policy))
    assert texts(preferences.load_preferences(ready), tokenizer) == [[(HEAD, f"A{EOD}"), (HEAD, f"B{EOD}")]]
    assert ready.report["dropped"] == {"equal answers": 3} and ready.report["left_out"] == 2
    first = ready.report["first_dropped"]["equal answers"]
    assert [each.split(": ")[0] for each in first] == [f"{file}:{line}" for line in (1, 3, 4)]
    lines = preferences.preference_lines(ready.report)
    assert "answers left out, as good as or the same as a better one: 2" in lines
    assert lines[-1].startswith(f"dropped, equal answers: 3, first {file}:1: all answers are the same")


LONG = [
    PAIR,
    {"prompt": "Q", "chosen": "A" * 9, "rejected": "A" * 8 + "B"},
    {"prompt": "Q", "chosen": "A", "rejected": "BCDEF"},
    {"prompt": "Q" * 5, "chosen": "A", "rejected": "B"},
    {"prompt": "Q" * 4, "chosen": "A", "rejected": "B"},
]


def test_too_long_answers_are_cut_off(prepared, tokenizer, tmp_path: Path):
    """A prompt of all 29 tokens leaves no room; one of 28 leaves a token of each answer."""
    file = write(tmp_path / "a.jsonl", *LONG)
    ready = prepared(DataConfig(path=file), seq_length=29)
    found = preferences.load_preferences(ready)
    assert texts(found, tokenizer) == [
        [(HEAD, f"AB{EOD}"), (HEAD, f"C{EOD}")],
        [(HEAD, f"A{EOD}"), (HEAD, "BCDE")],
        [(HEAD.replace("Q", "QQQQ"), "A"), (HEAD.replace("Q", "QQQQ"), "B")],
    ]
    assert found.sequences.lengths.max() == 29 == ready.report["longest"]
    assert ready.report["truncated"] == 2
    assert ready.report["dropped"] == {"equal within length": 1, "prompt fills the sequence": 1}
    first = ready.report["first_dropped"]["prompt fills the sequence"][0]
    assert first.startswith(
        f"{file}:4: 32 tokens are more than the 29 that model.seq_length allows, and the prompt fills it with 29;"
    )
    lines = preferences.preference_lines(ready.report)
    assert any(line.startswith(f"cut off at model.seq_length: 2, first {file}:") for line in lines)


def test_too_long_pairs_are_dropped_or_an_error(prepared, tmp_path: Path):
    file = write(tmp_path / "a.jsonl", *LONG)
    report = prepared(DataConfig(path=file, on_too_long=TooLong.drop), seq_length=29).report
    assert (report["kept"], report["dropped"]) == (1, {"too long": 4})
    for policy in BadRow:
        with pytest.raises(UserError) as caught:
            prepared(DataConfig(path=file, on_too_long=TooLong.fail, on_bad_row=policy), seq_length=29)
        assert [problem.split(": ")[0] for problem in caught.value.problems] == [f"{file}:{n}" for n in (2, 3, 4, 5)]
        assert "set data.on_too_long=truncate or drop" in caught.value.problems[0]


def test_no_usable_row(prepared, tmp_path: Path):
    file = write(tmp_path / "a.jsonl", {**PAIR, "rejected": "AB"})
    with pytest.raises(UserError, match="no usable row; dropped, equal answers: 1, first .*a.jsonl:1: all answers"):
        prepared(DataConfig(path=file))


def test_an_unpaired_set(prepared, tokenizer, tmp_path: Path):
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "CCC"}]
    file = write(tmp_path / "a.jsonl", *KTO, {"messages": messages, "label": True, "weight": 2})
    ready = prepared(DataConfig(path=file), kind="unpaired")
    found = preferences.load_preferences(ready)
    assert texts(found, tokenizer) == [[(HEAD, f"{answer}{EOD}")] for answer in ("A", "B", "CCC")]
    assert list(found.labels) == [1, 0, 1] and found.labels.dtype == numpy.uint8
    assert list(found.groups) == [0, 1, 2, 3] and found.sequences[2].weight == 2
    assert preferences.preference_lines(ready.report) == [
        "3 unpaired answers of 3 rows: 3 sequences, 86 tokens, 8 of them in answers; longest 30, mean 28.7",
        "desirable: 2, mean 3.0 tokens; undesirable: 1, mean 2.0",
    ]


@pytest.mark.parametrize("label", [True, False])
def test_unpaired_answers_of_one_class(prepared, tmp_path: Path, label: bool):
    file = write(tmp_path / "a.jsonl", *[{**row, "ok": label, "label": None} for row in KTO])
    there, other = ("desirable (ok=true)", "undesirable (ok=false)")[:: 1 if label else -1]
    with pytest.raises(UserError) as caught:
        prepared(DataConfig(path=file, fields=FieldsConfig(label="ok")), kind="unpaired")
    (problem,) = caught.value.problems
    assert f"all 2 answers are {there}; an unpaired loss such as KTO needs {other} ones too" in problem


def test_each_kind_refuses_the_others_rows(prepared, tmp_path: Path):
    with pytest.raises(UserError, match="a.jsonl:1: a pair .*choose a loss of pairs"):
        prepared(DataConfig(path=write(tmp_path / "a.jsonl", PAIR)), kind="unpaired")
    with pytest.raises(UserError, match="b.jsonl:2: an unpaired row .*choose an unpaired loss such as KTO"):
        prepared(DataConfig(path=write(tmp_path / "b.jsonl", *KTO)))


def test_same_comparisons_from_every_kind_of_file(prepared, tokenizer, tmp_path: Path):
    """Each row has its form; Parquet gives every row every field."""
    rows = [{"prompt": "Q", "answers": None, "chosen": "A", "rejected": "B"},
            {"prompt": "Q", "answers": ["C", "D", "E"], "chosen": None, "rejected": None}]  # fmt: skip
    kinds = [write(tmp_path / "a.jsonl", *rows), str(tmp_path / "b.json"), str(tmp_path / "c.parquet")]
    Path(kinds[1]).write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), kinds[2])
    first, *others = [texts(preferences.load_preferences(prepared(DataConfig(path=kind))), tokenizer) for kind in kinds]
    assert [len(group) for group in first] == [2, 3] and all(other == first for other in others)
    together = preferences.load_preferences(prepared(DataConfig(path=kinds)))
    assert texts(together, tokenizer) == first * 3 and together.where(5) == f"{kinds[2]}:2"


def test_batches_do_not_change_the_order(prepared, tokenizer, tmp_path: Path, monkeypatch):
    rows = [{"prompt": f"{n}{EOD * (n % 3 == 0)}", "chosen": f"{n}{EOD * (n % 5 == 0)}", "rejected": "."}
            for n in range(50)]  # fmt: skip
    data = DataConfig(path=write(tmp_path / "a.jsonl", *rows))
    one = texts(preferences.load_preferences(prepared(data)), tokenizer)
    assert [chosen[1] for chosen, _ in one] == [row["chosen"] + EOD for row in rows]
    monkeypatch.setattr(writing, "BATCH_CHARACTERS", 100)
    assert texts(preferences.load_preferences(prepared(data, cache_dir=tmp_path / "2")), tokenizer) == one


def test_found_again(prepared, tmp_path: Path, monkeypatch):
    data = DataConfig(path=write(tmp_path / "a.jsonl", PAIR))
    first = prepared(data)
    with monkeypatch.context() as patched:
        patched.setattr(preferences, "_build", None)  # would fail if it were called
        assert prepared(data) == first
    others = [
        prepared(data, seq_length=99),
        prepared(DataConfig(path=data.path, on_too_long=TooLong.drop)),
        prepared(DataConfig(path=data.path, fields=FieldsConfig(chosen="rejected", rejected="chosen"))),
    ]
    assert len({first.path, *(each.path for each in others)}) == 4
    write(tmp_path / "a.jsonl", PAIR, PAIR)
    assert prepared(data).num_comparisons == 2


def test_the_launcher_needs_no_torch(prepared, tmp_path: Path):
    """Nor, where the comparisons are there already, transformers."""
    file = write(tmp_path / "a.jsonl", PAIR)
    tokenizer_path = prepared(DataConfig(path=file)).tokenizer_path
    code = (
        "import sys\n"
        "from scale_llm.config import data, tokenizer\n"
        "from scale_llm.data.chat import preferences\n"
        f"config = tokenizer.TokenizerConfig(path={tokenizer_path!r})\n"
        f"preferences.prepare_preferences(data.DataConfig(path={file!r}), config, kind='pairs',\n"
        f"    seq_length=100, cache_dir={str(tmp_path / 'cache')!r})\n"
        "assert not {'torch', 'transformers', 'megatron', 'jinja2'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_damaged_arrays(prepared, tmp_path: Path):
    ready = prepared(DataConfig(path=write(tmp_path / "a.jsonl", *KTO)), kind="unpaired")
    directory = Path(ready.path).parent
    for name, value in (("labels", numpy.zeros(1)), ("margins", numpy.zeros(3)), ("groups", numpy.array([0, 1]))):
        numpy.save(directory / f"{name}.npy", value)
        with pytest.raises(UserError, match=f"{name}.npy: missing or damaged; delete .* and run again"):
            preferences.load_preferences(ready)


def test_what_the_configuration_cannot_mean(tmp_path: Path):
    text = write(tmp_path / "a.txt", "hello")
    with pytest.raises(UserError) as caught:
        preferences.prepare_preferences(
            DataConfig(path=text), TokenizerConfig(), kind="pairs", seq_length=9, cache_dir=tmp_path
        )
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "tokenizer.path=null",
        f"data.path={text}",
    ]


def test_embedded_comparisons():
    """Own answers of the library against answers of tests, none of them twice."""
    found = list(embedded_comparisons(embedded_files(4.0)))
    own = {each.messages[0]["content"]: each for each in embedded_conversations(embedded_files(4.0))}
    assert found == list(embedded_comparisons(embedded_files(4.0))) and len(found) > 100
    assert all([*each.prompt, *each.answers[0]] == own[each.prompt[0]["content"]].messages for each in found)
    of = {each.messages[1]["content"]: Path(each.file).parts for each in own.values()}
    texts = [answer[0]["content"] for each in found for answer in each.answers]
    assert len(set(texts)) == len(texts) == 2 * len(found) and set(texts) <= set(of)
    tests = [any(part.startswith(("test", "idle_test")) for part in of[text]) for text in texts]
    assert tests == [False, True] * len(found)
    unpaired = list(embedded_comparisons(embedded_files(4.0), unpaired=True))
    assert [each.label for each in unpaired] == [place % 2 == 0 for place in range(len(found))]
    assert [each.answers for each in unpaired] == [[each.answers[n % 2]] for n, each in enumerate(found)]
    assert not list(embedded_comparisons([]))


@pytest.mark.parametrize("kind", ["pairs", "unpaired"])
def test_embedded_comparisons_are_the_default(prepared, kind: str):
    ready = prepared(DataConfig(embedded_megabytes=4.0), seq_length=600, kind=kind)
    assert ready.num_comparisons == len(list(embedded_comparisons(embedded_files(4.0)))) > 10
    assert ready.report["dropped"] == {} and ready.num_sequences == ready.num_comparisons * (1 + (kind == "pairs"))


def test_sharegpt(prepared, tokenizer):
    """300 pairs in one array, some after several turns, some after a system prompt."""
    if not SHAREGPT.is_file():
        pytest.skip("real data ../shared/data/preference_sharegpt_en.json is not here")
    rows = json.loads(SHAREGPT.read_text())
    ready = prepared(DataConfig(path=str(SHAREGPT)), seq_length=32768)
    found = preferences.load_preferences(ready)
    assert len(found) == len(rows) == 300 and ready.report["dropped"] == {} and ready.report["truncated"] == 0
    read = texts(found, tokenizer)
    for row, ((prompt, chosen), (same, rejected)) in zip(rows, read, strict=True):
        assert (chosen, rejected) == (row["chosen"]["value"] + EOD, row["rejected"]["value"] + EOD)
        assert prompt == same and all(turn["value"] in prompt for turn in row["conversations"])
    lengths = [sum(len(group[place][1].encode()) - len(EOD) + 1 for group in read) / 300 for place in (0, 1)]
    assert lengths == pytest.approx([ready.report["best_mean"], ready.report["others_mean"]], abs=0.06)
    held_out = split_indices(len(found), "80,20", "validation")
    assert len(held_out) == 60
