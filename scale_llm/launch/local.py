"""The ranks of one run on this machine, started again after a failure that another start may not meet."""

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from scale_llm.config import timeline
from scale_llm.config.cluster import Device
from scale_llm.config.errors import numbered
from scale_llm.config.exit_status import HUNG
from scale_llm.config.run import RunConfig
from scale_llm.launch import restarts
from scale_llm.launch.environment import rank_variables
from scale_llm.launch.failures import first_failure, how_it_ended, is_for_a_person, text_of, user_problems
from scale_llm.launch.processes import Outcome, prepare_start, run_ranks
from scale_llm.launch.rank import failure_text
from scale_llm.launch.reached import iteration

KILLED = "killed with its launcher"
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def launch(cfg: RunConfig) -> int:
    """Run all ranks to their end; returns the exit status (130 after Ctrl-C, as shells have it)."""
    with _remembered() as asked:
        return _launch(cfg, asked)


def _launch(cfg: RunConfig, asked: list[int]) -> int:
    set_environment(cfg)
    prepare_start(cfg)
    from torch.distributed.elastic.multiprocessing import SignalException

    job = f"process {os.getpid()}"
    _after_kill(cfg)
    try:
        return _starts(cfg, job, asked)
    except (SignalException, KeyboardInterrupt) as error:
        number = int(getattr(error, "sigval", signal.SIGINT))
        name = signal.Signals(number).name
        timeline.append(cfg.run_dir, "end", job=job, status=128 + number, reason=f"stopped by {name}",
                        iteration=iteration(cfg), action="stop")  # fmt: skip
        print(f"stopped by {name}; the same command resumes {cfg.run_dir}", file=sys.stderr)
        return 128 + number


def _starts(cfg: RunConfig, job: str, asked: list[int]) -> int:
    """One start after another, until one ends well or another would not help."""
    for number in range(10**9):
        begun = iteration(cfg)
        timeline.append(cfg.run_dir, "start", job=job, restart=number, nodes=socket.gethostname(), iteration=begun)
        outcome = run_ranks(cfg, asked)
        if not outcome.failures:
            timeline.append(cfg.run_dir, "end", job=job, status=0, iteration=iteration(cfg), action="done")
            return 0
        rank, failure = first_failure(outcome.failures)
        facts = end_of(rank, failure, outcome, reached=iteration(cfg), begun=begun)
        events = [*restarts.history(cfg.run_dir, job), {"event": "end", **facts}]
        decision = restarts.decide(events, cfg.cluster.max_restarts or 0)
        delay = restarts.delay_in_place(decision.alike) if decision.again else None
        action = "restart" if decision.again else "stop"
        timeline.append(cfg.run_dir, "end", job=job, **facts, action=action, delay_seconds=delay)
        _report(cfg, rank, failure, outcome)
        if not decision.again:
            if decision.alike >= restarts.SAME:
                print(decision.reason, file=sys.stderr)
            print("the same command resumes from the last checkpoint", file=sys.stderr)
            return failure.exitcode if failure.exitcode > 0 else 1
        wait = f" in {delay} s" if delay else ""
        of = f"restart {number + 1}, at most {cfg.cluster.max_restarts} (cluster.max_restarts)"
        print(f"starting again from the last checkpoint{wait}: {of}", file=sys.stderr, flush=True)
        time.sleep(delay or 0)
    raise AssertionError("unreachable")


def end_of(rank: int, failure: Any, outcome: Outcome, *, reached: int, begun: int) -> dict[str, Any]:
    """The facts of a failure, for the timeline. An error that a person has to mend is final, and so is one of the code
    that comes before anything was done: another start would meet both."""
    code = failure.exitcode
    facts: dict[str, Any] = {"status": code if code > 0 else 128 - code, "iteration": reached, "rank": rank}
    problems = user_problems(failure.message)
    if problems:
        return {**facts, "reason": "; ".join(problems), "final": is_for_a_person(failure.message)}
    if code == HUNG:
        waited = ", ".join(map(str, outcome.silent))
        return {**facts, "reason": f"no progress; waited for rank {waited}" if waited else "no progress", "hang": True}
    if code < 0:
        return {**facts, "reason": f"rank {rank} {how_it_ended(code)}"}
    first_line = (text_of(failure.message).splitlines() or [how_it_ended(code)])[0]
    return {**facts, "reason": first_line, "final": reached <= begun}


def _report(cfg: RunConfig, rank: int, failure: Any, outcome: Outcome) -> None:
    """Say what failed first; a UserError as its problems, anything else with the end of that rank's log."""
    problems = user_problems(failure.message)
    if problems:
        print(numbered(problems), file=sys.stderr)
        return
    status = failure.exitcode
    for silent in outcome.silent:
        print(f"\nrank {silent} did not answer; {failure_text(cfg.run_dir, silent)}", file=sys.stderr)
    print(f"\nrank {rank} {how_it_ended(status)}; {failure_text(cfg.run_dir, rank)}", file=sys.stderr)
    if status == -signal.SIGKILL:
        print("a SIGKILL from outside is most often the machine running out of memory", file=sys.stderr)


def _after_kill(cfg: RunConfig) -> None:
    """A launcher that was killed could not say so: it is said now."""
    events = restarts.history(cfg.run_dir)
    ended = restarts.with_killed(events, iteration(cfg), KILLED)
    if len(ended) > len(events):
        facts = {name: value for name, value in ended[-1].items() if name != "event"}
        timeline.append(cfg.run_dir, "end", **facts, action="stop")


@contextmanager
def _remembered() -> Iterator[list[int]]:
    """Whether Ctrl-C was pressed. It is raised as ever, but where that happens within a callback, of which imports
    have thousands, Python drops it.

    The handlers are put back: torch's elastic package sets some and leaves them, and a sweep goes on after this run.
    """
    before, asked = {number: signal.getsignal(number) for number in HANDLED}, list[int]()

    def remember(number: int, frame: Any) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    if before[signal.SIGINT] is signal.default_int_handler:
        signal.signal(signal.SIGINT, remember)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def set_environment(cfg: RunConfig) -> None:
    """Variables of the ranks."""
    os.environ.update(rank_variables(cfg))
    if cfg.cluster.device is Device.cpu:
        # gloo else takes the host name's address, which containers and laptops often cannot reach
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
