"""The words of the command line, checked against the dataclasses before Hydra sees them: all problems at once."""

import dataclasses
import difflib
import functools
import os
import types
import typing
from enum import Enum
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException

from scale_llm.config.errors import UsageError
from scale_llm.config.store import GROUPS, SCHEMAS, STAGES, options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree:
    """What the words of one program may set."""

    root: str
    """File of conf/ that composition begins with, without its extension."""
    groups: tuple[str, ...]
    schemas: dict[str, tuple[type, ...]]
    """The dataclasses of a group's options."""
    top: dict[str, Any]
    """Keys outside groups, and their types."""
    hint: str
    """Where the keys are listed."""

    @functools.cached_property
    def keys(self) -> dict[str, Any]:
        """Every key a user may set, dotted, and its type."""
        keys = dict(self.top)
        for group, schemas in self.schemas.items():
            for schema in schemas:
                keys.update(_fields(group, schema))
        return keys


@functools.cache
def run_tree() -> Tree:
    """Of scale-llm itself."""
    schemas: dict[str, tuple[type, ...]] = {group: (schema,) for group, schema in SCHEMAS.items()}
    return Tree(
        root="config", groups=tuple(GROUPS), schemas={**schemas, "stage": tuple(STAGES.values())},
        top={"run_dir": str}, hint="scale-llm --help lists the groups, scale-llm --cfg job the keys",
    )  # fmt: skip


def parse(words: list[str], tree: Tree | None = None) -> list[Override]:
    """Overrides of known keys, groups and options; raises UsageError with every problem."""
    tree = tree or run_tree()
    overrides: list[Override] = []
    problems: list[str] = []
    parser = OverridesParser.create()
    for word in map(expand_home, words):
        try:
            override = parser.parse_override(word)
        except (OverrideParseException, HydraException) as error:
            problems.append(_syntax(word, error))
            continue
        problem = _group_problem(override, tree) if _is_group(override, tree) else _key_problem(override, tree)
        problems.extend([problem] if problem else [])
        overrides.append(override)
    if problems:
        raise UsageError(problems)
    return overrides


def expand_home(word: str) -> str:
    """key=~/x with the home directory: a shell leaves it as it is after a =, and Hydra's grammar refuses it."""
    key, _, value = word.partition("=")
    return f"{key}={os.path.expanduser(value)}" if value.startswith("~/") else word


def known_keys() -> dict[str, Any]:
    """Every key of a run that a user may set, dotted, and its type."""
    return run_tree().keys


def _fields(prefix: str, schema: type) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(kind):
            found.update(_fields(f"{prefix}.{name}", typing.cast(type, kind)))
        else:
            found[f"{prefix}.{name}"] = kind
    return found


def enum_of(kind: Any) -> type[Enum] | None:
    """The enum in a field's type, also where None is allowed."""
    parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return next((part for part in parts if isinstance(part, type) and issubclass(part, Enum)), None)


def word_of(override: Override, tree: Tree) -> str:
    """The override for Hydra: Megatron's spelling of an enum value (WSD, inverse-square-root) becomes its name."""
    word = str(override.input_line)
    enum = enum_of(tree.keys.get(override.key_or_group))
    if enum is None or override.is_sweep_override() or override.is_delete():
        return word
    key, _, value = word.partition("=")
    names = [member.name for member in enum if str(member.value) == value.strip("'\"")]
    return f"{key}={names[0]}" if names else word


def _is_group(override: Override, tree: Tree) -> bool:
    key = override.key_or_group
    return key in tree.groups or ("." not in key and key not in tree.top)


def _group_problem(override: Override, tree: Tree) -> str | None:
    group, value = override.key_or_group, override.value()
    if group not in tree.groups:
        return _unknown("key or group", str(override.input_line), group, [*tree.groups, *tree.keys], tree.hint)
    if override.is_add():
        return f"{override.input_line}: {group} has an option already; leave out the +: {group}={value}"
    if override.package is not None:
        return f"{override.input_line}: a group cannot be moved with @; give {group}=<option>"
    wanted = list(value.list) if override.is_sweep_override() and hasattr(value, "list") else [value]
    for option in wanted:
        name = "null" if option is None else str(getattr(option, "text", option))
        if not override.is_sweep_override() and isinstance(option, dict | list):
            return f"{override.input_line}: {group} takes the name of an option; one of {', '.join(options(group))}"
        if name not in options(group) and not override.is_delete():
            return _unknown("option", f"{group}={name}", name, options(group), tree.hint, f"{group}=")
    return None


def _key_problem(override: Override, tree: Tree) -> str | None:
    key = override.key_or_group
    if is_known(key, tree):
        return None
    if key.startswith("hydra"):
        return f"{override.input_line}: settings of Hydra itself have no effect here; leave it out"
    return _unknown("key", str(override.input_line), key, list(tree.keys), tree.hint)


def is_known(key: str, tree: Tree) -> bool:
    """Whether a word may set it: a group, a key, a part of a value of any type, or a whole table, as in
    data.fields={text: body}, which Hydra checks."""
    if key in tree.groups or key in tree.keys:
        return True
    inside = any(key.startswith(f"{known}.") for known, kind in tree.keys.items() if kind is Any)
    return inside or any(known.startswith(f"{key}.") for known in tree.keys)


def _unknown(what: str, word: str, given: str, known: list[str], otherwise: str, prefix: str = "") -> str:
    near = nearest(given, known)
    if near:
        hint = "did you mean " + " or ".join(prefix + name for name in near) + "?"
    elif len(known) < 30:
        hint = "one of " + ", ".join(known)
    else:
        hint = otherwise
    return f"{word}: unknown {what}; {hint}"


def nearest(given: str, known: list[str]) -> list[str]:
    """What the user may have meant: the same name in another group, else up to two names spelt alike."""
    leaf = given.rsplit(".", 1)[-1]
    elsewhere = [name for name in known if "." in name and name.rsplit(".", 1)[-1] == leaf]
    if elsewhere:
        return difflib.get_close_matches(given, elsewhere, n=2, cutoff=0.0)
    return difflib.get_close_matches(given, known, n=2, cutoff=0.65)


def _syntax(word: str, error: Exception) -> str:
    if "=" not in word and not word.startswith("~"):
        return f"{word}: not of the form key=value; scale-llm --help shows examples"
    first = str(error).strip().splitlines()[0]
    return f"{word}: cannot be read ({first}); quote values with special characters: \"key='value'\""


def given_keys(words: list[str]) -> set[str]:
    """Keys and groups that the words set."""
    return {override.key_or_group for override in parse(words)}
