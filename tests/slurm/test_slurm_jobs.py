"""Jobs on a real Slurm: make test-slurm. What is interrupted ends as what is not, bit for bit.

Jobs wait more than they compute, so those of one fixture are at work together.
"""

import json
import os
import signal
import stat
import sys
from pathlib import Path

import pytest
from support.runs import losses, rows
from support.slurm import wait_for

from scale_llm.config.io import load_config
from scale_llm.launch.restarts import history

pytestmark = pytest.mark.slurm

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SBATCH = ROOT / "slurm" / "train.sbatch"
TWO_NODES = ["cluster=slurm", "cluster.nodes=2", "cluster.nproc_per_node=1", "cluster.preflight=false"]


def words_of(runs, run_dir, *more: str) -> list[str]:
    """Words of the small run; where it runs is in `more`."""
    return [word for word in runs.words(run_dir, *more) if word != "cluster=local_cpu"]


def job_of(run_dir: Path) -> str:
    return json.loads((run_dir / "job.json").read_text())["job"]


def output_of(run_dir: Path) -> str:
    return "".join(path.read_text() for path in run_dir.glob("logs/job-*.out"))


def steps_done(run_dir: Path) -> int:
    try:
        return len(rows(run_dir))
    except (OSError, ValueError):
        return 0


def at_work(run_dir: Path) -> None:
    wait_for(lambda: steps_done(run_dir) >= 4, 90, f"four steps of {run_dir.name}: {output_of(run_dir)}")


def python_path(**more: str) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(HERE / "stand_in"), str(ROOT)]), **more}


@pytest.fixture(scope="module")
def jobs(cluster, runs, uninterrupted, top):
    """One job for each way to be interrupted: submitted together, interrupted in the middle of their steps."""
    how = {
        "limit": (["cluster.time=2", "cluster.signal=USR1@70"], {"SECONDS_A_STEP": "2.0"}),
        "term": ([], {"SECONDS_A_STEP": "1.0"}),
        "requeue": ([], {"SECONDS_A_STEP": "1.0"}),
        "failing": ([], {"FAIL_AFTER": "3"}),
    }
    found = {name: submit(cluster, words_of(runs, top / name, *TWO_NODES, *words), **env)
             for name, (words, env) in how.items()}  # fmt: skip
    at_work(top / "term")
    cluster.text("scancel", "--signal=TERM", found["term"])
    at_work(top / "requeue")
    cluster.text("scontrol", "requeue", found["requeue"])
    return found


def submit(cluster, words: list[str], **environment: str) -> str:
    result = cluster.scale_llm(*words, **python_path(**environment))
    assert result.returncode == 0, result.stderr
    return result.stdout.split("submitted job ")[1].split(";")[0]


def assert_finished(cluster, runs, job: str, run_dir: Path, uninterrupted: Path) -> list[dict]:
    """Ended well, and metrics.jsonl is that of the uninterrupted run; returns its starts and ends."""
    assert cluster.wait_for_end(job) == "COMPLETED", output_of(run_dir)
    assert rows(run_dir) == rows(uninterrupted)
    different = {name: d for name, d in runs.differences(run_dir, uninterrupted).items() if d}
    assert not different, different
    return history(run_dir)


def ends(events: list[dict]) -> list[tuple[str, str]]:
    return [(event.get("reason", ""), event["action"]) for event in events if event["event"] == "end"]


STOPPED = ("stopped by a signal", "requeue")
DONE = ("", "done")


def test_one_of_two_jobs_on_a_directory_is_refused(cluster, runs, jobs, top):
    """At once where scale-llm is asked, at its start where sbatch was; the first is not disturbed."""
    job, run_dir = jobs["limit"], top / "limit"
    again = cluster.scale_llm(*words_of(runs, run_dir, *TWO_NODES))
    assert again.returncode == 1 and f"job {job} " in again.stderr and f"scancel {job}" in again.stderr
    second = cluster.text("sbatch", "--parsable", str(run_dir / "job.sbatch")).strip()
    assert cluster.wait_for_end(second) == "FAILED"
    assert f"run_dir={run_dir}: job {job} " in (run_dir / f"logs/job-{second}.out").read_text()
    assert job_of(run_dir) == job


def test_term_saves_requeues_and_finishes(cluster, runs, jobs, uninterrupted, top):
    job, run_dir = jobs["term"], top / "term"
    events = assert_finished(cluster, runs, job, run_dir, uninterrupted)
    assert ends(events) == [STOPPED, DONE]
    assert [event["restart"] for event in events if event["event"] == "start"] == [0, 1]
    assert 4 <= events[2]["iteration"] < 20, "it resumed in the middle"


