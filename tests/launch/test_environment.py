"""Under torchrun and srun a process is a rank already."""

import pytest

from scale_llm.config.compose import compose
from scale_llm.config.machine import Machine
from scale_llm.config.resolve import resolve
from scale_llm.launch.environment import cores_of_task, expand_hostlist, joined, rank_variables, tasks_per_node

MACHINE = Machine(cores=4, gpus=1, fast_bf16_cpu=False)
QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
PAGES = "THP_MEM_ALLOC_ENABLE"
TF32 = "NVIDIA_TF32_OVERRIDE"
SLURM = {
    "SLURM_JOB_ID": "40001",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_NODELIST": "gpu[09-11]",
}


def test_alone():
    assert joined({}) is None
    assert joined({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None, "a batch script is no task of a step"
    assert joined({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None, "one task starts its ranks itself"


def test_torchrun():
    env = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h",
           "MASTER_PORT": "1"}  # fmt: skip
    rank = joined(env)
    assert rank is not None and rank.variables() == env and rank.nnodes == 2


def test_srun():
    rank = joined(SLURM)
    assert rank is not None and rank.nnodes == 3
    assert rank.variables() == {
        "RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu09", "MASTER_PORT": "20001",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("cores", "variables", "threads"),
    [
        (4, {"SLURM_CPUS_ON_NODE": "8"}, 4),  # bound
        (8, {"SLURM_CPUS_ON_NODE": "8"}, 4),  # two tasks may run on all
        (8, {"SLURM_CPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "3"}, 3),
        (1, {"SLURM_CPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "3"}, 1),  # of sbatch, and srun was not told
    ],
)
def test_threads_of_a_task_are_its_own_cores(cores, variables, threads):
    own = cores_of_task(joined(SLURM), cores, variables)
    cfg = compose(["cluster.nproc_per_node=2"])
    machine = Machine(cores=cores, gpus=0, fast_bf16_cpu=False, cores_of_rank=own)
    assert resolve(cfg, machine).cluster.omp_num_threads == threads
    assert cores_of_task(None, cores, variables) is None


def test_the_batch_script_may_choose_the_rendezvous():
    rank = joined({**SLURM, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29501"})
    assert rank is not None and (rank.master_addr, rank.master_port) == ("10.0.0.7", 29501)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[1-2,05],m7", ["n1", "n2", "n05", "m7"]),
        ("r[1-2]n[08-09]x", ["r1n08x", "r1n09x", "r2n08x", "r2n09x"]),
    ],
)
def test_host_lists(text, hosts):
    assert expand_hostlist(text) == hosts


def test_tasks_per_node():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("") == []


@pytest.mark.parametrize(
    ("device", "precision", "names"),
    [
        ("cpu", "fp32", {"OMP_NUM_THREADS", PAGES}),
        ("cuda", "auto", {"OMP_NUM_THREADS", PAGES, QUEUES}),
        ("cuda", "fp32", {"OMP_NUM_THREADS", PAGES, QUEUES, TF32}),
    ],
)
def test_what_ranks_find_in_their_environment(device, precision, names, monkeypatch):
    for name in (QUEUES, PAGES, TF32):
        monkeypatch.delenv(name, raising=False)
    words = [f"cluster.device={device}", f"precision={precision}", "cluster.omp_num_threads=3"]
    cfg = resolve(compose(words), MACHINE)
    assert set(rank_variables(cfg)) == names and rank_variables(cfg)["OMP_NUM_THREADS"] == "3"
