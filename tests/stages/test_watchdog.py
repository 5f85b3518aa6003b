"""When a rank that makes no progress is ended, and what it leaves. The clock is the test's, so that no load matters."""

import tempfile
from collections.abc import Callable

import pytest

from scale_llm.stages.health import watchdog as module
from scale_llm.stages.health.watchdog import POLL_SECONDS, Hang, Watchdog


class Ended(Exception):
    """In place of the process' end."""


@pytest.fixture
def watched(monkeypatch):
    """Makes a watchdog (slack 8 s, 600 s for what is new) and plays a script to it: at seconds from the start, what the
    rank does then. Returns (watchdog, play, log)."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    log = tempfile.TemporaryFile("w+")

    def hung(error: Exception):
        assert isinstance(error, Hang)
        raise Ended

    watchdog = Watchdog(log, hung, slack_seconds=8.0, first_seconds=600.0)

    def play(script: list[tuple[float, Callable[[], None]]], until: float, jump: float = POLL_SECONDS) -> float:
        left = list(script)

        def wait(seconds: float) -> bool:
            now[0] += jump
            while left and left[0][0] <= now[0]:
                left.pop(0)[1]()
            return now[0] > until

        monkeypatch.setattr(watchdog._stop, "wait", wait)
        try:
            watchdog._watch()
        finally:
            watchdog.close()
        return now[0]

    return watchdog, play, log, now


def steps(watchdog: Watchdog, count: int, seconds: float) -> list[tuple[float, Callable[[], None]]]:
    return [(i * seconds, lambda i=i: watchdog.enter("a step", i)) for i in range(1, count + 1)]


def test_a_step_that_never_ends(watched):
    """Steps of 2 s: found 6 s and the slack after the last began; the log says what every thread was doing."""
    watchdog, play, log, now = watched
    with pytest.raises(Ended):
        play(steps(watchdog, 5, 2.0), until=100)
    began = 10.0  # the fifth
    assert began + 14 < now[0] < began + 16
    assert watchdog.limit("a save") == 600.0, "what has not been seen yet has time"
    log.seek(0)
    text = log.read()
    assert "no progress: a step after iteration 5 has taken 14." in text
    assert "test_watchdog.py" in text and "most recent call first" in text


def test_progress_keeps_it_quiet(watched):
    """Also a step that takes almost three times the longest and the slack, a save, and the next step."""
    watchdog, play, _, now = watched
    script = [*steps(watchdog, 3, 2.0), (19.0, lambda: watchdog.enter("a save", 3)),
              (400.0, lambda: watchdog.enter("a step", 3))]  # fmt: skip
    assert play(script, until=430) > 430, "the step of 13 s has raised the limit of steps to 47 s"


def test_time_that_the_process_was_stopped_does_not_count(watched):
    """A poll that comes an hour late: the process, or the machine, slept."""
    watchdog, play, _, now = watched
    watchdog._wait_limit = 8.0
    play([], until=3 * 3600, jump=3600.0)
    assert watchdog._waited < 8.0
