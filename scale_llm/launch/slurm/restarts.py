"""<run_dir>/restarts.jsonl, one line for every start and every end, and what follows from it: again, or no more.

{"event": "start", "job": "17", "restart": 1, "time": ..., "nodes": "n[1-2]", "iteration": 40}
{"event": "end", ..., "status": 75, "reason": "stopped by a signal", "action": "requeue"}
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "restarts.jsonl"
SAME = 3
"""Ends alike at the same iteration that are taken for one cause, which another start will meet again."""
FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 10, 600
KILLED = "killed with its script: a lost node, scontrol requeue, or no memory left"

Event = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What to do after an end."""

    again: bool
    reason: str
    delay_seconds: int = 0


def history(run_dir: Path | str, job: str | None = None) -> list[Event]:
    """Events of one job, or of all; a line that was cut by a crash is left out."""
    try:
        lines = (Path(run_dir) / FILE).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and job in (None, event.get("job")):
            events.append(event)
    return events


def append(run_dir: Path | str, event: str, job: str, **facts: Any) -> None:
    """Write one event; a line is one write, so that a crash cuts at most the last."""
    row = {"event": event, "job": job, "time": time.strftime("%Y-%m-%d %H:%M:%S"), **facts}
    with open(Path(run_dir) / FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def with_killed(events: list[Event], iteration: int) -> list[Event]:
    """The same events and, where the last start never ended, the end that it could not write itself."""
    if not events or events[-1]["event"] != "start":
        return events
    end = {"event": "end", "job": events[-1]["job"], "status": 137, "reason": KILLED, "iteration": iteration}
    return [*events, end]


def decide(events: list[Event], max_restarts: int) -> Decision:
    """Whether to start again after the end that is the last of these events of one job."""
    ends = [event for event in events if event["event"] == "end"]
    last = ends[-1]
    alike = _alike(ends)
    where = f"at iteration {last['iteration']}"
    if alike >= SAME:
        return Decision(again=False, reason=f"{alike} ends alike {where}, so another start would not help: "
                                            f"{last['reason']}")  # fmt: skip
    if last.get("final"):
        return Decision(again=False, reason=last["reason"])
    if last.get("signal"):
        return Decision(again=True, reason=f"{last['reason']} {where}")
    failures = sum(not end.get("signal") for end in ends)
    if failures > max_restarts:
        return Decision(again=False, reason=f"restart {failures} is beyond cluster.max_restarts={max_restarts}: "
                                            f"{last['reason']} {where}")  # fmt: skip
    delay = min(FIRST_DELAY_SECONDS * 2 ** (alike - 1), LONGEST_DELAY_SECONDS)
    return Decision(again=True, reason=f"{last['reason']} {where}", delay_seconds=delay)


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
