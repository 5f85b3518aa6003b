"""The run that faults happen to: its command line, its processes, and what its files say of it."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from scale_llm.config import timeline

POLL_SECONDS = 0.005


class Stuck(RuntimeError):
    """What was waited for has not come."""


class Subject:
    """One run of the program on this machine; started again by its caller where its launcher is killed."""

    def __init__(self, words: list[str], run_dir: Path):
        self.words, self.run_dir = words, run_dir
        self.output: list[str] = []
        self._process: subprocess.Popen | None = None

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def start(self) -> None:
        """The command line, as a person or a scheduler gives it."""
        command = [sys.executable, "-m", "scale_llm.launch.cli", *self.words, f"run_dir={self.run_dir}"]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    def _read(self, pipe) -> None:
        for line in pipe:
            self.output.append(line.rstrip("\n"))

    @property
    def status(self) -> int | None:
        """Of the launcher; None while it is at work."""
        return self._process.poll()

    @property
    def launcher(self) -> int:
        return self._process.pid

    def ranks(self) -> dict[int, int]:
        """Rank -> process id of those that are alive."""
        found = {}
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self.launcher).children()
            for child in [*children, *(one for server in children for one in server.children())]:
                with contextlib.suppress(psutil.Error):
                    name, _, number = child.name().partition("_")
                    if name == "rank" and child.status() != psutil.STATUS_ZOMBIE:
                        found.setdefault(int(number), child.pid)  # a child of a rank has its name
        return found

    def iteration(self) -> int:
        """The last that metrics.jsonl has."""
        lines = self._lines("metrics.jsonl")
        for line in reversed(lines):
            with contextlib.suppress(ValueError, KeyError):
                return int(json.loads(line)["iteration"])
        return 0

    def _lines(self, name: str) -> list[str]:
        try:
            return (self.run_dir / name).read_text(encoding="utf-8").splitlines()
        except OSError:
            return []

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in timeline.read(self.run_dir) if event["event"] in kinds]

    def newest(self) -> Path | None:
        """The checkpoint that the tracker names."""
        with contextlib.suppress(OSError, ValueError):
            number = int((self.checkpoints / "latest_checkpointed_iteration.txt").read_text())
            path = self.checkpoints / f"iter_{number:07d}"
            return path if path.is_dir() else None
        return None

    def wait_for(self, what: str, condition: Callable[[], Any], seconds: float = 180, *, ended_is_well: bool = False):
        """What the condition gives, once it is true.

        Raises:
            Stuck: it did not become so, or the run has ended.
        """
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            ended = self.status is not None and not ended_is_well
            if ended or time.monotonic() > deadline:
                why = f"the run has ended with status {self.status}" if ended else f"{seconds:.0f} s have passed"
                raise Stuck(f"waited for {what}: {why}; the end of its output:\n" + "\n".join(self.output[-15:]))
            time.sleep(POLL_SECONDS)
        return found

    def end(self) -> None:
        """Kills what is left of it."""
        if self._process is not None and self._process.poll() is None:
            pids = [*self.ranks().values(), self.launcher]
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            self._process.wait()
