"""The job script of a run, and what is refused before it is submitted. No Slurm is needed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scale_llm.config.io import load_config
from scale_llm.config.machine import Machine
from scale_llm.launch import lock
from scale_llm.launch.cli import main, run_command
from scale_llm.launch.runs import compose_run, problems
from scale_llm.launch.slurm.allocation import Allocation, allocation, fill
from scale_llm.launch.slurm.allocation import problems as allocation_problems
from scale_llm.launch.slurm.commands import ALIVE
from scale_llm.launch.slurm.script import render, srun_arguments
from scale_llm.launch.slurm.submit import busy, record_job, write_run
from scale_llm.launch.slurm.task import settle

RUN = ["cluster=slurm", "train.train_iters=1"]
NODE = Machine(cores=8, gpus=0, fast_bf16_cpu=True, compiler=True)
JOB = Allocation(job="5", restart=0, nodes=2, node_list="n[1-2]", cpus_per_node=4)


def composed(*words: str):
    return compose_run([*RUN, *words]).cfg


def head(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


def failing(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(list(words))
    assert exit_.value.code == 1
    return capsys.readouterr().err


def test_every_key_is_a_line_of_sbatch(tmp_path):
    cfg = composed(
        "cluster.nodes=4", "cluster.gpus_per_node=8", "cluster.time=1-12:00:00", "cluster.partition=gpu",
        "cluster.account=lab", "cluster.qos=high", "cluster.mem=0", "cluster.constraint='h100&ib'",
        "cluster.exclude='n[3-4]'", "cluster.nodelist='n[1-9]'", "cluster.cpus_per_task=14", "cluster.requeue=false",
        "cluster.signal=USR1@600", "cluster.sbatch_args=[--exclusive,'--mail-type=END']", f"run_dir={tmp_path}/r",
        "train.global_batch_size=32",
    )  # fmt: skip
    text = render(cfg)
    assert head(text) == [
        "--job-name=pretrain-tiny-4n8g-dp", "--partition=gpu", "--account=lab", "--qos=high", "--time=1-12:00:00",
        "--nodes=4", "--ntasks-per-node=8", "--cpus-per-task=14", "--gpus-per-node=8", "--mem=0",
        '--constraint="h100&ib"', "--exclude=n[3-4]", "--nodelist=n[1-9]", "--signal=USR1@600",
        f"--chdir={os.getcwd()}", f"--output={tmp_path}/r/logs/job-%j.out", "--open-mode=append", "--no-requeue",
        "--exclusive", "--mail-type=END",
    ]  # fmt: skip
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert srun_arguments(cfg.cluster) == [
        "--nodes=4", "--ntasks=32", "--ntasks-per-node=8", "--cpus-per-task=14", "--gpu-bind=none"
    ]  # fmt: skip


def test_what_is_not_asked_for_is_left_to_the_cluster():
    names = [line.split("=")[0] for line in head(render(composed("cluster.nodes=2")))]
    assert names == ["--job-name", "--nodes", "--ntasks-per-node", "--signal", "--chdir", "--output", "--open-mode",
                     "--requeue"]  # fmt: skip


def test_a_directory_with_blanks_and_percents(tmp_path):
    text = render(composed(f"run_dir='{tmp_path}/my run 50%'"))
    assert f'--output="{tmp_path}/my run 50%%/logs/job-%j.out"' in text
    assert f"run_dir='{tmp_path}/my run 50%'" in text


def test_a_job_works_where_it_was_composed(tmp_path, monkeypatch):
    """config.yaml keeps relative paths, and sbatch may be called from anywhere."""
    here = tmp_path / "a b" / 'c"d\\e'
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    text = render(composed("run_dir=r", "data.path=text.txt"))
    assert rf'#SBATCH --chdir="{tmp_path}/a b/c\"d\\e"' in text.splitlines()


@pytest.mark.parametrize(("words", "scripts"), [(["--dry-run"], 1), (["-m", "--dry-run", "train.seed=1,2"], 2)])
def test_dry_run_writes_nothing_and_needs_no_slurm(words, scripts, tmp_path):
    script = "import sys; from scale_llm.launch.cli import run_command; s = run_command(sys.argv[1:]); "
    script += "assert 'torch' not in sys.modules; sys.exit(s)"
    result = subprocess.run(
        [sys.executable, "-c", script, *words, *RUN, "run_dir=new"], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PATH": "/nowhere"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("#!/usr/bin/env bash") == scripts and not list(tmp_path.iterdir())


def test_dry_run_of_a_local_run(capsys):
    assert "--check" in failing(capsys, "--dry-run", "train.train_iters=1")


def test_no_sbatch(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for words in ([], ["-m", "train.seed=1,2"]):
        text = failing(capsys, *words, *RUN, f"run_dir={tmp_path}/r")
        assert "sbatch is not on the PATH" in text and "cluster=local" in text
    assert not (tmp_path / "r").exists(), "nothing is written where nothing can be submitted"


def test_check_prints_the_plan(capsys, tmp_path):
    words = ["cluster.nodes=2", "cluster.gpus_per_node=8", "parallel=tp2", f"run_dir={tmp_path}/r"]
    assert run_command(["--check", *RUN, *words]) == 0
    assert "16 = tensor 2" in capsys.readouterr().out


def test_a_job_asks_for_gpus_before_it_uses_them(capsys):
    text = failing(capsys, *RUN, "cluster.device=cuda")
    assert "set cluster.gpus_per_node" in text


def test_values_of_the_node_stay_open_until_it_is_known(tmp_path):
    """The submitting machine has no say in them; the first node settles them for the life of the run."""
    words = [f"run_dir={tmp_path}/r", "precision=auto"]
    cfg = composed(*words)
    assert cfg.precision.auto and cfg.model.compile_ops is None
    assert problems(compose_run([*RUN, *words])) == []
    write_run(cfg)
    settled = settle(load_config(cfg.run_dir), Path(cfg.run_dir), NODE)
    assert settled.precision.bf16 and settled.model.compile_ops and not settled.precision.auto
    assert load_config(cfg.run_dir) == settled
    other = Machine(cores=1, gpus=0, fast_bf16_cpu=False, compiler=True)
    assert settle(load_config(cfg.run_dir), Path(cfg.run_dir), other) == settled
    again = composed(*words)
    write_run(again)
    assert load_config(cfg.run_dir) == settled and not list(tmp_path.glob("r/config.*.yaml")), "the same run"


def test_threads_are_the_cores_of_a_task():
    assert composed("cluster.nproc_per_node=4").cluster.omp_num_threads == 1
    assert composed("cluster.nproc_per_node=4", "cluster.cpus_per_task=6").cluster.omp_num_threads == 6


def test_what_sbatch_says_completes_the_words():
    job = allocation({
        "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_CPUS_PER_NODE": "16(x2),8",
        "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "2", "SLURM_RESTART_COUNT": "1",
    })  # fmt: skip
    assert (job.nodes, job.cpus_per_node, job.gpus_per_node, job.restart) == (3, 8, 4, 1)
    plan = compose_run([*RUN, "cluster.nodes=9"], fill=lambda cfg, given: fill(cfg, given - {"cluster.nodes"}, job))
    cluster = plan.cfg.cluster
    assert (cluster.nnodes, cluster.nproc_per_node, cluster.device.value, cluster.cpus_per_task) == (3, 4, "cuda", 2)
    assert allocation_problems(plan.cfg, job) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["cluster.nodes=3"], "cluster.nnodes=3: job 5 has 2 nodes"),
        (["cluster.nproc_per_node=8"], "more ranks than the allocation, which has 4 CPUs a node where 8"),
        (["cluster.nproc_per_node=2", "cluster.cpus_per_task=3"], "where 6 are needed"),
    ],
)
def test_more_ranks_than_the_allocation(words, expected):
    (problem,) = allocation_problems(composed(*words), JOB)
    assert expected in problem


def test_more_ranks_than_gpus():
    cfg = composed("cluster.gpus_per_node=4")
    four = Allocation(job="5", restart=0, nodes=1, node_list="n1", cpus_per_node=64, gpus_per_node=2)
    assert "has 2 GPUs a node" in allocation_problems(cfg, four)[0]


def test_what_the_documents_submit_has_room_for_its_ranks():
    """sbatch gives a node the cores of one task where it is not told how many there are."""
    top = Path(__file__).resolve().parents[2]
    texts = [path.read_text() for path in [top / "README.md", *(top / "slurm").glob("*.sbatch")]]
    lines = [line for text in texts for line in text.splitlines() if "sbatch --" in line and "--gpus-per-node" in line]
    assert len(lines) >= 4
    for line in lines:
        gpus = re.search(r"--gpus-per-node=(\d+)", line)[1]
        assert f"--ntasks-per-node={gpus}" in line, line


def test_a_directory_with_a_job_of_its_own(tmp_path, monkeypatch):
    """Slurm knows whether the recorded job lives; without an answer the lock decides alone."""
    record_job(tmp_path, "41")
    for state in (*ALIVE, "FAILED"):
        monkeypatch.setattr("scale_llm.launch.slurm.commands.job_state", lambda job, state=state: (state, ""))
        assert bool(busy(str(tmp_path))) == (state != "FAILED")
    monkeypatch.setattr("scale_llm.launch.slurm.commands.job_state", lambda job: None)
    assert busy(str(tmp_path)) == []
    with lock.held(tmp_path):
        assert "at work in it" in busy(str(tmp_path))[0]