def test_requeue_by_hand(cluster, runs, jobs, uninterrupted, top):
    """Slurm itself starts the job again, so it must not be asked a second time."""
    job, run_dir = jobs["requeue"], top / "requeue"
    events = assert_finished(cluster, runs, job, run_dir, uninterrupted)
    assert ends(events) == [("stopped by a signal", "stop"), DONE], events
    assert "Slurm has the job as" in output_of(run_dir)


def test_sbatch_of_two_nodes_equals_the_local_run(cluster, runs, uninterrupted, top):
    """With the checks before it (every node, and an all-reduce), and a stop in the middle, which composes it again."""
    run_dir = top / "sbatch"
    words = words_of(runs, run_dir)
    done = cluster.run(
        "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={top}/sbatch-%j.out", str(SBATCH),
        *words, SCALE_LLM_SLURM=str(ROOT / "slurm"), **python_path(SECONDS_A_STEP="0.5"),
    )  # fmt: skip
    job = done.stdout.strip()
    at_work(run_dir)
    cluster.text("scancel", "--signal=USR1", job)
    assert cluster.wait_for_end(job) == "COMPLETED", (top / f"sbatch-{job}.out").read_text()
    assert "preflight: 2 nodes are fit; reduced 64 MiB over 2 nodes by gloo" in (top / f"sbatch-{job}.out").read_text()
    assert losses(run_dir) == losses(uninterrupted) and len(losses(run_dir)) == 20
    assert ends(history(run_dir)) == [STOPPED, DONE] and not list(run_dir.glob("config.*.yaml"))
    status = cluster.scale_llm("status", str(run_dir), COLUMNS="200").stdout
    assert f"job {job} COMPLETED" in status and "20/20" in status and f"{losses(run_dir)[-1]:.4f}" in status


def test_a_sweep_of_three_points(cluster, runs, uninterrupted, top):
    seeds = "train.seed=1,2,3"
    words = words_of(runs, top / "sweep", *TWO_NODES, "cluster.nodes=1", "train.train_iters=3", seeds)
    words.remove("cluster.nodes=2")
    result = cluster.scale_llm("-m", *words, COLUMNS="200")
    assert result.returncode == 0, result.stderr
    directories = [top / "sweep" / f"train.seed={seed}" for seed in (1, 2, 3)]
    for run_dir in directories:
        job = job_of(run_dir)
        assert any(f" {job} " in line and run_dir.name in line for line in result.stdout.splitlines()), result.stdout
        assert cluster.wait_for_end(job) == "COMPLETED", output_of(run_dir)
    assert len({losses(run_dir)[0] for run_dir in directories}) == 3


def test_signal_before_the_time_limit(cluster, runs, jobs, uninterrupted, top):
    events = assert_finished(cluster, runs, jobs["limit"], top / "limit", uninterrupted)
    found = ends(events)
    assert len(found) >= 2 and set(found[:-1]) == {STOPPED} and found[-1] == DONE, events


def test_the_same_failure_three_times_is_the_last(cluster, jobs, top):
    """In one allocation, which is not given back in between."""
    job, run_dir = jobs["failing"], top / "failing"
    assert cluster.wait_for_end(job) == "FAILED", output_of(run_dir)
    found = ends(history(run_dir))
    assert found == [("RuntimeError: boom", "restart")] * 2 + [("RuntimeError: boom", "stop")], found
    assert "3 ends alike at iteration 3" in output_of(run_dir)


@pytest.fixture(scope="module")
def kept(cluster, runs, uninterrupted, top):
    """Jobs whose ranks fail and that keep their nodes: rank 1 dies, or stops; those of one node fail, there alone."""
    how = {
        "killed": ([*TWO_NODES, "checkpoint.save_interval=3"], {"SECONDS_A_STEP": "0.5"}),
        "hung": ([*TWO_NODES, "checkpoint.save_interval=3", "health.hang_slack_seconds=4"], {"SECONDS_A_STEP": "0.5"}),
        "spare": (
            ["cluster=slurm", "cluster.spare_nodes=1", "cluster.nproc_per_node=2"],
            {"FAIL_AFTER": "3", "FAIL_ON": "n1", "PREFLIGHT_FREE_GB": "1"},
        ),
    }
    found = {name: submit(cluster, words_of(runs, top / name, *words), **env) for name, (words, env) in how.items()}
    for name, number in (("killed", signal.SIGKILL), ("hung", signal.SIGSTOP)):
        at_work(top / name)
        cluster.signal_tasks(number, "n2", name)
    return found


