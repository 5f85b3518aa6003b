"""Keys of a job: what sbatch would refuse or take and not mean."""

import pytest
from support.configs import config_of

from scale_llm.config.machine import node_of_job
from scale_llm.config.resolve import resolve
from scale_llm.config.validate import problems_of
from scale_llm.config.validate_cluster import cluster_problems, seconds_of


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("30", 1800), ("30:15", 1815), ("2:00:00", 7200), ("1-0", 86400), ("1-2:30", 95400), ("1-2:30:05", 95405),
        ("UNLIMITED", 0), ("soon", None), ("1:2:3:4", None), ("", None),
    ],
)  # fmt: skip
def test_times(time, seconds):
    assert seconds_of(time) == seconds


BAD = {
    "cluster.time=soon": ["cluster.time=soon"],
    "cluster.time=5: no longer than": ["cluster.time=5"],
    "cluster.signal=B:USR1@60: the ranks": ["cluster.signal=B:USR1@60"],
    "cluster.signal=KILL@60: not the signal": ["cluster.signal=KILL@60"],
    "cluster.signal=TERM@60: not the signal": ["cluster.signal=TERM@60"],
    "cluster.signal=INT@60: not the signal": ["cluster.signal=INT@60"],
    "cluster.signal=USR1: not the signal": ["cluster.signal=USR1"],
    "cluster.nodes=3: is cluster.nnodes=2": ["cluster.nodes=3", "cluster.nnodes=2"],
    "cluster.sbatch_args=[exclusive]: not an option": ["cluster.sbatch_args=[exclusive]"],
    "cluster.srun_args=[": ["cluster.srun_args=[x]"],
}


@pytest.mark.parametrize("problem", BAD)
def test_bad_values_are_named(problem):
    (found,) = cluster_problems(config_of("cluster=slurm", *BAD[problem]).cluster)
    assert found.startswith(problem)


@pytest.mark.parametrize("words", [["cluster.time=6"], ["cluster.time=0"], ["cluster.signal=SIGUSR1@30"], []])
def test_good_values(words):
    assert cluster_problems(config_of("cluster=slurm", *words).cluster) == []


def test_a_local_run_does_not_read_them():
    assert cluster_problems(config_of("cluster.time=soon", "cluster.signal=x").cluster) == []


def test_signs():
    words = ["cluster=slurm", "cluster.nodes=0", "cluster.max_restarts=-1", "cluster.cpus_per_task=0"]
    found = problems_of(resolve(config_of(*words), node_of_job(0)))
    assert {problem.split(":")[0] for problem in found} >= {
        "cluster.nodes=0", "cluster.max_restarts=-1", "cluster.cpus_per_task=0"
    }  # fmt: skip


def test_gpus_of_the_job_decide_the_device():
    cluster = resolve(config_of("cluster=slurm", "cluster.nodes=2", "cluster.gpus_per_node=4"), node_of_job(4)).cluster
    assert (cluster.device.value, cluster.nnodes, cluster.nproc_per_node) == ("cuda", 2, 4)
