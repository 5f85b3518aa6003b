"""What an answer is worth: verifiable rewards, a reward model, or both."""

import math
import os
import shlex
from dataclasses import dataclass
from typing import NamedTuple

SHIPPED = ("gsm8k", "exact_match", "regex", "length", "python_tests")
"""Reward functions that come with scale_llm; each is the module of that name in scale_llm/rewards."""


@dataclass(kw_only=True, slots=True)
class RewardFunctionConfig:
    """Rewards of sampled answers. An answer's reward is the sum of its functions' scores, each times its weight."""

    function: str | None = None
    """What scores: gsm8k, exact_match, regex, length, python_tests; path/to/file.py:name; or package.module:name. Of
    several, a weight before each: "0.7 gsm8k 0.3 my.py:score". Weights may be negative and are not normalised; without
    weights each counts 1. A path with spaces is quoted within the text."""
    load: str | None = None
    """Checkpoint of a reward model."""
    load_weight: float = 1.0
    """What the reward model's score is multiplied by before it is added."""
    default: float = 0.0
    """Score of an answer whose function raises or returns no finite number; its weight still applies."""
    gsm8k_flexible: bool = False
    """For gsm8k: where an answer has no "####", its last number is taken."""
    regex_pattern: str | None = None
    """For regex: what the answer must hold, in Python's syntax; with a group, the group's text must be the ground
    truth."""
    length_target_tokens: int | None = None
    """For length: the number of tokens that scores 1."""
    partial_credit: bool = False
    """For python_tests: the share of tests passed; false: 1 when all pass, otherwise 0."""
    timeout_seconds: float = 10.0
    """For python_tests: wall-clock limit of all tests of one answer."""
    memory_megabytes: int = 512
    """For python_tests: address space of the process that runs an answer."""
    num_workers: int = 4
    """Answers scored at once on each rank by functions that bear it: python_tests, with a process for each, and
    functions of your own with an attribute `concurrent = True`. All others are called one after another."""


class WeightedFunction(NamedTuple):
    weight: float
    name: str
    """As the user wrote it, quotes removed."""


def weighted_functions(text: str | None) -> list[WeightedFunction]:
    """Entries of `reward.function` in order; none for None.

    Raises:
        ValueError: what is wrong with the list and how to write it, without the key.
    """
    if text is None:
        return []
    form = 'give one function, or a weight before each: "0.7 gsm8k 0.3 my.py:score"'
    try:
        entries = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"cannot be read ({error}); close the quotes") from None
    weights = [_number(entry) for entry in entries]
    if not entries:
        raise ValueError(f"no function; {form}")
    if all(weight is None for weight in weights):
        return [WeightedFunction(1.0, entry) for entry in entries]
    if len(entries) % 2 or any((weight is None) != bool(place % 2) for place, weight in enumerate(weights)):
        raise ValueError(f"weights and functions do not alternate; {form}")
    pairs = [WeightedFunction(float(weight), name) for weight, name in zip(entries[::2], entries[1::2], strict=True)]
    if bad := [pair for pair in pairs if not math.isfinite(pair.weight) or pair.weight == 0]:
        listed = ", ".join(f"{pair.weight:g} of {pair.name}" for pair in bad)
        raise ValueError(f"weight {listed}: must be a finite number other than 0; change it or remove the function")
    return pairs


def _number(entry: str) -> float | None:
    try:
        return float(entry)
    except ValueError:
        return None


def with_absolute_paths(text: str | None) -> str | None:
    """`reward.function` with the files of users' functions as ranks find them that start in another directory."""
    try:
        functions = weighted_functions(text)
    except ValueError:  # validation says what is wrong with it
        return text
    if not any(":" in function.name and function.name.rpartition(":")[0].endswith(".py") for function in functions):
        return text
    found = [(function.weight, _absolute(function.name)) for function in functions]
    if all(weight == 1 for weight, _ in found):
        return " ".join(shlex.quote(name) for _, name in found)
    return " ".join(f"{weight!r} {shlex.quote(name)}" for weight, name in found)


def _absolute(name: str) -> str:
    file, colon, attribute = name.rpartition(":")
    return f"{os.path.abspath(os.path.expanduser(file))}:{attribute}" if colon and file.endswith(".py") else name
