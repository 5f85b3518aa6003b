"""<run_dir>/timeline.jsonl: what happens to a run beside its training, a line each. No torch.

{"event": "start", "time": ..., "job": "17", "restart": 1, "nodes": "n[1-2]", "iteration": 40}
{"event": "end", "time": ..., "job": "17", "status": 75, "reason": "stopped by a signal", "action": "requeue"}
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

FILE = "timeline.jsonl"

Event = dict[str, Any]


def read(run_dir: Path | str) -> list[Event]:
    """All events, oldest first; a line that was cut by a crash is left out."""
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
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events


def append(run_dir: Path | str, event: str, **facts: Any) -> Event:
    """Write one event; a line is one write, so that a crash cuts at most the last."""
    row = {"event": event, "time": datetime.now().isoformat(sep=" ", timespec="milliseconds"), **facts}
    path = Path(run_dir) / FILE
    line = json.dumps(row) + "\n"
    with open(path, "a+b") as file:
        if file.tell() and not _ends_a_line(file):
            line = "\n" + line  # a crash has cut the last one
        file.write(line.encode())
    return row


def _ends_a_line(file) -> bool:
    file.seek(-1, 2)
    return file.read(1) == b"\n"


def in_words(event: Event) -> str:
    """One event as a line of a table."""
    facts = [f"{name} {value}" for name, value in event.items() if name not in ("event", "time") and value is not None]
    return ", ".join(facts)
