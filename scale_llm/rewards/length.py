"""1 for an answer of the wished-for length, less the further it is from that."""

from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any = None, extra_info: Any = None, *, target_tokens: int
) -> float:
    """1.0 at `target_tokens`, falling in a straight line to 0.0 at no tokens and at twice the target.

    Args:
        extra_info: its "num_tokens" is the answer's length in tokens.

    Raises:
        ValueError: extra_info has no num_tokens.
    """
    if not extra_info or "num_tokens" not in extra_info:
        raise ValueError("extra_info has no num_tokens; length needs the answer's number of tokens there")
    return max(0.0, 1.0 - abs(extra_info["num_tokens"] - target_tokens) / target_tokens)
