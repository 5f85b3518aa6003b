"""Whether to start again after an end: starts and ends are events of <run_dir>/timeline.jsonl."""

from dataclasses import dataclass
from pathlib import Path

from scale_llm.config import timeline
from scale_llm.config.timeline import Event

SAME = 3
"""Ends alike at the same iteration that are taken for one cause, which another start will meet again."""
FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 10, 600
KILLED = "killed with its script: a lost node, scontrol requeue, or no memory left"


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What to do after an end."""

    again: bool
    reason: str
    delay_seconds: int = 0
    alike: int = 1
    """Ends in a row with one reason at one iteration, this one included."""


def history(run_dir: Path | str, job: str | None = None) -> list[Event]:
    """Starts and ends of one job, or of all."""
    return [
        event
        for event in timeline.read(run_dir)
        if event["event"] in ("start", "end") and job in (None, event.get("job"))
    ]


def with_killed(events: list[Event], iteration: int, reason: str = KILLED) -> list[Event]:
    """The same events and, where the last start never ended, the end that it could not write itself."""
    if not events or events[-1]["event"] != "start":
        return events
    end = {"event": "end", "job": events[-1].get("job"), "status": 137, "reason": reason, "iteration": iteration}
    return [*events, end]


def decide(events: list[Event], max_restarts: int) -> Decision:
    """Whether to start again after the end that is the last of these events of one job."""
    ends = [event for event in events if event["event"] == "end"]
    last = ends[-1]
    alike = _alike(ends)
    where = f"at iteration {last['iteration']}"
    if alike >= SAME:
        return Decision(again=False, alike=alike, reason=f"{alike} ends alike {where}, so another start would not "
                                                         f"help: {last['reason']}")  # fmt: skip
    if last.get("final"):
        return Decision(again=False, alike=alike, reason=last["reason"])
    if last.get("signal"):
        return Decision(again=True, alike=alike, reason=f"{last['reason']} {where}")
    failures = sum(not end.get("signal") for end in ends)
    if failures > max_restarts:
        return Decision(again=False, alike=alike, reason=f"restart {failures} is beyond cluster.max_restarts="
                                                         f"{max_restarts}: {last['reason']} {where}")  # fmt: skip
    delay = min(FIRST_DELAY_SECONDS * 2 ** (alike - 1), LONGEST_DELAY_SECONDS)
    return Decision(again=True, alike=alike, reason=f"{last['reason']} {where}", delay_seconds=delay)


def delay_in_place(alike: int) -> int:
    """Seconds before ranks start again where they were: none at first, as nothing has to be waited for."""
    return 0 if alike <= 1 else 2 ** (alike - 2)


def _alike(ends: list[Event]) -> int:
    """How many of the last ends have one reason and one iteration.

    A stop by a signal counts too: a limit that comes before the first iteration would come so for ever.
    """
    key = (ends[-1]["reason"], ends[-1]["iteration"])
    count = 0
    for end in reversed(ends):
        if (end["reason"], end["iteration"]) != key:
            break
        count += 1
    return count


def count_restarts(events: list[Event]) -> int:
    """Starts after the first."""
    return max(0, sum(event["event"] == "start" for event in events) - 1)
