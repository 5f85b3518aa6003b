"""Which nodes of a job its ranks run on: those that are fit, in Slurm's order; the rest are spare."""

from pathlib import Path

from scale_llm.config.io import write_text
from scale_llm.config.run import RunConfig
from scale_llm.config.timeline import Event
from scale_llm.launch import restarts
from scale_llm.launch.environment import expand_hostlist
from scale_llm.launch.slurm import commands
from scale_llm.launch.slurm.allocation import Allocation

BAD_NODES = "bad_nodes"
"""Below a run directory: the nodes that preflight.sh has found bad, separated by commas."""

USED = "nodes"
"""Below a run directory: the nodes of the ranks of this start, in their order, separated by commas."""


def candidates(run_dir: Path, job: Allocation) -> list[str]:
    """Nodes of the allocation that are up and that no failure has been put down to."""
    allocated = expand_hostlist(job.node_list)
    lost = set(commands.down_nodes(allocated))
    suspects = {event["without"] for event in restarts.history(run_dir, job.job) if event.get("without")}
    return [node for node in allocated if node not in lost | suspects]


def fit(run_dir: Path, job: Allocation) -> list[str]:
    """The same without those that the preflight of this start has found bad."""
    bad = set((bad_nodes(run_dir) or "").split(","))
    return [node for node in candidates(run_dir, job) if node not in bad]


def bad_nodes(run_dir: Path) -> str | None:
    """Their names, separated by commas."""
    return _read(run_dir / BAD_NODES)


def to_exclude(cfg: RunConfig, run_dir: Path) -> str | None:
    """The bad nodes, unless several were asked and all are bad: the cause is then something they share, as a disk."""
    bad, nodes = bad_nodes(run_dir), cfg.cluster.nnodes + cfg.cluster.spare_nodes
    return None if bad is None or 1 < nodes <= len(bad.split(",")) else bad


def choose(cfg: RunConfig, run_dir: Path, job: Allocation) -> list[str]:
    """The nodes of this start, which `used` tells later; fewer than asked for where there are not enough."""
    chosen = fit(run_dir, job)[: cfg.cluster.nnodes]
    write_text(run_dir / USED, ",".join(chosen))
    return chosen


def used(run_dir: Path) -> list[str]:
    """Of the last start; empty where its ranks were never started."""
    return (_read(run_dir / USED) or "").split(",") if _read(run_dir / USED) else []


def node_of(rank: int, cfg: RunConfig, run_dir: Path) -> str | None:
    """Where a rank of the last start was."""
    nodes, place = used(run_dir), rank // (cfg.cluster.nproc_per_node or 1)
    return nodes[place] if place < len(nodes) else None


def suspect(cfg: RunConfig, events: list[Event], left: int) -> str | None:
    """The node to leave out from now on: it has failed twice in a row, or its rank did not answer. events: of this job,
    the last end among them; left: nodes that are fit."""
    ends = [event for event in events if event["event"] == "end"]
    node = ends[-1].get("node")
    again = len(ends) > 1 and ends[-2].get("node") == node
    return node if node and left > cfg.cluster.nnodes and (again or ends[-1].get("hang")) else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
