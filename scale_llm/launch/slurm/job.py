"""What slurm/job.sh asks of Python, on the first node of a job: python -m scale_llm.launch.slurm.job VERB ...

write WORDS...        compose inside the allocation, for sbatch slurm/train.sbatch; prints the run directory
begin RUN_DIR         refuse or record this start
preflight RUN_DIR     check the nodes, where cluster.preflight asks for it
options RUN_DIR       prints the address where ranks meet, then the options of srun, one a line
rank RUN_DIR          one task of srun: become its rank
end RUN_DIR STATUS    record the end; start again here, requeue the job, or say why not
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scale_llm.config import timeline
from scale_llm.config.errors import UserError, numbered
from scale_llm.config.exit_status import AGAIN_HERE
from scale_llm.config.io import load_config, write_text
from scale_llm.config.run import RunConfig
from scale_llm.launch import lock, reached, restarts
from scale_llm.launch.environment import expand_hostlist
from scale_llm.launch.slurm import commands, ending, nodes, submit, task
from scale_llm.launch.slurm.allocation import Allocation, allocation, fill, problems
from scale_llm.launch.slurm.script import scripts_dir, srun_arguments


def write(words: list[str]) -> int:
    """Everything but the last line goes to standard error."""
    from scale_llm.launch import runs

    job = allocation(os.environ)
    if not any(word.startswith("cluster=") for word in words):
        words = ["cluster=slurm", *words]
    with contextlib.redirect_stdout(sys.stderr):
        plan = runs.compose_run(words, fill=lambda cfg, given: fill(cfg, given, job))
        found = runs.problems(plan) + problems(plan.cfg, job)
        if not plan.is_job:
            found.append("cluster.launcher=local: this is a job of Slurm; leave out the group, or give cluster=slurm")
        if found:
            raise UserError(found)
        if found := others(plan.cfg.run_dir, job):
            raise UserError(found)
        submit.write_run(plan.cfg)
    print(os.path.abspath(plan.cfg.run_dir))
    return 0


def others(run_dir: str, job: Allocation) -> list[str]:
    """The problem of a directory that another job has. The lock's holder may be the last start of this one, dying."""
    if submit.recorded_job(run_dir) != job.job:
        return submit.busy(run_dir)
    if lock.is_held(run_dir) and lock.holder(run_dir).get("job") != job.job:
        return [lock.refusal(run_dir)]
    return []


def begin(words: list[str]) -> int:
    run_dir, job = Path(words[0]), allocation(os.environ)
    cfg = load_config(run_dir)
    if found := others(str(run_dir), job) + problems(cfg, job):
        raise UserError(found)
    submit.record_job(run_dir, job.job)
    if not _after_kill(cfg, run_dir, job):
        return 1
    ending.clear(run_dir)
    begun = reached.iteration(cfg, run_dir)
    timeline.append(run_dir, "start", job=job.job, restart=job.restart, nodes=job.node_list, iteration=begun)
    return 0


def _after_kill(cfg: RunConfig, run_dir: Path, job: Allocation) -> bool:
    """A start that was killed could not say so: it is said now, and counts like any other end."""
    events = restarts.history(run_dir, job.job)
    known = len(events)
    events = restarts.with_killed(events, reached.iteration(cfg, run_dir))
    if len(events) == known:
        return True
    decision = restarts.decide(events, cfg.cluster.max_restarts or 0)
    action = "requeue" if decision.again else "stop"
    facts = {name: value for name, value in events[-1].items() if name not in ("event", "job")}
    timeline.append(run_dir, "end", job=job.job, **facts, action=action)
    if not decision.again:
        print(f"stopped: {decision.reason}", file=sys.stderr)
    return decision.again


def preflight(words: list[str]) -> int:
    run_dir, job = Path(words[0]), allocation(os.environ)
    cfg = load_config(run_dir)
    there = nodes.candidates(run_dir, job)
    if len(there) < cfg.cluster.nnodes:
        gone = sorted(set(expand_hostlist(job.node_list)) - set(there))
        write_text(run_dir / nodes.BAD_NODES, ",".join(gone))
        print(f"preflight: {len(there)} nodes are left where cluster.nnodes={cfg.cluster.nnodes}", file=sys.stderr)
        return 1
    if not cfg.cluster.preflight:
        return 0
    command = ["bash", str(scripts_dir() / "preflight.sh"), str(run_dir), str(cfg.cluster.gpus_per_node or 0)]
    address = os.environ.get("MASTER_ADDR") or commands.address_of(there[0])
    variables = {"python": sys.executable, "nodes": ",".join(there), "MASTER_ADDR": address}
    status = subprocess.run(command, env={**os.environ, **variables}).returncode
    if status and nodes.bad_nodes(run_dir) and len(nodes.fit(run_dir, job)) >= cfg.cluster.nnodes:
        print("preflight: spare nodes take their place", flush=True)
        return 0
    return status


