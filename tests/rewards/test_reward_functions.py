"""Functions of the user's own, how they are found, and how scores are put together."""

import threading

import numpy
import pytest
import torch

from scale_llm.config.errors import UserError
from scale_llm.config.reward import RewardFunctionConfig
from scale_llm.rewards import exact_match, length, regex
from scale_llm.rewards.loading import load_function, load_functions
from scale_llm.rewards.scoring import FURTHER, MAX_ERRORS, Item, Rewards

SIGNATURE = "data_source, solution_str, ground_truth, extra_info=None"


@pytest.fixture
def written(tmp_path):
    """Writes a file of the user's own and gives its path."""

    def write(text, name="mine.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def body(*lines):
    return f"def score({SIGNATURE}):\n" + "".join(f"    {line}\n" for line in lines)


def score(function, items, **fields):
    rewards = Rewards(RewardFunctionConfig(function=function, **fields))
    return rewards, rewards.score(items)


# Shipped functions


def test_exact_match():
    assert exact_match.compute_score("", "  New \n York ", "New York") == 1.0
    assert exact_match.compute_score("", "new york", "New York") == 0.0
    assert exact_match.compute_score("", "NYC", ["New York", "NYC"]) == 1.0
    assert exact_match.compute_score("", "7", 7) == 1.0
    for nothing in (None, [], [None]):
        with pytest.raises(ValueError, match="null or empty"):
            exact_match.compute_score("", "None", nothing)


def test_regex():
    _, scored = score("regex", [Item("", "<b>x</b>"), Item("", "b")], regex_pattern="<b>.</b>")
    assert [one.value for one in scored] == [1.0, 0.0]
    answers = ["<a>1</a> <a> 7 </a>", "<a>7</a> <a>8</a>", "7"]
    items = [Item("", answer, ground_truth) for ground_truth in ("7", ["7", "8"], None) for answer in answers]
    _, scored = score("regex", items, regex_pattern="<a>(.*?)</a>")
    assert [one.value for one in scored] == [1, 0, 0, 1, 1, 0, 1, 1, 0]
    assert regex.compute_score("", "axb", "a.b", pattern=__import__("re").compile("(a.b)")) == 0.0, "it is no pattern"


def test_length():
    values = [length.compute_score("", "", None, {"num_tokens": n}, target_tokens=10) for n in (0, 5, 10, 15, 20, 99)]
    assert values == [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    with pytest.raises(ValueError, match="num_tokens"):
        length.compute_score("", "", target_tokens=10)


# Finding functions


def test_a_function_in_a_file_may_import_its_neighbours(written, monkeypatch, tmp_path):
    written("VALUE = 0.25\n", "its_neighbour.py")
    path = written("from its_neighbour import VALUE\n" + body("return VALUE"))
    assert load_function(f"{path}:score")(data_source="", solution_str="", ground_truth="") == 0.25
    monkeypatch.chdir(tmp_path)
    assert load_function("mine.py:score")("", "", "") == 0.25


def test_two_functions_of_a_file_share_its_state(written):
    path = written(
        f"calls = []\ndef one({SIGNATURE}): calls.append(1); return len(calls)\n"
        f"def two({SIGNATURE}): return len(calls)\n"
    )
    _, (scored,) = score(f"{path}:one {path}:two", [Item("", "")])
    assert scored.parts == {"mine.one": 1.0, "mine.two": 1.0}


def test_a_file_that_has_changed_is_read_again(written):
    assert load_function(written(body("return 1")) + ":score")("", "", "") == 1
    assert load_function(written(body("return 1 + 1")) + ":score")("", "", "") == 2


def test_a_function_of_a_module(written, monkeypatch, tmp_path):
    written(body("return 3"), "installed_rewards.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    _, (scored,) = score("0.5 installed_rewards:score", [Item("", "")])
    assert scored.value == 1.5 and scored.parts == {"installed_rewards.score": 3.0}


def problem(spec):
    with pytest.raises(UserError) as raised:
        load_function(spec)
    (text,) = raised.value.problems
    return text


def test_what_cannot_be_found_says_where_it_looked(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"no file {tmp_path / 'absent.py'}" in problem("absent.py:score")
    assert f"nor a directory {tmp_path / 'no'}" in problem("no/absent.py:score")
    path = written("import math\nfrom os.path import join\nclass Judge: ...\ndef reward(): ...\ndef _own(): ...\n")
    assert f"{path} defines no score; it defines Judge, reward" in problem("mine.py:score")
    text = problem("no_such_package.rewards:score")
    assert "no module no_such_package" in text and "PYTHONPATH" in text
    assert "did you mean length?" in problem("lenght")


def test_a_file_that_cannot_be_imported_shows_the_line(written):
    path = written("x = 1\nimport no_such_package\n")
    assert f"{path}:2: ModuleNotFoundError: No module named 'no_such_package'" in problem(f"{path}:score")
    path = written("x = 1\n\nx = 1 +\n", "wrong.py")
    assert f"{path}:3: SyntaxError" in problem(f"{path}:score")
    path = written("def broken():\n    raise KeyError('a')\nbroken()\n", "raises.py")
    assert f"{path}:2: KeyError: 'a'" in problem(f"{path}:score")
    path = written("import sys\nsys.exit(0)\n", "leaves.py")
    assert f"{path}:2: SystemExit" in problem(f"{path}:score")


def test_a_module_whose_own_import_fails_shows_the_line(written, monkeypatch, tmp_path):
    path = written("\nimport no_such_package\n", "half_installed.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert f"{path}:2: ModuleNotFoundError" in problem("half_installed:score")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("def score(a, b): return 0.0\n", "takes (a, b)"),
        (f"async def score({SIGNATURE}): return 0.0\n", "asynchronous"),
        ("score = 0.5\n", "is a float, no function"),
        ("class score: ...\n", "is a type, no function"),
    ],
)
def test_what_cannot_be_called_is_refused(written, text, hint):
    assert hint in problem(written(text) + ":score")


def test_all_functions_that_cannot_be_had_are_named_at_once():
    with pytest.raises(UserError) as raised:
        load_functions(RewardFunctionConfig(function="absent.py:a no_such_package:b"))
    assert len(raised.value.problems) == 2
    with pytest.raises(UserError, match="reward.num_workers=0"):
        load_functions(RewardFunctionConfig(function="gsm8k", num_workers=0))


# Scoring


def test_weights_and_parts():
    items = [Item("gsm8k", "#### 4", "4", {"num_tokens": 5}), Item("gsm8k", "#### 5", "4", {"num_tokens": 10})]
    _, scored = score("2 gsm8k -0.5 length", items, length_target_tokens=10)
    assert [one.value for one in scored] == [2 - 0.25, -0.5]
    assert [one.parts for one in scored] == [{"gsm8k": 1.0, "length": 0.5}, {"gsm8k": 0.0, "length": 1.0}]
    assert [one.failed for one in scored] == [0, 0]


def test_functions_see_the_whole_item(written):
    path = written(
        body("return float((data_source, solution_str, ground_truth, extra_info) == ('d', 's', [1], {'k': 2}))")
    )
    assert score(f"{path}:score", [Item("d", "s", [1], {"k": 2})])[1][0].value == 1.0
    path = written("def score(**given): return len(given)\n", "keywords.py")
    assert score(f"{path}:score", [Item("d", "s")])[1][0].value == 4.0


@pytest.mark.parametrize(
    "returned", [True, 1, 1.0, numpy.float32(1), numpy.int64(1), numpy.bool_(True), numpy.ones(1), torch.ones(())]
)
def test_what_counts_as_a_number(written, returned):
    path = written(body("return extra_info['returned']"))
    (scored,) = score(f"{path}:score", [Item("", "", None, {"returned": returned})])[1]
    assert scored.value == 1.0 and type(scored.value) is float and scored.failed == 0


def test_other_numbers_of_a_dictionary_become_parts(written):
    path = written(body("return {'score': 0.5, 'acc': True, 'pred': 'x', 'length': 3}"))
    (scored,) = score(f"2 {path}:score", [Item("", "")])[1]
    assert scored.value == 1.0 and scored.parts == {"mine.score": 0.5, "mine.score/acc": 1.0, "mine.score/length": 3.0}


def test_a_function_that_fails_scores_the_default(written):
    path = written(body("if solution_str == 'raise':", "    raise KeyError('k')", "return extra_info"))
    answers = [
        ("raise", None),
        ("", None),
        ("", float("nan")),
        ("", "1"),
        ("", {"acc": 1.0}),
        ("", 0.5),
        ("raise", None),
    ]
    items = [Item("", answer, None, extra) for answer, extra in answers]
    rewards, scored = score(f"2 {path}:score", items, default=-1.0)
    assert [one.value for one in scored] == [-2.0, -2.0, -2.0, -2.0, -2.0, 1.0, -2.0]
    assert [one.failed for one in scored] == [1, 1, 1, 1, 1, 0, 1]
    assert scored[4].parts == {"mine.score": -1.0, "mine.score/acc": 1.0}
    assert rewards.errors[f"mine.score: {path}:3: KeyError: 'k'"] == 2
    assert sum(rewards.errors.values()) == 6


def test_few_distinct_errors_are_kept(written):
    path = written(body("raise ValueError(solution_str)"))
    rewards, _ = score(f"{path}:score", [Item("", str(number)) for number in range(50)])
    assert len(rewards.errors) == MAX_ERRORS + 1 and rewards.errors[FURTHER] == 50 - MAX_ERRORS


def test_a_function_with_state_is_called_in_order_by_this_thread(written):
    path = written("import threading\nseen = []\n" + body("seen.append(threading.get_ident())", "return len(seen)"))
    rewards, scored = score(f"{path}:score", [Item("", "")] * 20, num_workers=8)
    assert [one.value for one in scored] == list(range(1, 21))
    seen = rewards.functions[0].call.__globals__["seen"]
    assert set(seen) == {threading.get_ident()}


def test_results_do_not_depend_on_the_number_of_workers(written):
    """The concurrent function waits longest for the first item, and fails for every third."""
    path = written(
        "import time\n"
        + body("n = int(solution_str)", "time.sleep(0.02 / (n + 1))", "if n % 3 == 0: raise ValueError(n)", "return n")
        + "score.concurrent = True\n"
    )
    items = [Item("", str(number), str(number)) for number in range(24)]
    (one, first), (eight, second) = (score(f"{path}:score exact_match", items, num_workers=n) for n in (1, 8))
    assert first == second and list(one.errors.items()) == list(eight.errors.items())
    assert [entry.value for entry in first] == [1 + (n if n % 3 else 0) for n in range(24)]


def test_no_function_and_no_answers():
    assert [one.value for one in Rewards(RewardFunctionConfig(load="a")).score([Item("", "x")])] == [0.0]
    assert Rewards(RewardFunctionConfig(function="gsm8k")).score([]) == []
