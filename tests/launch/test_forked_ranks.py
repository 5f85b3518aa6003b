"""Ranks that are forked end when they are told to, at whatever moment that is."""

import os
import signal
import subprocess
import sys

import pytest

from scale_llm.launch import processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked on Linux alone")


def test_a_rank_that_is_ended_as_it_starts(tmp_path, monkeypatch):
    """It has no group of processes of its own yet, nor a handler of the signal: no error, and it is gone."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

    from scale_llm.launch.forked_ranks import start_forked

    monkeypatch.setattr(processes.multiprocessing, "set_forkserver_preload", lambda names: None)
    logs = DefaultLogsSpecs(log_dir=str(tmp_path))
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    context = start_forked(str(tmp_path), {rank: {"RANK": str(rank), **variables} for rank in range(2)}, logs)
    context.close(signal.SIGTERM)
    assert all(
        status is not None for status in (handler.proc.poll() for handler in context.subprocess_handlers.values())
    )
    for handler in context.subprocess_handlers.values():
        processes._send(handler.proc, signal.SIGCONT)  # what is gone is not an error
        handler.close(signal.SIGTERM)


def test_the_program_that_launches_is_not_run_again(tmp_path):
    """A script without a guard of its main part, as people write them."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "print('begun', flush=True)\n"
        "from scale_llm.launch.forked_ranks import ForkedProcess\n"
        f"one = ForkedProcess({str(tmp_path)!r}, {{}})\n"
        "print('status', one.wait(60))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("begun") == 1, done.stdout
    assert "status 1" in done.stdout and "KeyError: 'RANK'" in done.stderr, done.stderr


def test_what_a_rank_prints_is_there_when_it_is_killed(tmp_path):
    """Without a new line and without a flush, into a pipe."""
    script = tmp_path / "script.py"
    script.write_text(
        "from types import SimpleNamespace\n"
        "import multiprocessing\n"
        "from scale_llm.config.cluster import Device\n"
        "from scale_llm.launch import processes\n"
        "if __name__ == '__main__':\n"
        "    processes.PRELOADED = 'scale_llm.launch.rank'\n"
        "    cluster = SimpleNamespace(device=Device.cpu)\n"
        "    processes.prepare_start(SimpleNamespace(cluster=cluster, model=SimpleNamespace(compile_ops=False)))\n"
        "    said = 'import os; print(\"said\", end=str()); os._exit(9)'\n"
        "    one = multiprocessing.get_context('forkserver').Process(target=exec, args=(said,))\n"
        "    one.start(); one.join(); print(one.exitcode)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout == "said9\n", done
