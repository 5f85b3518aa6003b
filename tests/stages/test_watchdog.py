"""When a rank that makes no progress is ended, and what it leaves."""

import io
import tempfile
import threading
import time

import pytest

from scale_llm.stages.health import watchdog as module
from scale_llm.stages.health.watchdog import Watchdog


class Log:
    """A file that faulthandler can write to."""

    def __init__(self):
        self.file = tempfile.TemporaryFile("w+")

    def text(self) -> str:
        self.file.seek(0)
        return self.file.read()


def watchdog_for(log: Log, slack: float = 0.3, first: float = 60.0) -> tuple[Watchdog, list]:
    found: list = []
    ended = threading.Event()

    def hung(error):
        found.append(error)
        ended.set()
        raise SystemExit  # of the watchdog's thread, where the real one ends the process

    watchdog = Watchdog(log.file, hung, slack_seconds=slack, first_seconds=first)
    found.append(ended)
    return watchdog, found


@pytest.mark.filterwarnings("ignore")
def test_a_step_that_never_ends(monkeypatch):
    """Steps of 0.1 s: the limit is 0.3 s and the slack."""
    monkeypatch.setattr(module, "POLL_SECONDS", 0.02)
    log = Log()
    watchdog, (ended, *_) = watchdog_for(log)
    watchdog.start()
    for iteration in range(4):
        watchdog.enter("a step", iteration)
        time.sleep(0.1)
    watchdog.enter("a step", 4)
    assert 0.55 < watchdog.limit("a step") < 1.5
    assert watchdog.limit("a save") == 60.0, "what has not been seen yet has time"
    began = time.monotonic()
    assert ended.wait(10)
    assert 0.5 < time.monotonic() - began < 3
    text = log.text()
    assert "no progress: a step after iteration 4 has taken" in text
    assert "test_watchdog.py" in text and "most recent call first" in text, "what every thread was doing"


def test_progress_keeps_it_quiet(monkeypatch):
    """Also a step that is longer than the others, within three times the longest."""
    monkeypatch.setattr(module, "POLL_SECONDS", 0.02)
    watchdog, (ended, *_) = watchdog_for(Log(), slack=0.2)
    watchdog.start()
    for seconds in (0.1, 0.1, 0.35, 0.1):
        watchdog.enter("a step", 1)
        time.sleep(seconds)
    watchdog.enter("a save", 1)
    time.sleep(0.3)
    watchdog.close()
    assert not ended.is_set()


def test_time_that_the_process_was_stopped_does_not_count(monkeypatch):
    """A poll that comes an hour late: the process, or the machine, slept."""
    clock = iter([0.0, 0.0, 3600.0, 3600.1, 7200.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    watchdog = Watchdog(io.StringIO(), lambda error: pytest.fail("no hang"), slack_seconds=8, first_seconds=8)
    polls = iter([False, False, False, True])
    monkeypatch.setattr(watchdog._stop, "wait", lambda seconds: next(polls))
    monkeypatch.setattr(module.faulthandler, "dump_traceback_later", lambda *arguments, **named: None)
    watchdog._watch()
    assert 4.0 < watchdog._waited < 4.2
