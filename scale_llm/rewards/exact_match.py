"""1 for an answer that is the ground truth, white space aside."""

from collections.abc import Iterable
from typing import Any


def compute_score(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None) -> float:
    """1.0 where the whole answer is one of the accepted ones, otherwise 0.0. Case counts; white space at either end
    does not, and runs of it count as one space.

    Args:
        ground_truth: the right answer, or a list of answers that are all right.

    Raises:
        ValueError: the ground truth is null or an empty list.
    """
    return float(normalised(solution_str) in {normalised(answer) for answer in accepted(ground_truth)})


def accepted(ground_truth: Any) -> list[Any]:
    """The answers that a ground truth allows.

    Raises:
        ValueError: there is none.
    """
    several = isinstance(ground_truth, Iterable) and not isinstance(ground_truth, str | bytes | dict)
    answers = [answer for answer in (ground_truth if several else [ground_truth]) if answer is not None]
    if not answers:
        raise ValueError("the ground truth is null or empty; give a text or a list of accepted texts")
    return answers


def normalised(answer: Any) -> str:
    """Text with single spaces and none at its ends."""
    return " ".join(str(answer).split())
