"""Scores of answers by the functions of a reward group.

Functions are called in this process, with keywords, as verl calls them. A function of the user's own is called by the
thread that calls `score`, for one answer after another in their order, so that it may keep state and use signals
(math_verify's time-outs do); each rank has a copy of that state. One that is safe to call from `reward.num_workers`
threads at once, as it waits for a server, say, has an attribute that says so: `compute_score.concurrent = True`.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from scale_llm.config.reward import RewardFunctionConfig
from scale_llm.rewards.loading import RewardFunction, described, load_functions

MAX_ERRORS = 10
"""Distinct errors that are kept; later ones are counted together."""
FURTHER = "further errors"


class Item(NamedTuple):
    """One answer to score."""

    data_source: str
    answer: str
    ground_truth: Any = None
    extra_info: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    value: float
    """Sum of the functions' scores times their weights."""
    parts: dict[str, float] = field(default_factory=dict)
    """Each function's score without its weight, by `RewardFunction.name`; of functions that return a dictionary also
    its other numbers, as name/entry."""
    failed: int = 0
    """Functions that raised or returned no finite number; their parts are `reward.default`."""


class _Result(NamedTuple):
    score: float
    extra: dict[str, float]
    error: str | None


class Rewards:
    """The functions of a reward group, ready to score; the reward model of `reward.load` is no part of it.

    Raises:
        UserError: as `load_functions`.
    """

    def __init__(self, config: RewardFunctionConfig):
        self.functions = load_functions(config)
        self.errors: dict[str, int] = {}
        """file:line and text of the first errors of this object's life -> times; for a log."""
        self._default, self._workers = config.default, config.num_workers

    def score(self, items: list[Item]) -> list[Scored]:
        """One result for each item, in their order, whatever num_workers is."""
        columns = [self._results(function, items) for function in self.functions]
        for results in columns:
            for result in results:
                self._count(result.error)
        rows = list(zip(*columns, strict=True)) if columns else [()] * len(items)
        return [self._scored(row) for row in rows]

    def _results(self, function: RewardFunction, items: list[Item]) -> list[_Result]:
        def call(item: Item) -> _Result:
            return _call(function, item, self._default)

        if not function.concurrent or self._workers == 1 or len(items) < 2:
            return [call(item) for item in items]
        with ThreadPoolExecutor(min(self._workers, len(items)), thread_name_prefix=function.name) as pool:
            return list(pool.map(call, items))

    def _scored(self, results: tuple[_Result, ...]) -> Scored:
        parts: dict[str, float] = {}
        for function, result in zip(self.functions, results, strict=True):
            parts[function.name] = result.score
            parts.update({f"{function.name}/{entry}": number for entry, number in result.extra.items()})
        value = math.fsum(
            function.weight * result.score for function, result in zip(self.functions, results, strict=True)
        )
        return Scored(value=value, parts=parts, failed=sum(result.error is not None for result in results))

    def _count(self, error: str | None) -> None:
        if error is None:
            return
        if error not in self.errors and len(self.errors) >= MAX_ERRORS:
            error = FURTHER
        self.errors[error] = self.errors.get(error, 0) + 1


def _call(function: RewardFunction, item: Item, default: float) -> _Result:
    try:
        returned = function.call(
            data_source=item.data_source,
            solution_str=item.answer,
            ground_truth=item.ground_truth,
            extra_info=item.extra_info,
        )
    except Exception as error:
        return _Result(default, {}, f"{function.name}: {described(error)}")
    given = returned if isinstance(returned, dict) else {"score": returned}
    score = _number(given.get("score"))
    extra = {str(name): _number(value) for name, value in given.items() if name != "score"}
    numbers = {name: number for name, number in extra.items() if number is not None}
    if score is None:
        return _Result(default, numbers, f"{function.name}: returned {repr(returned)[:80]}, no finite number")
    return _Result(score, numbers, None)


def _number(value: Any) -> float | None:
    """The finite number that a bool, a number, or an array or tensor of one element is."""
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        number = float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several elements
        return None
    return number if math.isfinite(number) else None
