"""The number at the end of an answer."""

import json
from decimal import Decimal

import pytest

from scale_llm.rewards.gsm8k import compute_score, final_number


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("so 5 + 5\n#### 10", 10, 10),
        ("#### 1,080", 1080, 1080),
        ("#### 1,234,567.50", "1234567.5", "1234567.5"),
        ("#### $18.00", 18, 18),
        ("#### -$3", -3, -3),
        ("#### $-3", -3, -3),
        ("#### \u22127", -7, -7),
        ("#### .5", "0.5", "0.5"),
        ("#### 72 clips.", 72, 72),
        ("#### 72.", 72, 72),
        ("#### **72**", 72, 72),
        ("####72", 72, 72),
        ("#### 10%", 10, 10),
        ("#### \\boxed{9}", 9, 9),
        ("#### 3\n#### 4", 4, 4),
        ("#### x = 12 km", 12, 12),
        ("The answer is 12.", None, 12),
        ("She has 5 apples, 12 pears.", None, 12),
        ("That leaves 10-4", None, 4),
        ("It is (3)-2", None, 2),
        ("It is -4 degrees", None, -4),
        ("- 5 apples", None, 5),
        ("between 1,2 and 3", None, 3),
        ("7 of them ####", None, 7),
        ("#### none, but 7 before", 7, 7),
        ("no number", None, None),
        ("", None, None),
    ],
)
def test_the_final_number(text, strict, flexible):
    expected = [None if number is None else Decimal(number) for number in (strict, flexible)]
    assert [final_number(text, flexible=False), final_number(text, flexible=True)] == expected


def test_numbers_are_compared_not_their_digits():
    assert compute_score("", "#### 18.00", "18") == 1.0
    assert compute_score("", "#### 1080", "#### 1,080") == 1.0
    assert compute_score("", "#### 1080", 1080) == 1.0
    assert compute_score("", "#### 18.01", "18") == 0.0
    assert compute_score("", "it is 18", "18") == 0.0
    assert compute_score("", "it is 18", "18", flexible=True) == 1.0


def test_a_ground_truth_without_a_number_is_an_error():
    with pytest.raises(ValueError, match="'unknown' holds no number"):
        compute_score("", "#### 1", "unknown")


def test_real_answers(gsm8k):
    """Each of GSM8K's own answers is right for itself, and for the next row only where the numbers are the same."""
    with open(gsm8k, encoding="utf-8") as file:
        answers = [json.loads(line)["answer"] for line in file]
    numbers = [answer.rpartition("#### ")[2].replace(",", "") for answer in answers]
    for place, (answer, number) in enumerate(zip(answers, numbers, strict=True)):
        other = (place + 1) % len(answers)
        for flexible in (False, True):
            assert compute_score("gsm8k", answer, number, flexible=flexible) == 1.0, answer
            assert compute_score("gsm8k", answer, answer, flexible=flexible) == 1.0, answer
            same = float(number) == float(numbers[other])
            assert compute_score("gsm8k", answer, answers[other], flexible=flexible) == same, answer
        # as a model writes it that was not taught the mark
        assert compute_score("gsm8k", f"So the answer is ${number}.", answer, flexible=True) == 1.0, answer
