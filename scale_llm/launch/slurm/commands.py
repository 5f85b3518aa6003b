"""Slurm's commands, and what they say of a job. No command is needed for anything but submitting and requeueing."""

import re
import shutil
import subprocess
from pathlib import Path

from scale_llm.config.errors import UserError

ALIVE = ("PENDING", "RUNNING", "SUSPENDED", "CONFIGURING", "COMPLETING", "REQUEUED", "RESIZING", "SIGNALING")
"""States of a job in the queue or at work."""

SECONDS = 60
"""A controller that is busy may take long; one that is gone must not hang us."""


def present(program: str) -> bool:
    return shutil.which(program) is not None


def output_of(*command: str) -> str | None:
    """Standard output of a command; None where it fails or is not there."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None


def needed(program: str) -> list[str]:
    """The problem of a machine without Slurm."""
    if present(program):
        return []
    return [
        f"cluster=slurm: {program} is not on the PATH; submit from a login node of the cluster, or run here with "
        "cluster=local (--dry-run prints the job script anywhere)"
    ]


def submit(script: Path) -> str:
    """The id of the job that sbatch made of a script; raises UserError with Slurm's own words."""
    try:
        result = subprocess.run(
            ["sbatch", "--parsable", str(script)], capture_output=True, text=True, timeout=SECONDS
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"cluster=slurm: sbatch does not answer ({error}); try again, or run sbatch {script}"
        ) from error
    if result.returncode:
        words = " ".join(result.stderr.split()) or f"status {result.returncode}"
        raise UserError(f"cluster=slurm: sbatch refuses {script} ({words}); change the cluster.* keys it names")
    return result.stdout.strip().split(";")[0]


def job_state(job: str) -> tuple[str, str] | None:
    """(state, reason or nodes) of a job by squeue, else by sacct; None where neither knows it."""
    text = output_of("squeue", "-h", "-t", "all", "-j", job, "-o", "%T|%r|%N")
    if text and text.strip():
        state, reason, nodes = text.splitlines()[0].split("|", 2)
        return state, nodes if reason in ("None", "") else reason
    text = output_of("sacct", "-n", "-X", "-P", "-j", job, "-o", "State,NodeList")
    if text and text.strip():
        state, _, nodes = text.splitlines()[-1].partition("|")
        return state.split(" ")[0], nodes
    return None


def is_alive(job: str) -> bool:
    """Whether a job is in the queue or at work."""
    found = job_state(job)
    return found is not None and found[0] in ALIVE


def down_nodes(names: list[str]) -> list[str]:
    """Those of these nodes that Slurm has lost."""
    shown = output_of("scontrol", "-o", "show", "node", ",".join(names)) if names else None
    found = []
    for line in (shown or "").splitlines():
        name, state = re.search(r"NodeName=(\S+)", line), re.search(r"\bState=(\S+)", line)
        if name is not None and state is not None and re.search(r"DOWN|FAIL|NOT_RESPONDING|\*", state[1]):
            found.append(name[1])
    return found


def address_of(node: str) -> str:
    """Where other nodes reach it: Slurm's name of it need not be known to DNS, its address is known to Slurm."""
    found = re.search(r"\bNodeAddr=(\S+)", output_of("scontrol", "-o", "show", "node", node) or "")
    return node if found is None else found[1]


def requeue(job: str, delay_seconds: int, exclude: str | None = None) -> str | None:
    """Put the running job back into the queue, to start no earlier than the delay; Slurm's words where it refuses.

    The delay is the job's start time, not a sleep of the script, which would hold its nodes.
    """
    problem = _run("scontrol", "requeue", job)
    if problem is None and delay_seconds:
        _run("scontrol", "update", f"JobId={job}", f"StartTime=now+{delay_seconds}")
    if problem is None and exclude:
        _run("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join([*excluded(job), exclude])}")
    return problem


def excluded(job: str) -> list[str]:
    """What the job leaves out already."""
    found = re.search(r"\bExcNodeList=(\S+)", output_of("scontrol", "-o", "show", "job", job) or "")
    return [] if found is None or found[1] == "(null)" else [found[1]]


def _run(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if result.returncode == 0 else " ".join(result.stderr.split())
