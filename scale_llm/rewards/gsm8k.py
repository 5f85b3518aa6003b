"""1 for the right number at the end of an answer, as in GSM8K (Cobbe et al. 2021, arXiv 2110.14168).

verl's `gsm8k` compares the digits as text and knows "strict" and "flexible"; here they are compared as numbers, so that
18.00 is 18 and $1,080 is 1080.
"""

import re
from decimal import Decimal
from typing import Any

NUMBER = re.compile(
    r"""(?P<sign>(?<![\w.)])[-\u2212])?    # no sign: the minus of 10-5
        (?:[$\u20ac\u00a3]\s?(?P<late>[-\u2212])?)?
        (?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)""",
    re.VERBOSE,
)
MARK = "####"


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, *, flexible: bool = False
) -> float:
    """1.0 where the answer's number is the ground truth's, otherwise 0.0.

    The number is the first one after the last "####"; without that mark there is none, or (flexible) the last number of
    the text. Currency signs, thousands' commas, units and a full stop do not matter.

    Args:
        ground_truth: a number, text that ends in one, or a whole answer of GSM8K with its "####".

    Raises:
        ValueError: the ground truth holds no number.
    """
    expected = final_number(str(ground_truth), flexible=True)
    if expected is None:
        raise ValueError(f"ground truth {str(ground_truth)[:80]!r} holds no number; gsm8k needs one")
    return float(final_number(solution_str, flexible=flexible) == expected)


def final_number(text: str, *, flexible: bool) -> Decimal | None:
    """The number that an answer comes to, or None."""
    _, mark, after = text.rpartition(MARK)
    if mark and (match := NUMBER.search(after)):
        return _value(match)
    if not flexible:
        return None
    matches = list(NUMBER.finditer(text))
    return _value(matches[-1]) if matches else None


def _value(match: re.Match[str]) -> Decimal:
    number = Decimal(match["digits"].replace(",", ""))
    return number.copy_negate() if match["sign"] or match["late"] else number
