"""How tokens may be drawn: what is wrong with the numbers, for whoever samples."""

import math
from collections.abc import Sequence

from scale_llm.config.data import TooLong
from scale_llm.config.run import RunConfig


def sampling_problems(
    *, temperature: float, top_k: int, top_p: float, max_new_tokens: int, stop_strings: Sequence[str], prefix: str = ""
) -> list[str]:
    """A sentence for every value that is out of range. prefix: of the keys, such as `stage.`."""
    found = []
    if not 0.0 <= temperature < math.inf:
        found.append(f"temperature={temperature}: must be 0 (the likeliest token) or larger; 1 is usual")
    if top_k < 0:
        found.append(f"top_k={top_k}: give 0 for all tokens, or how many of the likeliest")
    if not 0.0 < top_p <= 1.0:
        found.append(f"top_p={top_p}: is a share of probability; give a number above 0 and at most 1")
    if max_new_tokens < 1:
        found.append(f"max_new_tokens={max_new_tokens}: must be at least 1; give a larger number")
    if "" in stop_strings:
        found.append("stop_strings: holds an empty text, which every text contains; leave it out")
    return [prefix + problem for problem in found]


def prompt_problems(cfg: RunConfig, max_new_tokens: int) -> list[str]:
    """What keeps prompts from being answered whole."""
    found = []
    if max_new_tokens >= cfg.model.seq_length:
        found.append(
            f"stage.max_new_tokens={max_new_tokens}: leaves no room for a prompt in model.seq_length="
            f"{cfg.model.seq_length}; lower it, or raise model.seq_length"
        )
    if cfg.data.on_too_long is TooLong.truncate:
        found.append(
            "data.on_too_long=truncate: a prompt that is cut off asks something else; set data.on_too_long=drop or fail"
        )
    return found
