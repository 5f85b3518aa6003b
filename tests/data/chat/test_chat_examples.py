"""Examples on disk: what is in them, policies, the cache, splits, the embedded pairs, GSM8K."""

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest

from scale_llm.config.data import BadRow, ChatFormat, DataConfig, FieldsConfig, TooLong
from scale_llm.config.errors import UserError
from scale_llm.config.stage import TrainOn
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.data.chat import examples, writing
from scale_llm.data.chat.embedded import embedded_conversations
from scale_llm.data.chat.prepared import load_prepared
from scale_llm.data.corpus import embedded_files
from scale_llm.data.tokenizer import Tokenizer

EOD = "<|endoftext|>"
GOOD = {"prompt": "Q", "response": "A"}
SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"


@pytest.fixture
def tokenizer(make_tokenizer) -> TokenizerConfig:
    return TokenizerConfig(path=str(make_tokenizer([EOD])), eod_token=EOD)


@pytest.fixture
def prepared(tokenizer: TokenizerConfig, tmp_path: Path):
    """prepared(data, **changes) -> PreparedExamples."""

    def make(data: DataConfig, seq_length: int = 100, train_on: TrainOn = TrainOn.assistant, **keys):
        keys = {"cache_dir": tmp_path / "cache", **keys}
        return examples.prepare_examples(data, tokenizer, train_on=train_on, seq_length=seq_length, **keys)

    return make


def write(file: Path, *rows: object) -> str:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(file)


def texts(found: examples.Examples, tokenizer: TokenizerConfig) -> list[tuple[str, str, float]]:
    """(text, trained text, weight) of each example."""
    decode = Tokenizer.load(tokenizer.path, EOD).decode
    return [(decode(each.tokens), decode(each.tokens[each.trained]), each.weight) for each in found]


def test_arrays(prepared, tokenizer, tmp_path: Path, monkeypatch):
    file = write(tmp_path / "a.jsonl", GOOD, "", {"prompt": "QQ", "response": "AAA", "weight": 0.5})
    ready = prepared(DataConfig(path=file))
    found = examples.load_examples(ready)
    assert texts(found, tokenizer) == [
        (f"<|user|>\nQ\n<|assistant|>\nA{EOD}\n", f"A{EOD}", 1.0),
        (f"<|user|>\nQQ\n<|assistant|>\nAAA{EOD}\n", f"AAA{EOD}", 0.5),
    ]
    assert found[0].tokens.dtype == numpy.int64 and found[0].trained.dtype == bool
    assert list(found.lengths) == [28, 31]
    assert [found.where(place) for place in (0, 1)] == [f"{file}:1", f"{file}:3"]
    with monkeypatch.context() as patch:
        patch.setattr(numpy, "load", None)  # each of a million rows asks where it was
        assert found.where(1) == f"{file}:3"
    assert (ready.num_examples, ready.num_tokens, ready.num_trained) == (2, 59, 6)
    assert (ready.eod, ready.vocab_size) == (256, 257)
    assert ready.report == json.loads((Path(ready.path).parent / "report.json").read_text())
    assert {key: ready.report[key] for key in ("rows", "kept", "truncated", "longest", "mean", "dropped")} == {
        "rows": 2, "kept": 2, "truncated": 0, "longest": 31, "mean": 29.5, "dropped": {},
    }  # fmt: skip
    assert load_prepared(examples.PreparedExamples, Path(ready.path).parent) == ready
    with pytest.raises(IndexError):
        found[2]


