"""The forms of `data.path`: which paths it names, under which names, with which weights or epochs. No files are looked
at, but that a file whose name is a number stays a file.

    a.jsonl                                     one source
    [a.jsonl, b/]                               several, each as much as it holds
    [0.7, a.jsonl, 0.3, b/]                     with weights
    {web: a.jsonl, code: [b.jsonl, c.jsonl]}    with names
    {web: {path: a.jsonl, weight: 0.7}, code: {path: b/, weight: 0.3}}
    {web: a.jsonl, wiki: {path: b/, epochs: 2}} passes over a source for one pass over those that say nothing
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KEYS = ("path", "weight", "epochs")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One source as it is written."""

    name: str
    paths: tuple[str, ...]
    weight: float | None = None
    epochs: float | None = None


def read_entries(path: Any, temperature: float, remedy: str) -> tuple[list[Entry], list[str]]:
    """(entries of a `data.path` that is not None, everything that is wrong with it and its weights)."""
    if isinstance(path, Mapping):
        entries, problems = _named(path, remedy)
    else:
        entries, problems = _listed(path, remedy)
    return entries, problems + _mixed_forms(entries) + temperature_problems(entries, temperature)


def _named(path: Mapping, remedy: str) -> tuple[list[Entry], list[str]]:
    """Entries of {name: path} and {name: {path, weight, epochs}}."""
    if not path:
        return [], [f"data.path={{}}: names no source; {remedy}"]
    entries, problems = [], []
    for name, value in path.items():
        key = f"data.path.{name}"
        given = value if isinstance(value, Mapping) else {"path": value}
        problems += [
            f"{key}.{unknown}: no such key; a source has {', '.join(KEYS)}" for unknown in given if unknown not in KEYS
        ]
        weight, epochs = given.get("weight"), given.get("epochs")
        problems += [*_number_problems(f"{key}.weight", weight), *_number_problems(f"{key}.epochs", epochs)]
        found = given.get("path")
        if found is None:
            what = "a weight that names no source" if weight is not None else "names no source"
            problems.append(f"{key}: {what}; add {key}.path=FILE or remove the entry")
            continue
        paths = [found] if _is_path(found) else found
        if not isinstance(paths, Sequence) or not paths or not all(_is_path(each) for each in paths):
            problems.append(f"{key}.path={found!r}: must be a path or a list of paths; {remedy}")
            continue
        texts = tuple(os.fspath(each) for each in paths)
        entries.append(Entry(name=str(name), paths=texts, weight=_as_number(weight), epochs=_as_number(epochs)))
    return entries, problems


def _listed(path: Any, remedy: str) -> tuple[list[Entry], list[str]]:
    """Entries of a path or a list of paths, with a weight before each or before none."""
    items = [path] if isinstance(path, str | os.PathLike) else path
    if not isinstance(items, Sequence) or not items:
        return [], [f"data.path={path!r}: must be a path or a list of paths; {remedy}"]
    weights = [_as_weight(item) for item in items]
    if all(weight is None for weight in weights):
        return [_entry(item) for item in items if _is_path(item)], _not_paths(items, remedy)
    alternate = len(items) % 2 == 0 and all(
        (weight is not None) == (place % 2 == 0) for place, weight in enumerate(weights)
    )
    if not alternate:
        return [], [
            f"data.path={list(items)}: weights and paths do not alternate; give a weight before every path "
            "([0.7, a.jsonl, 0.3, b.jsonl]) or no weight at all"
        ]
    problems = [
        f"data.path={list(items)}: weight {weight} must be a finite number above 0; remove the entry or raise it"
        for weight in weights[::2]
        if weight is None or not math.isfinite(weight) or weight <= 0
    ]
    problems += _not_paths(items[1::2], remedy)
    pairs = zip(weights[::2], items[1::2], strict=True)
    return [_entry(item, weight) for weight, item in pairs if _is_path(item)], problems


def _entry(item: Any, weight: float | None = None) -> Entry:
    return Entry(name=os.fspath(item), paths=(os.fspath(item),), weight=weight)


def _mixed_forms(entries: list[Entry]) -> list[str]:
    """Shares that are given in two ways, or for some sources alone."""
    weighted = [entry.name for entry in entries if entry.weight is not None]
    repeated = [entry.name for entry in entries if entry.epochs is not None]
    if weighted and repeated:
        return [
            f"data.path: {', '.join(weighted)} with a weight and {', '.join(repeated)} with epochs; give every source "
            "a weight, or epochs where they are not 1"
        ]
    without = [entry.name for entry in entries if entry.weight is None]
    if weighted and without:
        return [
            f"data.path: {', '.join(weighted)} with a weight and {', '.join(without)} without; give every source a "
            "weight, or none"
        ]
    return []


def temperature_problems(entries: list[Entry], temperature: float) -> list[str]:
    """Temperatures that are none, or that something else excludes."""
    key = f"data.temperature={temperature:g}"
    if not math.isfinite(temperature) or temperature < 1:
        remedy = "give one"
        if 0 < temperature < 1:
            remedy = f"for an exponent of {temperature:g} give its inverse, {1 / temperature:.3g}"
        return [f"{key}: must be a finite number of at least 1, which leaves shares as they are; {remedy}"]
    if temperature == 1:
        return []
    if any(entry.weight is not None or entry.epochs is not None for entry in entries):
        what = "weights" if any(entry.weight is not None for entry in entries) else "epochs"
        return [f"{key}: data.path has {what}, which say the shares already; remove one of the two"]
    if len(entries) == 1:
        return [f"{key}: there is one source, {entries[0].name}; name several in data.path, or remove it"]
    return []


def _number_problems(key: str, value: Any) -> list[str]:
    number = _as_number(value)
    if value is None or (number is not None and math.isfinite(number) and number > 0):
        return []
    return [f"{key}={value}: must be a finite number above 0; remove the entry or raise it"]


def _as_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _as_weight(item: Any) -> float | None:
    """The number an item of a list is, or None; a file whose name is a number stays a file."""
    return None if isinstance(item, str) and os.path.exists(item) else _as_number(item)


def _is_path(item: Any) -> bool:
    return isinstance(item, str | os.PathLike) and bool(os.fspath(item))


def _not_paths(items: Sequence[Any], remedy: str) -> list[str]:
    return [f"data.path: {item!r} is not a path; {remedy}" for item in items if not _is_path(item)]
