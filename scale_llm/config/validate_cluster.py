"""What sbatch would refuse, or take and not mean: found before a job is in the queue."""

import re

from scale_llm.config.cluster import ClusterConfig, Launcher

SIGNAL = re.compile(r"(?:SIG)?(?P<name>[A-Z]+[0-9]*)(?:@(?P<seconds>[0-9]+))?")


def cluster_problems(cluster: ClusterConfig) -> list[str]:
    """Problems of a job's keys; without Slurm none of them is read."""
    found = _nodes(cluster) + _spare(cluster)
    if cluster.launcher is not Launcher.slurm:
        return found
    return [*found, *_signal(cluster), *_time(cluster), *_lists(cluster)]


def _nodes(cluster: ClusterConfig) -> list[str]:
    if cluster.nodes in (None, cluster.nnodes):
        return []
    return [f"cluster.nodes={cluster.nodes}: is cluster.nnodes={cluster.nnodes} under Slurm's name; give one of them"]


def _spare(cluster: ClusterConfig) -> list[str]:
    if cluster.spare_nodes == 0 or cluster.launcher is Launcher.slurm:
        return []
    return [f"cluster.spare_nodes={cluster.spare_nodes}: only a job of Slurm has nodes to spare; set it to 0, or take "
            "cluster=slurm"]  # fmt: skip


def _signal(cluster: ClusterConfig) -> list[str]:
    what = f"cluster.signal={cluster.signal}"
    if cluster.signal.startswith(("B:", "R:")):
        return [f"{what}: the ranks themselves take the signal; leave out {cluster.signal[:2]}"]
    found = SIGNAL.fullmatch(cluster.signal)
    # TERM ends stages that have nothing to save, and INT ranks that do not listen yet; both mean another thing to Slurm
    if found is None or found["name"] != "USR1" or found["seconds"] is None:
        return [f"{what}: not the signal before the time limit, USR1, and seconds; give USR1@300"]
    return []


def _time(cluster: ClusterConfig) -> list[str]:
    if cluster.time is None:
        return []
    limit = seconds_of(cluster.time)
    if limit is None:
        return [f"cluster.time={cluster.time}: not a time of Slurm; give minutes, hours:minutes:seconds or days-hours"]
    found = SIGNAL.fullmatch(cluster.signal)
    early = int(found["seconds"] or 0) if found else 0
    if 0 < limit <= early:
        return [
            f"cluster.time={cluster.time}: no longer than the {early} seconds of cluster.signal={cluster.signal}, so "
            "that ranks would be told to stop as soon as they start; give a longer time or fewer seconds"
        ]
    return []


def _lists(cluster: ClusterConfig) -> list[str]:
    lists = {"sbatch_args": cluster.sbatch_args, "srun_args": cluster.srun_args}
    return [
        f"cluster.{key}=[{argument}]: not an option; begin it with a dash, such as --exclusive"
        for key, arguments in lists.items()
        for argument in arguments
        if not argument.startswith("-") or "\n" in argument
    ]


def seconds_of(time: str) -> int | None:
    """Slurm's times: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; 0 for no limit; None where it is none of these."""
    if time.lower() in ("unlimited", "infinite", "-1"):
        return 0
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if found is None:
        return None
    days, *rest = found.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is None:  # one part is minutes, two are minutes and seconds
        parts = [0, *parts] if len(parts) < 3 else parts
    hours, minutes, seconds = [*parts, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