def test_same_examples_from_every_kind_of_file(prepared, tokenizer, tmp_path: Path):
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    rows = [{"messages": messages, "weight": 2.0}, {"messages": messages * 2, "weight": 1.0}]
    kinds = [write(tmp_path / "a.jsonl", *rows), write(tmp_path / "b.json", *rows)]
    (tmp_path / "c.json").write_text("\n" + json.dumps(rows, indent=2))
    (tmp_path / "d.json.gz").write_bytes(gzip.compress((tmp_path / "c.json").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "e.parquet")
    kinds += [str(tmp_path / name) for name in ("c.json", "d.json.gz", "e.parquet")]
    first, *others = [texts(examples.load_examples(prepared(DataConfig(path=kind))), tokenizer) for kind in kinds]
    assert len(first) == 2 and first[0][2] == 2.0
    assert all(other == first for other in others)
    together = examples.load_examples(prepared(DataConfig(path=kinds)))
    assert texts(together, tokenizer) == first * 5
    assert together.where(9) == f"{kinds[4]}:2"


def test_each_file_has_a_format_of_its_own(prepared, tmp_path: Path):
    paths = [write(tmp_path / "a.jsonl", GOOD), write(tmp_path / "b.jsonl", {"instruction": "Q", "output": "A"})]
    assert prepared(DataConfig(path=paths)).num_examples == 2
    with pytest.raises(UserError, match=r"b.jsonl:1: field 'prompt' is missing"):
        prepared(DataConfig(path=paths, format=ChatFormat.prompt_response))


BAD = [
    GOOD,
    "not json",
    {"prompt": "Q"},
    GOOD,
    {"prompt": "Q", "response": ""},
    {"prompt": "P", "response": " "},
    "[1]",
]


def test_bad_rows_are_an_error_that_lists_them(prepared, tmp_path: Path):
    file = write(tmp_path / "a.jsonl", *BAD)
    with pytest.raises(UserError) as caught:
        prepared(DataConfig(path=file))
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [f"{file}:{n}" for n in (2, 3, 5, 6, 7)]
    assert "set data.fields.response" in caught.value.problems[1]
    assert not list((tmp_path / "cache").rglob("tokens.bin"))
    many = write(tmp_path / "b.jsonl", *["no"] * 1000)
    with pytest.raises(UserError) as caught:
        prepared(DataConfig(path=many))
    assert len(caught.value.problems) == 21


def test_bad_rows_are_dropped_and_counted(prepared, tmp_path: Path):
    file = write(tmp_path / "a.jsonl", *BAD)
    report = prepared(DataConfig(path=file, on_bad_row=BadRow.drop)).report
    assert (report["rows"], report["kept"]) == (7, 2)
    assert report["dropped"] == {"not JSON": 1, "field missing": 1, "empty assistant turn": 2, "not an object": 1}
    first = report["first_dropped"]["empty assistant turn"]
    assert [each.split(": ")[0] for each in first] == [f"{file}:5", f"{file}:6"]
    lines = examples.report_lines(report)
    assert lines[0].startswith("2 examples of 7 rows: 56 tokens, 4 of them trained (7%); longest 28, mean 28")
    assert lines[1].startswith(f"dropped, empty assistant turn: 2, first {file}:5: ")


def test_what_a_template_refuses_is_a_bad_row(make_tokenizer, tmp_path: Path):
    text = (
        "{% if messages[0].content == 'no' %}{{ raise_exception('never') }}{% endif %}"
        "{% if messages[0].content != 'mute' %}{% generation %}x{% endgeneration %}{% endif %}."
    )
    config = TokenizerConfig(path=str(make_tokenizer([EOD], None, text)), eod_token=EOD)
    rows = [GOOD, {"prompt": "no", "response": "A"}, {"prompt": "mute", "response": "A"}]
    data = DataConfig(path=write(tmp_path / "a.jsonl", *rows))
    keys = {"train_on": TrainOn.assistant, "seq_length": 9, "cache_dir": tmp_path}
    with pytest.raises(UserError) as caught:
        examples.prepare_examples(data, config, **keys)
    refused, mute = caught.value.problems
    assert "a.jsonl:2: the chat template refuses the conversation (never); change the row" in refused
    assert "a.jsonl:3: the chat template gives no token that the loss could count; change" in mute
    data.on_bad_row = BadRow.drop
    dropped = examples.prepare_examples(data, config, **keys).report["dropped"]
    assert dropped == {"refused by the chat template": 1, "nothing trained": 1}


def test_a_damaged_file_is_no_bad_row(prepared, tmp_path: Path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode() * 99)[:-9])
    (tmp_path / "b.json").write_text("[{},")
    (tmp_path / "c.json").write_bytes(b'[{"prompt": "\n\xff\n"}]')
    (tmp_path / "d.jsonl").write_text("\n")
    for name, text in (("a.jsonl.gz", "copy it"), ("b.json", "array"), ("c.json", "UTF-8"), ("d.jsonl", "no rows")):
        for policy in BadRow:
            with pytest.raises(UserError, match=rf"{name}:\d+: .*{text}"):
                prepared(DataConfig(path=str(tmp_path / name), on_bad_row=policy))


def test_no_usable_row(prepared, tmp_path: Path):
    file = write(tmp_path / "a.jsonl", "x", "x")
    with pytest.raises(UserError, match="no usable row; dropped, not JSON: 2, first .*a.jsonl:1: not JSON"):
        prepared(DataConfig(path=file, on_bad_row=BadRow.drop))


LONG = [GOOD, {"prompt": "Q", "response": "ABCDEFG"}, {"prompt": "Q" * 50, "response": "A"}]


