"""Lists of answers in order, best first: as listed, or by a rank or score of each."""

import math
from typing import Any, NamedTuple

from scale_llm.config.data import FieldsConfig
from scale_llm.data.chat.turns import RowError, wrong_type

RESPONSES = "responses"
"""Read where the field of answers is absent."""


class Ranked(NamedTuple):
    answers: list[tuple[str, Any]]
    """(where in the row, value), best first."""
    tied: int
    """Answers that were left out because they are as good as one before."""


def answers_field(values: dict[str, Any], fields: FieldsConfig) -> str | None:
    """The field that holds a list of answers, if there is one."""
    return next((name for name in (fields.answers, RESPONSES) if values.get(name) is not None), None)


def ranked(values: dict[str, Any], field: str, fields: FieldsConfig) -> Ranked:
    """The answers of a list. Of those that tie, the first one listed stays: the others are no better or worse."""
    answers = values[field]
    if not isinstance(answers, list):
        raise wrong_type(field, answers, "a list of answers")
    if len(answers) < 2:
        raise RowError(
            f"field {field!r} has {len(answers)} of the two or more answers that a comparison needs; remove the row",
            "too few answers",
        )
    keys = _keys(values, fields, field, len(answers))
    first: dict[float, int] = {}
    for place, key in enumerate(keys):
        first.setdefault(key, place)
    order = [first[key] for key in sorted(first)]
    return Ranked([(f"{field}[{place}]", answers[place]) for place in order], len(answers) - len(order))


def number(value: Any, where: str) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type(where, value, "a number")
    if not math.isfinite(value):
        raise RowError(f"{where} is {value}; it must be a finite number: change it", "bad number")
    return float(value)


def _keys(values: dict[str, Any], fields: FieldsConfig, field: str, count: int) -> list[float]:
    """A number for each answer, lower for better ones. Ranks go before scores."""
    for name, sign in ((fields.ranks, 1), (fields.scores, -1)):
        numbers = values.get(name)
        if numbers is None:
            continue
        if not isinstance(numbers, list):
            raise wrong_type(name, numbers, "a list of numbers")
        if len(numbers) != count:
            raise RowError(
                f"field {name!r} has {len(numbers)} numbers for {count} of {field!r}; give one for each answer",
                "wrong number of ranks",
            )
        return [sign * number(each, f"{name}[{place}]") for place, each in enumerate(numbers)]
    return [float(place) for place in range(count)]
