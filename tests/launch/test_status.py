"""scale-llm status, from run directories and from what Slurm says of their jobs. Light: no torch."""

import json
import os
import subprocess
import sys

import pytest

from scale_llm.config import timeline
from scale_llm.config.errors import UsageError, UserError
from scale_llm.launch import lock
from scale_llm.launch.run_directory import prepare_run_dir
from scale_llm.launch.runs import compose_run
from scale_llm.launch.slurm import commands
from scale_llm.launch.slurm.submit import record_job
from scale_llm.launch.status import standing, status


@pytest.fixture
def run_dir(tmp_path):
    """A run that has logged 12 of 20 iterations and saved the tenth."""
    directory = tmp_path / "run"
    prepare_run_dir(compose_run(["train.train_iters=20", f"run_dir={directory}"]).cfg)
    row = {"iteration": 12, "lm loss": 2.5, "throughput": 1.25, "tokens-per-second": 12345.6}
    (directory / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (directory / "checkpoints/iter_0000010").mkdir()
    (directory / "checkpoints/latest_checkpointed_iteration.txt").write_text("10")
    return directory


def no_slurm(monkeypatch):
    monkeypatch.setattr(commands, "job_state", lambda job: None)


def test_a_local_run(run_dir, monkeypatch):
    no_slurm(monkeypatch)
    found = standing(str(run_dir))
    assert (found.state, found.iteration, found.loss) == ("stopped", "12/20", "2.5000")
    assert (found.throughput, found.restarts) == ("12,346 tok/s", "0")
    assert found.checkpoint.startswith("10, ") and found.checkpoint.endswith("s ago")
    with lock.held(run_dir):
        assert standing(str(run_dir)).state.startswith("running on ")
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 20}\n')
    assert standing(str(run_dir)).state == "done"


def test_a_job(run_dir, monkeypatch):
    monkeypatch.setattr(commands, "present", lambda program: True)
    record_job(run_dir, "17")
    for number in range(3):
        timeline.append(run_dir, "start", job="17", restart=number, iteration=0)
    states = {"17": ("RUNNING", "n[1-2]")}
    monkeypatch.setattr(commands, "job_state", states.get)
    assert standing(str(run_dir)).state == "job 17 RUNNING (n[1-2])"
    assert standing(str(run_dir)).restarts == "2"
    timeline.append(run_dir, "end", job="17", reason="RuntimeError: boom", action="stop")
    states["17"] = ("FAILED", "NonZeroExitCode")
    found = standing(str(run_dir))
    assert (found.state, found.why) == ("job 17 FAILED", "RuntimeError: boom")
    states.clear()  # Slurm forgets jobs after minutes
    found = standing(str(run_dir))
    assert (found.state, found.why) == ("stopped", "RuntimeError: boom")


def test_squeue_then_sacct(monkeypatch):
    answers = {"squeue": "PENDING|Priority|\n"}
    monkeypatch.setattr(commands, "output_of", lambda program, *rest: answers.get(program))
    assert commands.job_state("1") == ("PENDING", "Priority") and commands.is_alive("1")
    answers.clear()
    assert commands.job_state("1") is None and not commands.is_alive("1")
    answers["sacct"] = "CANCELLED by 0|n1\n"
    assert commands.job_state("1") == ("CANCELLED", "n1")


def test_bad_words(tmp_path):
    with pytest.raises(UsageError, match="give one or more run directories"):
        status([])
    with pytest.raises(UserError, match=r"status .*none: holds no config.yaml"):
        status([str(tmp_path / "none")])


def test_it_is_light_and_prints_a_table(run_dir):
    timeline.append(run_dir, "end", job="17", reason="[a] reason", action="stop")
    script = "import sys; from scale_llm.launch.cli import run_command; s = run_command(sys.argv[1:]); "
    script += "assert not {'torch', 'hydra', 'numpy'} & set(sys.modules); sys.exit(s)"
    result = subprocess.run(
        [sys.executable, "-c", script, "status", str(run_dir)], capture_output=True, text=True,
        env={**os.environ, "COLUMNS": "160"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "12/20" in result.stdout and "restarts" in result.stdout
    assert result.stdout.endswith(f"{run_dir}: [a] reason\n")