def test_too_long_is_cut_off_at_its_end(prepared, tokenizer, tmp_path: Path):
    file = write(tmp_path / "a.jsonl", *LONG)
    ready = prepared(DataConfig(path=file), seq_length=28)
    assert texts(examples.load_examples(ready), tokenizer) == [
        (f"<|user|>\nQ\n<|assistant|>\nA{EOD}\n", f"A{EOD}", 1.0),
        ("<|user|>\nQ\n<|assistant|>\nABC", "ABC", 1.0),
    ]
    assert ready.report["truncated"] == 1
    assert ready.report["dropped"] == {"nothing trained within length": 1}  # counted though bad rows are errors
    excess = "34 tokens are more than the 28 that model.seq_length allows"
    assert f"cut off at model.seq_length: 1, first {file}:2: {excess}" in examples.report_lines(ready.report)


TURNS = {"messages": [{"role": role, "content": text} for role, text in [("user", "Q"), ("assistant", "A")] * 2]}


@pytest.mark.parametrize("train_on", TrainOn)
def test_answers_are_known_whatever_is_trained_on(prepared, tokenizer, tmp_path: Path, train_on: TrainOn):
    """Of all tokens that are trained, the assistant's, cut off with them."""
    found = examples.load_examples(
        prepared(DataConfig(path=write(tmp_path / "a.jsonl", TURNS)), train_on=train_on, seq_length=54)
    )
    (answers,) = [examples.AssistantTokens(found)[number] for number in range(len(found))]
    assert (answers.trained <= found[0].trained).all() and (answers.tokens == found[0].tokens).all()
    text = Tokenizer.load(tokenizer.path, EOD).decode(answers.tokens[answers.trained])
    assert text == ("A" if train_on is TrainOn.last_assistant else f"A{EOD}A")


def test_turns_that_the_template_cannot_tell(prepared, tokenizer, tmp_path: Path):
    """Trained on whole, they are kept, counted and said; nothing passes for an answer."""
    (tmp_path / "other.jinja").write_text("{% for m in messages %}{{ m.content }}{{ loop.last }}{% endfor %}")
    tokenizer.chat_template = str(tmp_path / "other.jinja")
    data = DataConfig(path=write(tmp_path / "a.jsonl", TURNS, TURNS))
    with pytest.raises(UserError, match="cannot mark the assistant's turn"):
        prepared(data)
    ready = prepared(data, train_on=TrainOn.all)
    found = examples.load_examples(ready)
    assert ready.report["unmarked"] == len(found) == 2
    line = examples.report_lines(ready.report)[1]
    assert "no assistant's turn marked within length in 2 conversations" in line and "generation" in line
    assert all(each.trained.all() and not each.answers.any() for each in found)


def test_an_answer_that_is_cut_off_is_none(prepared, tmp_path: Path):
    """Of a conversation that is trained on whole, its prompt is left, and that is counted."""
    ready = prepared(DataConfig(path=write(tmp_path / "a.jsonl", *LONG)), seq_length=28, train_on=TrainOn.all)
    assert (ready.report["kept"], ready.report["truncated"], ready.report["unmarked"]) == (3, 2, 1)
    found = examples.load_examples(ready)
    assert [each.answers.any() for each in found] == [True, True, False]


def test_splits_that_are_left_empty():
    """Each by its name and with what to do about it; three rows are enough for two splits."""
    assert examples.empty_splits("99,1,0", 3, "rows", ["train", "validation"]) == []
    assert examples.empty_splits("100,0,0", 9, "rows", ["train"]) == []
    train, validation = (
        examples.empty_splits("1,1,98", 4, "rows", ["train", "validation"])[0],
        examples.empty_splits("100,0,0", 9, "rows", ["train", "validation"]),
    )
    assert train.startswith("data.split=1,1,98: leaves none of 4 rows for train; raise its share")
    assert len(validation) == 1 and "for validation" in validation[0] and "train.eval_iters=0" in validation[0]


def test_too_long_is_dropped(prepared, tmp_path: Path):
    file = write(tmp_path / "a.jsonl", *LONG)
    report = prepared(DataConfig(path=file, on_too_long=TooLong.drop), seq_length=28).report
    assert (report["kept"], report["rows"], report["dropped"]) == (1, 3, {"too long": 2})
    assert report["first_dropped"]["too long"][0].startswith(
        f"{file}:2: 34 tokens are more than the 28 that model.seq_length allows"
    )


@pytest.mark.parametrize("policy", BadRow)
def test_too_long_is_an_error(prepared, tmp_path: Path, policy: BadRow):
    file = write(tmp_path / "a.jsonl", *LONG)
    with pytest.raises(UserError) as caught:
        prepared(DataConfig(path=file, on_too_long=TooLong.fail, on_bad_row=policy), seq_length=28)
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [f"{file}:2", f"{file}:3"]
    assert "set data.on_too_long=truncate or drop" in caught.value.problems[0]


