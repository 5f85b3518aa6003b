"""Real ranks with a stand-in for the stage: starting, joining, failing, stopping. Training itself is tested above."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from scale_llm.config import timeline
from scale_llm.launch.failures import first_failure, user_problems
from scale_llm.launch.rank import failure_text

STAND_IN = Path(__file__).parent / "stand_in"
CLI = ["-m", "scale_llm.launch.cli"]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """A small run on 2 ranks; its data are prepared once."""
    top = tmp_path_factory.mktemp("data")
    lines = [" ".join(f"word{(i * j) % 97}" for j in range(80)) for i in range(200)]
    (top / "text.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    return [
        f"data.path={top}/text.jsonl", f"data.cache_dir={top}/cache", "data.split='90,10,0'", "cluster=local_cpu",
        "tokenizer.vocab_size=300", "model.seq_length=32", "parallel=tp2", "train.train_iters=20",
    ]  # fmt: skip


def environment(how: str = "") -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK", "WORLD"))}
    return {**clean, "PYTHONPATH": str(STAND_IN), "HOW": how}


def start(words: list[str], run_dir: Path, how: str = "", before: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [sys.executable, *before, *CLI, *words, f"run_dir={run_dir}"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment(how), stdout=pipe, stderr=pipe, text=True)


def run(words: list[str], run_dir: Path, how: str = "", before: tuple[str, ...] = ()) -> tuple[int, str, str]:
    process = start(words, run_dir, how, before)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_start_then_resume(words, tmp_path):
    status, out, err = run(words, tmp_path)
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0] == f"starting {tmp_path}"
    assert any(line.startswith("rank 1 of 2") for line in lines), "the last rank keeps the terminal"
    assert not any(line.startswith("rank 0") for line in lines)
    for rank in (0, 1):
        assert f"rank {rank} of 2" in (tmp_path / f"logs/rank_{rank}.log").read_text()
    status, out, err = run([*words, "optim.lr=0.1"], tmp_path)
    assert status == 0, err
    assert out.splitlines()[0] == f"resuming {tmp_path} at iteration 20"
    assert "config.1.yaml" in out and (tmp_path / "config.1.yaml").is_file()
    assert not list(tmp_path.glob("outputs")) and not Path("outputs").exists(), "Hydra leaves no directory of its own"


@pytest.mark.parametrize(
    ("how", "expected_status", "message"),
    [
        ("error", 1, "rank 0 failed with status 1; the log of rank 0 is"),
        pytest.param("exit", 7, "rank 0 failed with status 7", marks=pytest.mark.slow),
        ("kill", 1, "rank 0 was killed by SIGKILL"),
        ("user_error", 1, "2 errors:\n  1. a=1: too few; give a=2\n  2. b=1"),
    ],
)
def test_a_failing_rank_is_shown_once(words, tmp_path, how, expected_status, message):
    status, out, err = run(words, tmp_path, how)
    assert status == expected_status, err
    assert message in err
    assert ("RuntimeError: boom" in err) == (how == "error")
    assert "elastic" not in err and "peer" not in err and len(err.splitlines()) < 20, err
    # An error of the code before anything was done, and what a person has to mend, another start would meet again
    starts = [event["event"] for event in timeline.read(tmp_path)].count("start")
    assert starts == (3 if how == "kill" else 1)
    assert ("3 ends alike at iteration 0, so another start would not help" in err) == (how == "kill")


def test_a_rank_without_a_log(tmp_path):
    """One that failed as it was imported: no file is named that is not there."""
    assert failure_text(tmp_path, 3) == f"rank 3 left no log in {tmp_path / 'logs'}"


def test_a_rank_that_dies_is_started_again(words, tmp_path):
    """Once, and the whole run with it; the timeline has both starts."""
    status, out, err = run(words, tmp_path / "run", "kill_once")
    assert status == 0, err
    assert "rank 1 was killed by SIGKILL" in err and "restart 1, at most 3 (cluster.max_restarts)" in err
    events = timeline.read(tmp_path / "run")
    assert [event["event"] for event in events] == ["start", "end", "start", "end"]
    assert (events[1]["reason"], events[1]["action"]) == ("rank 1 was killed by SIGKILL", "restart")
    assert (events[2]["restart"], events[3]["action"]) == (1, "done")


def test_the_process_that_ranks_are_forked_from_is_killed(words, tmp_path):
    """And with it the ranks, which cannot say so; the next start has another."""
    status, out, err = run(words, tmp_path / "run", "kill_server_once")
    assert status == 0, err
    assert "was killed by SIGKILL" in err and "running out of memory" in err and "255" not in err, err
    assert [event["event"] for event in timeline.read(tmp_path / "run")] == ["start", "end", "start", "end"]


def test_a_rank_that_does_not_answer_is_named(words, tmp_path):
    """It is stopped: what it was doing is in its log all the same, and it is started again with the others."""
    status, out, err = run(words, tmp_path, "hang_once")
    assert status == 0, err
    assert f"rank 1 did not answer; the log of rank 1 is {tmp_path}/logs/rank_1.log" in err
    end = timeline.read(tmp_path)[1]
    assert (end["reason"], end["action"]) == ("no progress; waited for rank 1", "restart")
    stacks = (tmp_path / "logs" / "rank_1.log").read_text().split("=== started")[1]
    assert "most recent call first" in stacks and "sitecustomize.py" in stacks


def test_prepare_makes_the_data_alone(words, tmp_path):
    """Also for ranks that this machine could not start."""
    more = ["--prepare", f"data.cache_dir={tmp_path}/cache", "cluster.nnodes=4"]
    own = [word for word in words if not word.startswith("data.cache_dir")]
    status, out, err = run([*more, *own], tmp_path / "run")
    assert status == 0, err
    assert f"data.cache_dir={tmp_path}/cache: the data of this run are there" in out
    assert list((tmp_path / "cache").rglob("*.bin")) and not (tmp_path / "run").exists()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def both_ready(run_dir: Path) -> bool:
    return all((run_dir / f"ready_{rank}").exists() for rank in (0, 1))


def alive(pid: str) -> bool:
    """Running, and not a zombie that nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_ranks_die_with_a_killed_launcher(words, tmp_path):
    process = start(words, tmp_path, "wait")
    wait_for(lambda: both_ready(tmp_path))
    pids = [(tmp_path / f"logs/rank_{rank}.log").read_text().split("pid ")[1].split()[0] for rank in (0, 1)]
    assert all(alive(pid) for pid in pids)
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: not any(alive(pid) for pid in pids))


