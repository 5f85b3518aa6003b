"""Contestants in processes of their own that take turns, so that a change in the machine's load meets all."""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from scale_llm.config.machine import detect

_TOOLS = Path(__file__).resolve().parents[1]


@dataclass(kw_only=True)
class Contestant:
    """build: "module:function" of a builder of steps, called with `arguments` in a new process.

    steps: steps of one round. seconds: of each round, for one step; cpu_seconds: of processors. done: what a step
    returned, in each round. facts: of the steps before the first round, if they return any. peak_gib: the most memory
    that its process has held.
    """

    name: str
    build: str
    arguments: dict = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    steps: int = 1
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    done: list[float] = field(default_factory=list)
    facts: list[dict[str, float]] = field(default_factory=list)
    peak_gib: float = 0.0

    @property
    def median_seconds(self) -> float:
        return median(self.seconds)

    @property
    def median_rate(self) -> float:
        """Done in a second."""
        return median(done / seconds for done, seconds in zip(self.done, self.seconds, strict=True))

    @property
    def median_cpu_rate(self) -> float:
        """Done in a second of a processor, whoever else has the machine."""
        return median(done / seconds for done, seconds in zip(self.done, self.cpu_seconds, strict=True))


def common_arguments(
    parser: argparse.ArgumentParser, rounds: int, precisions: Sequence[str] = ("bf16", "fp32")
) -> None:
    """Options of every benchmark that alternates. `rounds` and the first precision are defaults."""
    parser.add_argument("--precision", choices=precisions, default=precisions[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of every contestant (default: 2)")
    parser.add_argument(
        "--rounds", type=int, default=rounds, help=f"rounds of the alternation (default: {rounds}; medians of them)"
    )


def contestants_of(
    builders: str, steps: int, shared: dict, contestants: dict[str, tuple[str, dict]]
) -> list[Contestant]:
    """Contestants that differ in a few arguments. builders: their module; contestants: name -> (function, its own
    arguments beside the shared ones); functions called `ours` are told whether there is a compiler."""
    compiled = {"compiled": bool(detect().compiler)}
    return [
        Contestant(
            name=name, build=f"{builders}:{function}", steps=steps,
            arguments={**shared, **own, **(compiled if function == "ours" else {})},
        )
        for name, (function, own) in contestants.items()
    ]  # fmt: skip


class _Process:
    """A running worker: one line in, one line out."""

    def __init__(self, contestant: Contestant, threads: int):
        self.contestant = contestant
        self._errors = tempfile.TemporaryFile("w+")
        path = os.pathsep.join([str(_TOOLS), str(_TOOLS.parent), os.environ.get("PYTHONPATH", "")])
        environment = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path, **contestant.environment}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", contestant.build, json.dumps(contestant.arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **environment},
            text=True,
        )
        try:
            contestant.facts = self._read()["facts"]
        except BaseException:
            self.close()
            raise

    def round(self) -> None:
        self._process.stdin.write(f"{self.contestant.steps}\n")
        self._process.stdin.flush()
        found = self._read()
        self.contestant.seconds.append(found["seconds"] / self.contestant.steps)
        self.contestant.cpu_seconds.append(found["cpu_seconds"] / self.contestant.steps)
        self.contestant.done.append(found["done"] / self.contestant.steps)
        self.contestant.peak_gib = found["peak_gib"]

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"{self.contestant.name} failed:\n{self._errors.read()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


def alternate(contestants: list[Contestant], *, rounds: int, threads: int, say=print) -> None:
    """Starts all, then lets each run its steps once a round. Fills `seconds`, `facts` and `peak_gib` of
    every contestant."""
    for _ in turns([contestants], rounds=rounds, threads=threads, say=say):
        pass


Turns = list[dict[str, list[float]]]
"""Of each group: name -> seconds of a step in each of the group's rounds."""


def turns(
    groups: list[list[Contestant]], *, rounds: int, threads: int, say=print, failures: dict[str, str] | None = None,
    deadline: float | None = None,
) -> Iterator[Turns]:  # fmt: skip
    """Groups one after the other, the contestants of each in turns; yields what is known after every round.

    Whoever is in the next group, too, goes on; others end before it begins, so that their memory is free.
    failures: who fails is left out from then on and is named there with its error. None: any failure ends all.
    deadline: by time.time(); a group that has had two rounds gives way where those after it, each as long as it was,
    would end later.
    """
    running: dict[str, _Process] = {}
    found: Turns = []

    def attempt(name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (RuntimeError, OSError) as error:
            if failures is None:
                raise
            failures[name] = str(error)
            if name in running:
                running.pop(name).close()
            return None

    try:
        for number, group in enumerate(groups):
            began, later = time.time(), len(groups) - 1 - number
            for name in running.keys() - {contestant.name for contestant in group}:
                running.pop(name).close()
            found.append({})
            for contestant in group:
                name = contestant.name
                if name not in running and name not in (failures or {}):
                    say(f"starting {name}")
                    process = attempt(name, partial(_Process, contestant, threads))
                    running.update({name: process} if process else {})
            for index in range(rounds):
                for contestant in group:
                    if contestant.name in running:
                        attempt(contestant.name, running[contestant.name].round)
                    if contestant.name in running:
                        found[-1].setdefault(contestant.name, []).append(contestant.seconds[-1])
                latest = ", ".join(f"{name} {seconds[-1]:.3f} s" for name, seconds in found[-1].items())
                say(f"round {index + 1}/{rounds}: {latest}")
                yield found
                now = time.time()
                if deadline is not None and later and index and now + later * (now - began) > deadline:
                    break
    finally:
        for process in running.values():
            process.close()
