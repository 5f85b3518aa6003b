"""What goes wrong while a checkpoint is written, or is read: nothing before it is lost, and the error says
what to do.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from support.runs import latest, losses, rows
from support.slow import slow_but

from scale_llm.config.errors import UserError

EVERY_5 = "checkpoint.save_interval=5"
TP2 = "parallel.tensor_model_parallel_size=2"


@pytest.fixture(scope="module")
def undisturbed(runs, tmp_path_factory) -> Path:
    """20 steps on two ranks, saved every 5."""
    directory = tmp_path_factory.mktemp("undisturbed")
    assert runs(directory, TP2, EVERY_5) == []
    return directory


def assert_equal_end(runs, run_dir: Path, other: Path) -> None:
    assert rows(run_dir) == rows(other)
    assert not any(runs.differences(run_dir, other).values())


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-3000:]
        time.sleep(0.001)


def family(process: subprocess.Popen) -> list[psutil.Process]:
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def test_killed_during_a_save(runs, undisturbed, tmp_path):
    """SIGKILL to launcher and ranks while iteration 10 is being written: the rerun starts from 5 and ends the same."""
    process = runs.start(tmp_path, TP2, EVERY_5)
    checkpoints = tmp_path / "checkpoints"
    wait_for(checkpoints / "latest_checkpointed_iteration.txt", process)
    members = family(process)
    wait_for(checkpoints / ".iter_0000010.partial", process)
    for member in members:
        member.kill()
    process.communicate(timeout=30)
    psutil.wait_procs(members, timeout=30)
    assert (checkpoints / ".iter_0000010.partial").exists(), "the kill came too late to be inside the save"
    assert latest(tmp_path) == 5
    output = runs.command(tmp_path, TP2, EVERY_5)
    assert "iteration 5" in output.splitlines()[0]
    assert not list(checkpoints.glob(".iter_*")), "the unfinished directory is cleared away"
    assert_equal_end(runs, tmp_path, undisturbed)


@pytest.mark.parametrize("number", slow_but([signal.SIGTERM, signal.SIGINT], signal.SIGTERM))
def test_signal_to_the_launcher_saves_and_stops(runs, undisturbed, tmp_path, number):
    process = runs.start(tmp_path, TP2, EVERY_5)
    wait_for(tmp_path / "checkpoints" / "iter_0000005", process)
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output[-2000:]
    stopped = latest(tmp_path)
    assert 5 <= stopped < 20 and f"stopped at iteration {stopped}" in output and number.name in output, output
    assert runs(tmp_path, TP2, EVERY_5) == []
    assert losses(tmp_path) == losses(undisturbed)
    assert not any(runs.differences(tmp_path, undisturbed).values())


def test_asynchronous_save_writes_the_same(runs, undisturbed, tmp_path):
    """Training goes on while the state of iterations 5 to 15 is written: it must be theirs, not a later one."""
    assert runs(tmp_path, TP2, EVERY_5, "checkpoint.async_save=true") == []
    assert latest(tmp_path) == 20
    for iteration in (5, 10, 15, 20):
        assert not any(runs.differences(tmp_path, undisturbed, iteration).values()), iteration


@pytest.mark.parametrize("asynchronous", slow_but(["false", "true"], "true"))
def test_disk_full_while_saving(runs, undisturbed, tmp_path, asynchronous):
    """No file may grow beyond 100 kB: the save of iteration 10 fails, that of 5 still loads and the run goes
    on from it.
    """
    assert runs(tmp_path, TP2, EVERY_5, "train.exit_interval=5") == []
    problems = runs(tmp_path, TP2, EVERY_5, f"checkpoint.async_save={asynchronous}", limit_bytes=100_000)
    assert problems
    for problem in problems:
        assert f"checkpoint.save={tmp_path / 'checkpoints'}" in problem
        assert "iteration 10 failed" in problem and "iteration 5 is still whole" in problem
    assert latest(tmp_path) == 5
    assert runs(tmp_path, TP2, EVERY_5) == []
    assert_equal_end(runs, tmp_path, undisturbed)


def test_full_file_system(runs, tmp_path):
    """A real one, of 300 kB: the launcher ends with status 1 and the error, not with a traceback."""
    save = tmp_path / "small"
    save.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(save)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        output = runs.command(tmp_path / "run", f"checkpoint.save={save}", "train.train_iters=2", status=1)
    finally:
        subprocess.run(["umount", str(save)], check=True)
    assert "saving iteration 2 failed" in output and "there is no earlier checkpoint" in output
    assert "Traceback" not in output


OTHERS = {
    "width": ["model.hidden_size=96"],
    "depth": ["model.num_layers=2"],
    "experts": ["model.num_experts=4", "model.moe_ffn_hidden_size=64"],
}


@pytest.mark.parametrize("other", OTHERS)
def test_checkpoint_of_another_architecture_is_refused_before_ranks_start(runs, undisturbed, tmp_path, other):
    with pytest.raises(UserError) as raised:
        runs(tmp_path, f"checkpoint.load={undisturbed / 'checkpoints'}", *OTHERS[other])
    (problem,) = raised.value.problems
    assert OTHERS[other][0] in problem and "choose that model" in problem


def test_tensors_that_do_not_fit_are_all_named(runs, undisturbed, tmp_path):
    """Without its config.yaml nothing is known before the tensors are: they speak for themselves."""
    other = tmp_path / "other" / "iter_0000020"
    shutil.copytree(undisturbed / "checkpoints" / "iter_0000020", other)
    (other.parent / "latest_checkpointed_iteration.txt").write_text("20")
    (other / "config.yaml").unlink()
    problems = runs(tmp_path / "run", f"checkpoint.load={other.parent}", "model.hidden_size=96", "model.kv_channels=16")
    assert len(problems) > 8, "every tensor that does not fit, not the first"
    assert any("linear_proj.weight has shape (4, 64, 64), the model wants (4, 96, 64)" in p for p in problems), problems
    problems = runs(tmp_path / "sgd", f"checkpoint.load={other.parent}", "optim=sgd")
    assert all("momentum_buffer" in p and "no_load_optim=true" in p for p in problems)


def test_load_options(runs, undisturbed, tmp_path):
    """finetune takes the weights alone and starts at 0; no_load_optim keeps the iteration; load of nothing is
    an error.
    """
    load = f"checkpoint.load={undisturbed / 'checkpoints'}"
    assert runs(tmp_path / "finetune", load, "checkpoint.finetune=true", "train.train_iters=2") == []
    assert [row["iteration"] for row in rows(tmp_path / "finetune") if "lm loss" in row] == [1, 2]
    assert losses(tmp_path / "finetune")[0] < losses(undisturbed)[0] - 0.3
    assert runs(tmp_path / "weights", load, "checkpoint.no_load_optim=true", "train.train_iters=22") == []
    assert [row["iteration"] for row in rows(tmp_path / "weights") if "lm loss" in row] == [21, 22]
    with pytest.raises(UserError, match="checkpoint.load=.*holds no latest_checkpointed_iteration.txt"):
        runs(tmp_path / "nothing", f"checkpoint.load={tmp_path}")