def test_a_rank_that_dies_is_started_again_in_the_same_job(cluster, runs, kept, uninterrupted, top):
    run_dir = top / "killed"
    events = assert_finished(cluster, runs, kept["killed"], run_dir, uninterrupted)
    assert [action for _, action in ends(events)] == ["restart", "done"], events
    assert [event["restart"] for event in events if event["event"] == "start"] == [0, 0], "never back in the queue"
    assert events[1]["reason"] == "the others have lost rank 1" and events[1]["node"] == "n2"
    assert 3 <= events[2]["iteration"] < 20


def test_a_rank_that_hangs_ends_the_others(cluster, runs, kept, uninterrupted, top):
    """It is found by the ranks that wait for it, whose logs say what they were doing."""
    run_dir = top / "hung"
    events = assert_finished(cluster, runs, kept["hung"], run_dir, uninterrupted)
    assert ends(events) == [("no progress; waited for rank 1", "restart"), DONE], events
    log = (run_dir / "logs" / "rank_0.log").read_text()
    assert " step after iteration" in log and "no progress: " in log and "most recent call first" in log


def test_a_spare_node_takes_the_place_of_one_that_fails(cluster, runs, kept, uninterrupted, top):
    """Twice in a row on n1: then it is left out."""
    run_dir = top / "spare"
    events = assert_finished(cluster, runs, kept["spare"], run_dir, uninterrupted)
    found = [(event["reason"], event["node"], event.get("without")) for event in events if "node" in event]
    assert found == [("RuntimeError: boom", "n1", None), ("RuntimeError: boom", "n1", "n1")], events
    assert "--no-kill" in (run_dir / "job.sbatch").read_text() and "--nodes=2" in (run_dir / "job.sbatch").read_text()


def full_disk(cluster, folder: Path, where: str) -> dict[str, str]:
    """Variables of a job that finds a full disk on nodes for which this line of shell succeeds."""
    full = folder / "df"
    folder.mkdir()
    full.write_text(f'#!/bin/sh\n{where} || exec /bin/df "$@"\necho head; echo "disk 1 1 1 100% /"\n')
    full.chmod(full.stat().st_mode | stat.S_IEXEC)
    return {"PATH": f"{folder}:{cluster.env['PATH']}", "PREFLIGHT_FREE_GB": "1"}


def test_preflight_names_a_bad_node_and_leaves_it_out(cluster, runs, uninterrupted, top):
    """The first node to be asked has a full disk, whichever it is."""
    run_dir, name = top / "preflight", top / "name"
    words = ["cluster=slurm", "cluster.nproc_per_node=1", "train.train_iters=2"]
    first = f"mkdir {top}/first 2>/dev/null && echo $SLURMD_NODENAME >{name}"
    path = full_disk(cluster, top / "bin", f'{first}\n[ "$(cat {name})" = "$SLURMD_NODENAME" ]')
    assert cluster.scale_llm(*words_of(runs, run_dir, *words), **path).returncode == 0
    assert cluster.wait_for_end(job_of(run_dir)) == "COMPLETED", output_of(run_dir)
    bad, output = name.read_text().strip(), output_of(run_dir)
    assert f"preflight: {bad}: node: 0 GB free" in output and f"cluster.exclude={bad}" in output
    starts = [event["nodes"] for event in history(run_dir) if event["event"] == "start"]
    assert starts == [bad, "n2" if bad == "n1" else "n1"]


def test_slurms_own_words_for_what_it_refuses(cluster, runs, top):
    words = words_of(runs, top / "refused", "cluster=slurm", "cluster.partition=nowhere")
    result = cluster.scale_llm(*words)
    assert result.returncode == 1 and "invalid partition specified: nowhere" in result.stderr
    assert "Traceback" not in result.stderr


def test_more_ranks_than_the_allocation(cluster, runs, top):
    words = words_of(runs, top / "crowded", "cluster.nproc_per_node=8", "cluster.nnodes=3")
    done = cluster.run("sbatch", "--parsable", "--nodes=2", f"--output={top}/crowded.out", str(SBATCH), *words,
                       SCALE_LLM_SLURM=str(ROOT / "slurm"), **python_path())  # fmt: skip
    assert cluster.wait_for_end(done.stdout.strip()) == "FAILED"
    text = (top / "crowded.out").read_text()
    assert (
        "cluster.nnodes=3: job" in text and "more ranks than the allocation" in text and not (top / "crowded").exists()
    )