def srun_options(words: list[str]) -> int:
    run_dir, job = Path(words[0]), allocation(os.environ)
    cfg = load_config(run_dir)
    chosen = nodes.choose(cfg, run_dir, job)
    some = chosen if len(chosen) < job.nodes else []
    print("\n".join([commands.address_of(chosen[0]), *srun_arguments(cfg.cluster, some)]))
    return 0


def rank(words: list[str]) -> int:
    task.become_rank(Path(words[0]))


def end(words: list[str]) -> int:
    """Say how the ranks have ended, and have the job start again where that helps."""
    run_dir, status, job = Path(words[0]), int(words[1]), allocation(os.environ)
    cfg = load_config(run_dir)
    facts = ending.end_of(cfg, run_dir, status)
    status = facts["status"]
    if status == 0 or (facts.get("signal") and reached.is_done(cfg)):
        timeline.append(run_dir, "end", job=job.job, status=0, iteration=facts["iteration"], action="done")
        return 0
    events = [*restarts.history(run_dir, job.job), {"event": "end", **facts}]
    decision = restarts.decide(events, cfg.cluster.max_restarts or 0)
    state = commands.job_state(job.job)
    found = state[0] if state else None
    if decision.again and not facts.get("signal") and found in (None, "RUNNING"):
        left = nodes.fit(run_dir, job)
        without = nodes.suspect(cfg, events, len(left))
        if len(left) >= cfg.cluster.nnodes:
            return _again_here(run_dir, job, decision, facts, without)
    why_not = _why_not(cfg, decision, found)
    action = "requeue" if why_not is None else "stop"
    delay = {"delay_seconds": decision.delay_seconds} if action == "requeue" else {}
    timeline.append(run_dir, "end", job=job.job, **facts, action=action, **delay)
    if why_not is not None:
        print(f"not requeued: {why_not}\nsubmitting {run_dir} again resumes it", file=sys.stderr)
        return 1 if status == AGAIN_HERE else status  # a rank's own status must not start it again for ever
    return _requeue(cfg, run_dir, job.job, decision, status)


def _again_here(
    run_dir: Path, job: Allocation, decision: restarts.Decision, facts: dict[str, Any], without: str | None
) -> int:
    """The allocation is kept, and its ranks start again; job.sh does it."""
    delay = restarts.delay_in_place(decision.alike)
    timeline.append(run_dir, "end", job=job.job, **facts, action="restart", delay_seconds=delay, without=without)
    rest = f", without {without}" if without else ""
    later = f" in {delay} s" if delay else ""
    print(f"starting again in this job{rest}{later}: {decision.reason}", file=sys.stderr, flush=True)
    time.sleep(delay)
    return AGAIN_HERE


def _why_not(cfg: RunConfig, decision: restarts.Decision, state: str | None) -> str | None:
    """The reason not to requeue; None to do it."""
    if not decision.again:
        return decision.reason
    if not cfg.cluster.requeue:
        return f"{decision.reason} (cluster.requeue=false)"
    if state not in (None, "RUNNING"):  # scancel, or scontrol requeue by another hand: Slurm knows what comes next
        return f"{decision.reason}; Slurm has the job as {state}"
    return None


def _requeue(cfg: RunConfig, run_dir: Path, job: str, decision: restarts.Decision, status: int) -> int:
    later = f", in {decision.delay_seconds} s at the earliest" if decision.delay_seconds else ""
    print(f"requeued{later}: {decision.reason}", file=sys.stderr, flush=True)
    refused = commands.requeue(job, decision.delay_seconds, nodes.to_exclude(cfg, run_dir))
    if refused is None:
        return 0
    print(f"scontrol requeue {job}: {refused}; sbatch the same script again to go on", file=sys.stderr)
    return status


VERBS: dict[str, Callable[[list[str]], int]] = {
    "write": write, "begin": begin, "preflight": preflight, "options": srun_options, "rank": rank, "end": end,
}  # fmt: skip


def main() -> None:
    verb, words = sys.argv[1], sys.argv[2:]
    if verb in ("write", "begin", "options", "end"):
        # Slurm sends TERM to all of a job at once, also in answer to a requeue. These take a second, and what they know
        # would be lost; the ranks and the preflight are what is to stop.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        status = VERBS[verb](words)
    except UserError as error:
        _record(error)
        print(numbered(error.problems), file=sys.stderr)
        status = error.exit_status
    except Exception as error:
        _record(error)
        traceback.print_exc()
        status = 1
    sys.exit(status)


def _record(error: Exception) -> None:
    """A task that fails before it is a rank leaves what a rank leaves."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    message = {"message": f"{type(error).__name__}: {error}", "extraInfo": {"timestamp": str(int(time.time()))}}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")


if __name__ == "__main__":
    main()
