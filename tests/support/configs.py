"""Configurations by the words of the command line, for tests of what is done with them.

Hydra composes each choice of groups once (a third of a second); keys are then set on copies of it. What Hydra makes of
words is tested in tests/config/test_compose.py, which also holds this to it.
"""

import copy
import functools
import typing
from typing import Any

from scale_llm.config import overrides
from scale_llm.config.compose import compose
from scale_llm.config.run import RunConfig


def config_of(*words: str) -> RunConfig:
    """What `compose` gives, but for words that it refuses."""
    groups, keys = [], []
    for parsed in overrides.parse(list(words)):
        (keys if parsed.key_or_group in overrides.known_keys() else groups).append(parsed)
    cfg = copy.deepcopy(_composed(tuple(str(group.input_line) for group in groups)))
    for parsed in keys:
        *path, name = parsed.key_or_group.split(".")
        if path == ["precision"] and name in ("bf16", "fp16"):
            cfg.precision.auto = False
        owner = functools.reduce(getattr, path, cfg)
        assert hasattr(owner, name), f"{parsed.input_line}: of another stage"
        setattr(owner, name, _typed(parsed.value(), overrides.known_keys()[parsed.key_or_group]))
    return cfg


@functools.cache
def _composed(groups: tuple[str, ...]) -> RunConfig:
    return compose(list(groups))


def _typed(value: Any, kind: Any) -> Any:
    """As the dataclass has it: an enum by its value, a float also where a whole number is given, text as plain text."""
    enum = overrides.enum_of(kind)
    if enum is not None and value is not None:
        return next(member for member in enum if str(member.value) == str(value))
    kinds = typing.get_args(kind) or (kind,)
    if type(value) is int and float in kinds and int not in kinds:
        return float(value)
    if str in kinds and value is not None and not isinstance(value, list):
        return str(getattr(value, "text", value))
    return list(value) if isinstance(value, list) else value