def test_exactly_as_long_as_allowed(prepared, tmp_path: Path):
    data = DataConfig(path=write(tmp_path / "a.jsonl", GOOD), on_too_long=TooLong.fail)
    assert prepared(data, seq_length=28).report["longest"] == 28
    with pytest.raises(UserError, match="28 tokens are more than the 27 that model.seq_length allows"):
        prepared(data, seq_length=27)


def test_batches_do_not_change_the_order(prepared, tokenizer, tmp_path: Path, monkeypatch):
    """Rows with special tokens in their text take another way than the rest of their batch."""
    rows = [{"prompt": f"{n}{EOD * (n % 3 == 0)}", "response": f"{n}"} for n in range(50)]
    file = write(tmp_path / "a.jsonl", *rows)
    one = texts(examples.load_examples(prepared(DataConfig(path=file))), tokenizer)
    assert [trained for _, trained, _ in one] == [f"{n}{EOD}" for n in range(50)]
    monkeypatch.setattr(writing, "BATCH_CHARACTERS", 100)
    assert texts(examples.load_examples(prepared(DataConfig(path=file), cache_dir=tmp_path / "2")), tokenizer) == one


def test_found_again(prepared, tmp_path: Path, monkeypatch):
    file = write(tmp_path / "a.jsonl", GOOD)
    first = prepared(DataConfig(path=file))
    with monkeypatch.context() as patched:
        patched.setattr(examples, "_build", None)  # would fail if it were called
        assert prepared(DataConfig(path=file)) == first
    write(tmp_path / "a.jsonl", GOOD, GOOD)
    assert prepared(DataConfig(path=file)).num_examples == 2


def test_the_launcher_needs_no_torch(prepared, tmp_path: Path):
    """Nor, where the examples are there already, transformers."""
    file = write(tmp_path / "a.jsonl", GOOD)
    tokenizer_path = prepared(DataConfig(path=file)).tokenizer_path
    code = (
        "import sys\n"
        "from scale_llm.config import data, stage, tokenizer\n"
        "from scale_llm.data.chat import examples\n"
        f"config = tokenizer.TokenizerConfig(path={tokenizer_path!r})\n"
        f"examples.prepare_examples(data.DataConfig(path={file!r}), config, train_on=stage.TrainOn.assistant,\n"
        f"    seq_length=100, cache_dir={str(tmp_path / 'cache')!r})\n"
        "assert not {'torch', 'transformers', 'megatron', 'jinja2'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_whatever_matters_has_an_entry_of_its_own(prepared, tokenizer, tmp_path: Path):
    rows = [{"prompt": "Q", "response": "A", "answer": "B", "messages": None}]
    file = write(tmp_path / "a.jsonl", *rows)
    (tmp_path / "mine.jinja").write_text("{% generation %}x{% endgeneration %}")
    found = [
        prepared(DataConfig(path=file)),
        prepared(DataConfig(path=file, fields=FieldsConfig(response="answer"))),
        prepared(DataConfig(path=file, format=ChatFormat.prompt_response)),
        prepared(DataConfig(path=file, on_bad_row=BadRow.drop)),
        prepared(DataConfig(path=file, on_too_long=TooLong.drop)),
        prepared(DataConfig(path=file), seq_length=99),
        prepared(DataConfig(path=file), train_on=TrainOn.all),
    ]
    tokenizer.chat_template = str(tmp_path / "mine.jinja")
    found.append(prepared(DataConfig(path=file)))
    assert len({each.path for each in found}) == len(found)
    assert texts(examples.load_examples(found[1]), tokenizer)[0][1] == f"B{EOD}"
    assert found[-1].num_tokens == 1


def test_damaged_arrays(prepared, tmp_path: Path):
    ready = prepared(DataConfig(path=write(tmp_path / "a.jsonl", GOOD)))
    tokens = Path(ready.path).parent / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-1])
    with pytest.raises(UserError, match="tokens.bin: missing or damaged; delete .* and run again"):
        examples.load_examples(ready)