def test_preemption(cluster, runs, uninterrupted, top):
    """A job of a higher partition takes the nodes: TERM, thirty seconds to save, back into the queue."""
    run_dir = top / "preempted"
    job = submit(cluster, words_of(runs, run_dir, *TWO_NODES), SECONDS_A_STEP="1.0")
    at_work(run_dir)
    options = ["--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"]
    urgent = cluster.text("sbatch", *options).strip()
    assert cluster.wait_for_end(urgent) == "COMPLETED"
    events = assert_finished(cluster, runs, job, run_dir, uninterrupted)
    assert ends(events) == [STOPPED, DONE], events
    assert 4 <= events[2]["iteration"] < 20, "it resumed in the middle"


def test_a_node_that_dies(cluster, runs, uninterrupted, top):
    run_dir = top / "node"
    words = words_of(runs, run_dir, *TWO_NODES, "checkpoint.save_interval=3")
    job = submit(cluster, words, SECONDS_A_STEP="0.5")
    at_work(run_dir)
    cluster.kill_node("n2")
    cluster.revive_node("n2")
    events = assert_finished(cluster, runs, job, run_dir, uninterrupted)
    assert len([event for event in events if event["event"] == "start"]) == 2, events
    assert ends(events)[0] != STOPPED and 3 <= events[2]["iteration"] < 20, events


def test_a_job_with_a_spare_node_outlives_a_bad_one_and_a_dead_one(cluster, runs, uninterrupted, top):
    """The disk of n1 is full: n2 takes its place, and dies, and n3 takes its."""
    run_dir = top / "outlived"
    path = full_disk(cluster, top / "bin_of_n1", '[ "$SLURMD_NODENAME" = n1 ]')
    words = ["cluster=slurm", "cluster.partition=wide", "cluster.spare_nodes=2", "cluster.nproc_per_node=2",
             "checkpoint.save_interval=3"]  # fmt: skip
    job = submit(cluster, words_of(runs, run_dir, *words), SECONDS_A_STEP="0.5", **path)
    at_work(run_dir)
    assert (run_dir / "nodes").read_text() == "n2" and "spare nodes take their place" in output_of(run_dir)
    cluster.kill_node("n2")
    events = assert_finished(cluster, runs, job, run_dir, uninterrupted)
    cluster.revive_node("n2")
    assert (run_dir / "nodes").read_text() == "n3"
    assert [action for _, action in ends(events)] == ["restart", "done"], events
    assert [event["restart"] for event in events if event["event"] == "start"] == [0, 0], "never back in the queue"
    assert 3 <= events[2]["iteration"] < 20


def test_data_and_then_a_policy(cluster, uninterrupted, top):
    """One job makes the data, the next has two nodes on which the roles take turns."""
    prompts, run_dir = top / "prompts.jsonl", top / "policy"
    prompts.write_text("".join(json.dumps({"prompt": f"def function_{i}("}) + "\n" for i in range(40)))
    words = [
        "stage=grpo", "model=from_checkpoint", f"checkpoint.load={uninterrupted}/checkpoints", f"data.path={prompts}",
        "reward.function=length", "reward.length_target_tokens=4", "stage.max_new_tokens=8", "train.train_iters=2",
        "stage.num_generations_per_prompt=2", "train.global_batch_size=4", "train.micro_batch_size=2",
        "train.eval_iters=0", "precision=fp32", "model.compile_ops=false", "cluster.preflight=false",
        f"run_dir={run_dir}",
    ]  # fmt: skip
    environment = {"SCALE_LLM_SLURM": str(ROOT / "slurm"), "PYTHON": sys.executable, **python_path()}
    options = ["--parsable", f"--output={top}/policy-%j.out"]
    data = cluster.run("sbatch", *options, str(ROOT / "slurm/data.sbatch"), *words, **environment).stdout.strip()
    later = [f"--dependency=afterok:{data}", "--nodes=2", "--ntasks-per-node=1"]
    done = cluster.run("sbatch", *options, *later, str(ROOT / "slurm/rlhf.sbatch"), *words, **environment)
    job = done.stdout.strip()
    assert cluster.wait_for_end(job) == "COMPLETED", [path.read_text() for path in top.glob("policy-*.out")]
    assert f"data.cache_dir={run_dir}/data: the data of this run are there" in (top / f"policy-{data}.out").read_text()
    assert load_config(run_dir).layout.actor.offload, "layout=hybrid"
    assert ends(history(run_dir)) == [DONE] and len(rows(run_dir)) == 2