def test_ctrl_c_lets_ranks_save(words, tmp_path):
    process = start(words, tmp_path, "wait")
    wait_for(lambda: both_ready(tmp_path))
    status, _, refused = run(words, tmp_path)
    assert status == 1 and f"run_dir={tmp_path}: process {process.pid} on" in refused, "one run in a directory"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1] == f"stopped by SIGINT; the same command resumes {tmp_path}"
    for rank in (0, 1):
        assert "saved after [2]" in (tmp_path / f"logs/rank_{rank}.log").read_text(), "one signal, and time to save"


def started_below(pid: int, what: str) -> list[int]:
    """Processes of a launcher: the server that ranks are forked from, or ranks by their names."""
    found = []
    with suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.Error):
                if process.name().startswith(what) or what in " ".join(process.cmdline()):
                    found.append(process.pid)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked on Linux")
def test_ctrl_c_while_ranks_start(words, tmp_path):
    """There is nothing to save: it ends at once, and leaves no process."""
    for what in ("forkserver", "rank_0"):
        process = start(words, tmp_path / what, "wait")
        wait_for(lambda: started_below(process.pid, what))  # noqa: B023 - called before the next
        pids = started_below(process.pid, "")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130 and "Traceback" not in err, err
        wait_for(lambda: not any(alive(str(pid)) for pid in pids))  # noqa: B023


def test_ctrl_c_is_not_lost(words, tmp_path):
    """Though an import of the launcher has swallowed what it raised."""
    status, _, err = run(words, tmp_path, "interrupt_lost")
    assert "interrupt lost" in err
    assert status == 130 and "stopped by SIGINT" in err and "Traceback" not in err, err


def test_under_torchrun_it_joins(words, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    status, out, err = run(words, tmp_path, before=torchrun)
    assert status == 0, err
    assert out.splitlines()[0] == f"starting {tmp_path}" and out.count("starting") == 1
    assert "rank 1 of 2" in out


class Failure:
    def __init__(self, exitcode: int, message, timestamp: int):
        self.exitcode, self.message, self.timestamp = exitcode, message, timestamp


def test_the_cause_comes_before_its_effects():
    failures = {
        0: Failure(1, {"message": "RuntimeError: Connection closed by peer"}, 10),
        1: Failure(-signal.SIGTERM, "Signal 15 received", 9),
        2: Failure(1, {"message": "UserError: a=1: x; y\nb=2: x; y"}, 11),
    }
    rank, failure = first_failure(failures)
    assert rank == 2 and user_problems(failure.message) == ["a=1: x; y", "b=2: x; y"]
    assert user_problems(failures[0].message) == []
