"""Faults in their order, each watched until the run is further than it was before."""

import json
import random
import sys
import time
from dataclasses import dataclass
from datetime import datetime

from chaos_run.faults import KINDS, SAID, Fault
from chaos_run.subject import Stuck, Subject


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One fault and what became of it. Seconds from the fault on: until it was in the timeline, and until the run had
    logged an iteration again. iterations_repeated: all; iterations_lost: by this fault, without a kill after it."""

    kind: str
    iteration: int
    detected: bool
    recovered: bool
    iterations_lost: int | None = None
    iterations_repeated: int | None = None
    seconds_to_detect: float | None = None
    seconds_to_recover: float | None = None
    seconds_a_step: float | None = None
    problem: str | None = None


def ordeal(peaceful: Subject, disturbed: Subject, planned: list[Fault], chance: random.Random) -> list[Result]:
    """What became of every fault; both runs are at their end then."""
    _say("the run in peace")
    peaceful.start()
    peaceful.wait_for("the end of the run in peace", lambda: peaceful.status == 0, 1800)
    disturbed.start()
    results = []
    for number, fault in enumerate(planned, 1):
        if KINDS[fault.kind].do is None:
            continue
        results.append(_one(disturbed, fault, chance))
        last = results[-1]
        _say(f"fault {number} of {len(planned)}: {KINDS[fault.kind].what} at iteration {last.iteration}: " +
             (f"{last.iterations_lost} iterations lost, on again in {last.seconds_to_recover:.1f} s"
              if last.recovered else str(last.problem)))  # fmt: skip
        if not last.recovered:
            disturbed.end()
            disturbed.start()
    try:
        disturbed.wait_for("the end of the run", lambda: disturbed.status == 0, 1800)
    except Stuck as error:
        _say(str(error))
    return results + [_nan(disturbed, fault) for fault in planned if KINDS[fault.kind].do is None]


def _one(run: Subject, fault: Fault, chance: random.Random) -> Result:
    kind = KINDS[fault.kind]
    try:
        run.wait_for(f"iteration {fault.iteration}", lambda: run.iteration() >= fault.iteration, 300)
    except Stuck as error:
        return Result(kind=fault.kind, iteration=fault.iteration, detected=False, recovered=False, problem=str(error))
    step = _seconds_a_step(run)
    time.sleep(chance.random() * step)
    events, lines = len(run.events("start", "end", "nan", "rewind")), len(run.output)
    at, began = run.iteration(), time.time()
    try:
        damaged = kind.do(run, chance)
        if damaged is not None or fault.kind in ("kill_in_save", "fill_disk"):  # they wait for a save
            at, began = max(at, run.iteration()), time.time()
        event = run.wait_for("its detection", lambda: _told(run, fault.kind, events), 120)
        resumed = run.wait_for("a resumed run", lambda: _resumed(run, lines), 120)
        run.wait_for("an iteration", lambda: run.iteration() > resumed, 120)
        recovered = time.time()
        if fault.kind in SAID and not any(SAID[fault.kind] in line for line in run.output[lines:]):
            raise Stuck(f"the output says nothing of {SAID[fault.kind]}")
    except (Stuck, KeyError, OSError) as error:
        return Result(kind=fault.kind, iteration=at, detected=False, recovered=False, problem=str(error))
    return Result(
        kind=fault.kind, iteration=at, detected=True, recovered=True, iterations_repeated=at - resumed,
        iterations_lost=(at if damaged is None else damaged) - resumed,
        seconds_to_detect=round(max(_time_of(event) - began, 0.0), 2), seconds_to_recover=round(recovered - began, 2),
        seconds_a_step=round(step, 3),
    )  # fmt: skip


def _told(run: Subject, kind: str, known: int) -> dict | None:
    """The event that tells of the fault, among those that are new."""
    new = run.events("start", "end", "nan", "rewind")[known:]
    return next((event for event in new if KINDS[kind].told(event)), None)


def _resumed(run: Subject, known: int) -> int | None:
    """The iteration that the newest start has gone on from; 0 is told as the number that it is."""
    for line in run.output[known:]:
        if line.strip().startswith("resumed at iteration "):
            return int(line.strip().removeprefix("resumed at iteration ").split(",")[0])
    return None


def _nan(run: Subject, fault: Fault) -> Result:
    told = any(event["iteration"] == fault.iteration + 1 for event in run.events("nan"))
    return Result(
        kind=fault.kind, iteration=fault.iteration + 1, detected=told, recovered=told, iterations_lost=0,
        problem=None if told else "the timeline has no event of it",
    )  # fmt: skip


def _seconds_a_step(run: Subject) -> float:
    """Of the last steps, as metrics.jsonl has them."""
    times = []
    for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()[-5:]:
        try:
            times.append(json.loads(line)["iteration-time"])
        except (ValueError, KeyError):
            continue
    return sorted(times)[len(times) // 2] if times else 0.1


def _time_of(event: dict) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
