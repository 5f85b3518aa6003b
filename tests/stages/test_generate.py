"""Whole runs of stage=generate, from a base model that a run has pretrained."""

import json

import pytest
from support.runs import PP2, RANKS2, TP2, words_from

from scale_llm.config.errors import UserError

WORDS = ["stage=generate", "model=from_checkpoint", "model.seq_length=64", "stage.max_new_tokens=12",
         "stage.batch_size=3", "stage.num_generations_per_prompt=2"]  # fmt: skip
words = words_from(WORDS)


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """Prompts as text, as turns, and as a conversation whose last answer is left out."""
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    rows = [{"prompt": f"What is {'very ' * n}{n}?", "id": n} for n in range(4)]
    rows.append({"prompt": [{"role": "user", "content": "def"}], "id": 4})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(run) -> list[dict]:
    return [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def plain(runs, base, questions, tmp_path_factory):
    run = tmp_path_factory.mktemp("generate") / "plain"
    assert runs(run, *words(base, questions)) == []
    return run


def test_rows_and_their_answers(plain):
    found = answers(plain)
    assert [(row["id"], row["sample"]) for row in found] == [(n, k) for n in range(5) for k in range(2)]
    assert all(0 < row["generated_tokens"] <= 12 and row["log_prob"] < 0 for row in found)
    assert all(row["finished"] or row["generated_tokens"] == 12 for row in found)
    assert len({row["generated"] for row in found}) == 10, "seeds of their own"


LAYOUTS = {
    "tp2": [TP2, "stage.batch_size=5"],
    "pp2": [PP2],
    "dp2": [RANKS2, "stage.batch_size=1"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_texts_do_not_depend_on_batch_and_layout(runs, tmp_path, base, questions, plain, layout):
    assert runs(tmp_path / "run", *words(base, questions, *LAYOUTS[layout])) == []
    for row, like in zip(answers(tmp_path / "run"), answers(plain), strict=True):
        assert {**row, "log_prob": 0} == {**like, "log_prob": 0}
        assert abs(row["log_prob"] - like["log_prob"]) < 1e-4


def test_another_seed_has_other_texts_and_none_at_temperature_0(runs, tmp_path, base, questions, plain):
    one, two, other = tmp_path / "one", tmp_path / "two", tmp_path / "other"
    assert runs(other, *words(base, questions, "train.seed=5")) == []
    assert [row["generated"] for row in answers(other)] != [row["generated"] for row in answers(plain)]
    for run, seed in ((one, 1), (two, 2)):
        assert runs(run, *words(base, questions, "stage.temperature=0", f"train.seed={seed}")) == []
    assert [row["generated"] for row in answers(one)] == [row["generated"] for row in answers(two)]


def test_stop_strings_and_what_is_cut(runs, tmp_path, base, questions, plain):
    """Every answer that holds the text ends with the token that completes it."""
    text = answers(plain)[0]["generated"][3:5]
    assert runs(tmp_path / "run", *words(base, questions, f"stage.stop_strings=['{text}']")) == []
    for row, like in zip(answers(tmp_path / "run"), answers(plain), strict=True):
        assert like["generated"].startswith(row["generated"])
        assert row["finished"] == (text in row["generated"] or like["finished"])
    assert answers(tmp_path / "run")[0]["generated_tokens"] < answers(plain)[0]["generated_tokens"]


def test_bad_input(runs, tmp_path, base, questions):
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "word " * 300}) + "\n" + questions.read_text())
    with pytest.raises(UserError, match=r"long.jsonl:1: the prompt has \d+ tokens, more than the 52"):
        runs(tmp_path / "run", *words(base, long, "data.on_too_long=fail"))
    assert runs(tmp_path / "dropped", *words(base, long, "data.on_too_long=drop", "stage.max_new_tokens=2")) == []
    assert [row["id"] for row in answers(tmp_path / "dropped")[::2]] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError) as caught:
        runs(tmp_path / "run", *words(base, questions, "stage.top_p=0", "stage.max_new_tokens=64", "data.path=null"))
    assert [problem.split("=")[0] for problem in caught.value.problems] == [
        "data.path", "stage.top_p", "stage.max_new_tokens",
    ]  # fmt: skip
