"""When a job starts again, and when it has tried enough."""

import json

import pytest

from scale_llm.config import timeline
from scale_llm.config.exit_status import REQUEUE
from scale_llm.launch import restarts
from scale_llm.launch.rank import FINISHED
from scale_llm.launch.reached import is_done
from scale_llm.launch.restarts import KILLED, Decision, decide
from scale_llm.launch.runs import compose_run
from scale_llm.launch.slurm import ending
from scale_llm.launch.slurm.allocation import Allocation
from scale_llm.launch.slurm.ending import clear, end_of
from scale_llm.launch.slurm.job import _after_kill, _why_not
from scale_llm.launch.slurm.nodes import BAD_NODES, USED, to_exclude

JOB = Allocation(job="5", restart=0, nodes=2, node_list="n[1-2]", cpus_per_node=4)


def failure(iteration: int, reason: str = "boom") -> dict:
    return {"event": "end", "status": 1, "iteration": iteration, "reason": reason}


def stop(iteration: int) -> dict:
    return {"event": "end", "status": REQUEUE, "iteration": iteration, "reason": "signal", "signal": True}


@pytest.mark.parametrize(
    ("ends", "again", "delay"),
    [
        ([failure(5)], True, 10),
        ([failure(5), failure(5)], True, 20),
        ([failure(5), failure(5), failure(5)], False, 0),
        ([failure(5), failure(5), failure(6)], True, 10),
        ([failure(5), failure(5), failure(5, "other")], True, 10),
        ([failure(5), failure(5), stop(9), failure(5)], True, 10),
        ([stop(1), stop(2), stop(3), stop(4)], True, 0),
        ([stop(0), stop(0), stop(0)], False, 0),
        ([failure(iteration) for iteration in range(4)], True, 10),
        ([failure(iteration) for iteration in range(5)], False, 0),
        ([{**failure(1), "final": True}], False, 0),
    ],
)
def test_decisions(ends, again, delay):
    """Three alike are the last; signals cost no restart, but must get somewhere; the fifth failure is one too many."""
    decision = decide(ends, max_restarts=4)
    assert (decision.again, decision.delay_seconds) == (again, delay), decision


def test_history_survives_a_cut_line(tmp_path):
    timeline.append(tmp_path, "start", job="1", iteration=0)
    with open(tmp_path / timeline.FILE, "a") as file:
        file.write('{"event": "e\n')
    timeline.append(tmp_path, "start", job="2", iteration=4)
    assert [event["job"] for event in restarts.history(tmp_path)] == ["1", "2"]
    assert restarts.count_restarts(restarts.history(tmp_path)) == 1
    assert restarts.history(tmp_path, "2")[0]["iteration"] == 4
    assert restarts.history(tmp_path / "none") == []


@pytest.fixture
def cfg(tmp_path):
    for name in ("logs", "checkpoints"):
        (tmp_path / name).mkdir()
    return compose_run(["cluster=slurm", "train.train_iters=9", f"run_dir={tmp_path}"]).cfg


def test_a_start_without_an_end_was_killed(tmp_path, cfg, capsys):
    for number in range(3):
        assert _after_kill(cfg, tmp_path, JOB), "nothing to say of a first start, or of one or two that were killed"
        timeline.append(tmp_path, "start", job="5", restart=number, iteration=0)
    assert not _after_kill(cfg, tmp_path, JOB)
    ends = [event for event in restarts.history(tmp_path) if event["event"] == "end"]
    assert [end["reason"] for end in ends] == [KILLED] * 3
    assert [end["action"] for end in ends] == ["requeue", "requeue", "stop"]
    assert "3 ends alike at iteration 0" in capsys.readouterr().err


def error_file(run_dir, rank: int, message: str, stamp: int) -> None:
    content = {"message": {"message": message, "extraInfo": {"timestamp": str(stamp)}}}
    (run_dir / f"logs/error_rank_{rank}.json").write_text(json.dumps(content))


def test_why_it_ended(tmp_path, cfg, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 7}\n')
    assert end_of(cfg, tmp_path, REQUEUE) == {
        "status": REQUEUE, "iteration": 7, "reason": "stopped by a signal", "signal": True
    }  # fmt: skip
    assert end_of(cfg, tmp_path, 128 + 10)["signal"], "a rank that did not listen yet"
    assert end_of(cfg, tmp_path, 137)["reason"] == "a rank was killed by SIGKILL"
    assert end_of(cfg, tmp_path, 9)["reason"] == "srun ended with status 9"
    monkeypatch.setattr(ending, "SECONDS_FOR_THE_MARK", 0)
    assert end_of(cfg, tmp_path, 0) == {"status": 1, "iteration": 7, "reason": "srun has ended before the ranks"}
    (tmp_path / "logs").mkdir(exist_ok=True)
    (tmp_path / FINISHED).touch()
    assert end_of(cfg, tmp_path, 0) == {"status": 0, "iteration": 7}
    error_file(tmp_path, 0, "RuntimeError: Connection closed by peer", 10)
    error_file(tmp_path, 11, "RuntimeError: boom\nmore", 11)
    assert end_of(cfg, tmp_path, 1)["reason"] == "RuntimeError: boom", "the cause, not what followed from it"
    clear(tmp_path)
    error_file(tmp_path, 1, "UserError: a=1: too few; give a=2", 1)
    found = end_of(cfg, tmp_path, 1)
    assert found["final"] and found["reason"] == "a=1: too few; give a=2"
    (tmp_path / BAD_NODES).write_text("n3\n")
    assert end_of(cfg, tmp_path, 1)["reason"] == "preflight found bad nodes: n3"
    assert to_exclude(cfg, tmp_path) == "n3"
    (tmp_path / USED).write_text("n4")
    assert end_of(cfg, tmp_path, 1)["reason"] == "a=1: too few; give a=2", "n4 took its place"
    (tmp_path / USED).unlink()
    cfg.cluster.nnodes = 2
    (tmp_path / BAD_NODES).write_text("n3,n4\n")
    assert to_exclude(cfg, tmp_path) is None, "both: a disk that is full, rather than two nodes"
    clear(tmp_path)
    assert to_exclude(cfg, tmp_path) is None
    assert end_of(cfg, tmp_path, 1)["reason"] == "srun ended with status 1"


def test_done_is_known_by_the_checkpoint(tmp_path, cfg):
    assert not is_done(cfg)
    (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").write_text("9")
    assert is_done(cfg)


@pytest.mark.parametrize(
    ("state", "requeue", "why"),
    [("RUNNING", True, None), (None, True, None), ("COMPLETING", True, "COMPLETING"), ("RUNNING", False, "false")],
)
def test_who_requeues(cfg, state, requeue, why):
    """After scancel or scontrol requeue by hand the job is no longer running, and Slurm knows what comes next."""
    cfg.cluster.requeue = requeue
    found = _why_not(cfg, Decision(again=True, reason="x"), state)
    assert found is None if why is None else why in found
