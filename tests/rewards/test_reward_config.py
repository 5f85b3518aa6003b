"""What the reward group is refused for before anything starts."""

import pytest

from scale_llm.config.reward import RewardFunctionConfig, WeightedFunction, weighted_functions
from scale_llm.config.validate_reward import reward_problems


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, []),
        ("gsm8k", [(1.0, "gsm8k")]),
        ("gsm8k length", [(1.0, "gsm8k"), (1.0, "length")]),
        ("0.7 gsm8k 0.3 my.py:score", [(0.7, "gsm8k"), (0.3, "my.py:score")]),
        ("1 gsm8k -1e-1 a.b:c", [(1.0, "gsm8k"), (-0.1, "a.b:c")]),
        ("2 'my file.py:score'", [(2.0, "my file.py:score")]),
    ],
)
def test_the_list_of_functions(text, expected):
    assert weighted_functions(text) == [WeightedFunction(*pair) for pair in expected]


def test_sound_groups_have_no_problem():
    for fields in (
        {"function": "gsm8k"},
        {"load": "runs/reward/checkpoints"},
        {"function": "0.7 gsm8k 0.3 my.py:score", "load": "runs/reward/checkpoints", "load_weight": -0.5},
        {"function": "regex", "regex_pattern": "<answer>(.*?)</answer>"},
        {"function": "length python_tests", "length_target_tokens": 100},
        {"function": "package.module:score"},
    ):
        assert reward_problems(RewardFunctionConfig(**fields)) == []


@pytest.mark.parametrize(
    ("fields", "hints"),
    [
        ({}, ["reward.function=null, reward.load=null", "gsm8k", "reward.load=<"]),
        ({"function": ""}, ["reward.function=", "no function"]),
        ({"function": "gms8k"}, ["reward.function=gms8k", "did you mean gsm8k?"]),
        ({"function": "zzz"}, ["reward.function=zzz", "one of gsm8k", "path/to/file.py:name"]),
        ({"function": "my.py"}, ["reward.function=my.py", "my.py:compute_score"]),
        ({"function": "my.py:"}, ["reward.function=my.py:", "path/to/file.py:name"]),
        ({"function": "src/my:score"}, ["reward.function=src/my:score", "neither a file", "nor the name of a module"]),
        ({"function": "0.5 gsm8k length", "length_target_tokens": 9}, ["do not alternate", "0.7 gsm8k 0.3"]),
        ({"function": "0.5"}, ["reward.function=0.5", "do not alternate"]),
        ({"function": "nan gsm8k"}, ["weight nan of gsm8k", "finite"]),
        ({"function": "0 gsm8k"}, ["weight 0 of gsm8k", "other than 0"]),
        ({"function": "gsm8k 'a b"}, ["cannot be read", "quotes"]),
        ({"function": "gsm8k gsm8k"}, ["gsm8k comes twice"]),
        ({"function": "regex"}, ["reward.regex_pattern=null"]),
        ({"function": "regex", "regex_pattern": "(a"}, ["reward.regex_pattern=(a", "does not compile"]),
        ({"function": "length"}, ["reward.length_target_tokens=null"]),
        ({"function": "length", "length_target_tokens": 0}, ["reward.length_target_tokens=0", "at least 1"]),
        ({"function": "gsm8k", "timeout_seconds": -1.0}, ["reward.timeout_seconds=-1.0", "larger than 0"]),
        ({"function": "gsm8k", "timeout_seconds": float("inf")}, ["reward.timeout_seconds=inf"]),
        ({"function": "gsm8k", "memory_megabytes": 1}, ["reward.memory_megabytes=1", "64"]),
        ({"function": "gsm8k", "num_workers": 0}, ["reward.num_workers=0", "at least 1"]),
        ({"function": "gsm8k", "default": float("nan")}, ["reward.default=nan"]),
        ({"load": "x", "load_weight": 0.0}, ["reward.load_weight=0.0", "reward.load=null"]),
        ({"load": "x", "load_weight": float("inf")}, ["reward.load_weight=inf"]),
    ],
)
def test_a_fault_is_named_with_its_remedy(fields, hints):
    (problem,) = reward_problems(RewardFunctionConfig(**fields))
    assert all(hint in problem for hint in hints), problem


def test_all_faults_at_once():
    fields = {"function": "gms8k 1pt regex", "timeout_seconds": 0.0, "num_workers": 0}
    assert len(reward_problems(RewardFunctionConfig(**fields))) == 5