def test_what_the_configuration_cannot_mean(tmp_path: Path):
    text = write(tmp_path / "a.txt", "hello")
    good = write(tmp_path / "a.jsonl", GOOD)
    keys = {"train_on": TrainOn.all, "seq_length": 9, "cache_dir": tmp_path}
    with pytest.raises(UserError) as caught:
        examples.prepare_examples(DataConfig(path=[0.5, text, 0.5, good], split="x"), TokenizerConfig(), **keys)
    starts = (
        "data.split=x",
        "tokenizer.path=null: fine-tuning needs",
        "data.path: weights",
        f"data.path={text}: plain",
    )
    assert len(caught.value.problems) == 4
    assert all(problem.startswith(start) for problem, start in zip(caught.value.problems, starts, strict=True))
    assert "model=from_checkpoint" in caught.value.problems[1]
    (tmp_path / "t.idx").touch()
    (tmp_path / "t.bin").touch()
    with pytest.raises(UserError, match="t: indexed tokens cannot hold conversations; give JSONL"):
        examples.prepare_examples(DataConfig(path=str(tmp_path / "t")), TokenizerConfig(path="x"), **keys)


def test_embedded_pairs():
    found = list(embedded_conversations(embedded_files()))
    assert len(found) > 3000
    questions = [each.messages[0]["content"] for each in found]
    answers = [each.messages[1]["content"] for each in found]
    assert len(set(questions)) == len(set(answers)) == len(found)
    assert all(40 <= len(answer) <= 400 for answer in answers)
    (place,) = [number for number, question in enumerate(questions) if "textwrap.dedent" in question]
    assert answers[place].startswith("Remove any common leading whitespace from every line in `text`.")
    import textwrap

    assert Path(found[place].file).name == "textwrap.py"
    assert found[place].line == textwrap.dedent.__code__.co_firstlineno
    some = list(embedded_conversations(embedded_files(2.0)))
    assert 0 < len(some) < len(found) and some == found[: len(some)]  # a larger cap only adds


def test_embedded_pairs_are_the_default(prepared, tokenizer):
    ready = prepared(DataConfig(embedded_megabytes=1.0), seq_length=600)
    found = texts(examples.load_examples(ready), tokenizer)
    expected = list(embedded_conversations(embedded_files(1.0)))
    assert [trained for _, trained, _ in found] == [f"{each.messages[1]['content']}{EOD}" for each in expected]
    assert ready.report["dropped"] == {}


def test_splits_are_fair_and_fixed():
    parts = {name: examples.split_indices(1000, "949,50,1", name) for name in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [949, 50, 1]
    assert sorted(numpy.concatenate(list(parts.values()))) == list(range(1000))
    assert 400 < parts["validation"].mean() < 600  # not the end of the file
    assert list(examples.split_indices(1000, "949,50,1", "validation")) == list(parts["validation"])
    assert list(examples.split_indices(8, "1", "train")) == [2, 1, 3, 5, 6, 0, 4, 7]  # as it was first written
    assert len(examples.split_indices(8, "1", "validation")) == 0


@pytest.mark.parametrize(
    "count, split, sizes",
    [(3, "949,50,1", (2, 1, 0)), (2, "949,50,1", (2, 0, 0)), (5, "1,0,0", (5, 0, 0)), (4, "1,1,98", (0, 1, 3))],
)
def test_small_sets_keep_one_for_validation(count: int, split: str, sizes: tuple[int, ...]):
    parts = [examples.split_indices(count, split, name) for name in ("train", "validation", "test")]
    assert tuple(map(len, parts)) == sizes
    assert sorted(numpy.concatenate(parts)) == list(range(count))


def test_gsm8k(prepared, tokenizer):
    file = SHARED / "gsm8k_train.jsonl"
    if not file.is_file():
        pytest.skip("real data ../shared/data/gsm8k_train.jsonl is not here")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    fields = FieldsConfig(prompt="question", response="answer")
    begin = time.perf_counter()
    ready = prepared(DataConfig(path=str(file), fields=fields), seq_length=4096)
    assert time.perf_counter() - begin < 60
    found = examples.load_examples(ready)
    assert len(found) == len(rows) == 7473
    decode = Tokenizer.load(tokenizer.path, EOD).decode
    for place in range(0, len(rows), 500):
        example = found[place]
        assert decode(example.tokens[example.trained]) == rows[place]["answer"] + EOD
        prompt = f"<|user|>\n{rows[place]['question']}\n<|assistant|>\n"
        assert decode(example.tokens[: example.trained.argmax()]) == prompt


def test_preferences_as_an_array(prepared):
    """300 conversations in one array; what the assistant says there is in other fields, so each row is a bad one."""
    file = SHARED / "preference_sharegpt_en.json"
    if not file.is_file():
        pytest.skip("real data ../shared/data/preference_sharegpt_en.json is not here")
    with pytest.raises(UserError, match="preference_sharegpt_en.json:1: no assistant turn .roles: user.; add one"):
        prepared(DataConfig(path=str(file)))
