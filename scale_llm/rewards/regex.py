"""1 for an answer that holds a pattern: a format reward, or a way to take the result out of an answer.

The pattern is the run's, never a row's: the ground truth is compared as text, so that a full stop in it is a full stop.
Python's `re` cannot be interrupted; a pattern with nested repeats, such as (a+)+b, can take hours on some answers.
"""

import re
from typing import Any

from scale_llm.rewards.exact_match import accepted, normalised


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any = None, extra_info: Any = None, *, pattern: re.Pattern[str]
) -> float:
    """1.0 or 0.0. A pattern without groups must be found somewhere in the answer. With groups, the first group of the
    last match must be the ground truth (or one of a list), white space aside; with no ground truth, a match is enough.
    """
    matches = list(pattern.finditer(solution_str))
    if not matches:
        return 0.0
    if not pattern.groups or ground_truth is None:
        return 1.0
    return float(normalised(matches[-1][1] or "") in {normalised(answer) for answer in accepted(ground_truth)})
