"""Where the time of an iteration goes, under verl's names: `timing_s/<part>` in seconds."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from scale_llm.parallel.ranges import named

PREFIX = "timing_s/"
WAIT = "wait"
"""Waiting for other ranks' numbers."""


class Timing:
    """Seconds of the parts of one iteration on this rank."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        with named(name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def over_ranks(parts: list[dict[str, float]]) -> dict[str, float]:
    """Of every part the seconds of the rank that took longest; of waiting, the mean of all ranks."""
    names = dict.fromkeys(name for part in parts for name in part)
    found = {PREFIX + name: max(part.get(name, 0.0) for part in parts) for name in names}
    return {**found, PREFIX + WAIT: sum(part.get(WAIT, 0.0) for part in parts) / len(parts)}
