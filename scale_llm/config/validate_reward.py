"""Whether the reward group can score anything. Pure: `scale_llm.rewards.loading` imports what users wrote."""

import difflib
import math
import re

from scale_llm.config.reward import SHIPPED, RewardFunctionConfig, WeightedFunction, weighted_functions


def reward_problems(reward: RewardFunctionConfig) -> list[str]:
    """Problems of the reward group, each `key=value: what is wrong; what to do`."""
    found = _number_problems(reward)
    if reward.function is None and reward.load is None:
        found.append(
            "reward.function=null, reward.load=null: nothing scores the answers; set reward.function=gsm8k (or "
            f"{', '.join(SHIPPED[1:])}, or path/to/file.py:name), or reward.load=<a reward run's run_dir>/checkpoints"
        )
    try:
        functions = weighted_functions(reward.function)
    except ValueError as error:
        return [*found, f"reward.function={reward.function}: {error}"]
    names = [function.name for function in functions]
    for name in sorted({name for name in names if names.count(name) > 1}):
        found.append(f"reward.function={reward.function}: {name} comes twice; name it once, with the sum of weights")
    found += [problem for function in functions for problem in name_problems(function.name)]
    return found + _option_problems(reward, functions)


def name_problems(name: str) -> list[str]:
    """What is wrong with the spelling of one function; nothing is looked for."""
    target, colon, attribute = name.rpartition(":")
    if not colon:
        return [] if name in SHIPPED else [f"reward.function={name}: {_unknown(name)}"]
    if not target or not attribute.isidentifier():
        return [
            f"reward.function={name}: no function after the file or module; write path/to/file.py:name or "
            "package.module:name"
        ]
    if not is_file(target) and not all(part.isidentifier() for part in target.split(".")):
        return [
            f"reward.function={name}: {target} is neither a file that ends in .py nor the name of a module; write "
            "path/to/file.py:name or package.module:name"
        ]
    return []


def is_file(target: str) -> bool:
    """Is this part before the colon a path, not a module?"""
    return target.endswith(".py")


def _unknown(name: str) -> str:
    if name.endswith(".py"):
        return f"names no function in the file; write {name}:compute_score, or whatever it is called there"
    near = difflib.get_close_matches(name, SHIPPED, n=2, cutoff=0.65)
    if near:
        return f"unknown function; did you mean {' or '.join(near)}?"
    own = "for one of your own write path/to/file.py:name or package.module:name"
    return f"unknown function; one of {', '.join(SHIPPED)}; {own}"


def _number_problems(reward: RewardFunctionConfig) -> list[str]:
    found = []
    if not 0 < reward.timeout_seconds < math.inf:
        found.append(f"reward.timeout_seconds={reward.timeout_seconds}: must be larger than 0; 10 is usual")
    if reward.memory_megabytes < 64:
        found.append(
            f"reward.memory_megabytes={reward.memory_megabytes}: less than Python itself needs; give 64 or more"
        )
    if reward.num_workers < 1:
        found.append(f"reward.num_workers={reward.num_workers}: must be at least 1; 1 scores one answer at a time")
    if not math.isfinite(reward.default):
        found.append(f"reward.default={reward.default}: not a finite number; 0 is usual")
    if not math.isfinite(reward.load_weight) or (reward.load is not None and reward.load_weight == 0):
        found.append(
            f"reward.load_weight={reward.load_weight}: must be a finite number other than 0; set reward.load=null to "
            "leave the reward model out"
        )
    if reward.length_target_tokens is not None and reward.length_target_tokens < 1:
        found.append(f"reward.length_target_tokens={reward.length_target_tokens}: must be at least 1; give more")
    return found


def _option_problems(reward: RewardFunctionConfig, functions: list[WeightedFunction]) -> list[str]:
    names, found = {function.name for function in functions}, []
    if "regex" in names and reward.regex_pattern is None:
        found.append("reward.regex_pattern=null: regex has nothing to look for; give reward.regex_pattern='<pattern>'")
    if "length" in names and reward.length_target_tokens is None:
        found.append("reward.length_target_tokens=null: length has no target; give the number of tokens that scores 1")
    if reward.regex_pattern is not None:
        try:
            re.compile(reward.regex_pattern)
        except re.error as error:
            found.append(f"reward.regex_pattern={reward.regex_pattern}: does not compile ({error}); correct it")
    return found
