"""One run in a directory at a time, also after a run that was killed."""

import os
import signal
import subprocess
import sys

import pytest

from scale_llm.config.errors import UserError
from scale_llm.launch import lock

HOLD = "import sys, time; from scale_llm.launch.lock import take; take(sys.argv[1]); print('held', flush=True); "


def holding(directory, then: str = "time.sleep(60)") -> subprocess.Popen:
    command = [sys.executable, "-c", HOLD + then, str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_is_refused_and_told_who_is_there(tmp_path):
    process = holding(tmp_path / "run")
    with pytest.raises(UserError, match=rf"run_dir={tmp_path}/run: process {process.pid} on .*kill {process.pid}"):
        lock.take(tmp_path / "run")
    assert lock.is_held(tmp_path / "run")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not lock.is_held(tmp_path / "run"), "the kernel has let it go"
    with lock.held(tmp_path / "run"):
        assert lock.holder(tmp_path / "run")["pid"] == os.getpid()


def test_it_waits_for_one_that_is_about_to_end(tmp_path):
    process = holding(tmp_path, "time.sleep(1)")
    os.close(lock.take(tmp_path, wait_seconds=30))
    process.communicate()


def test_a_rank_holds_on_what_its_starter_took(tmp_path):
    """The lock goes through exec, as join and Slurm's tasks need."""
    script = "import os, sys, time; from scale_llm.launch.lock import take; take(sys.argv[1], inheritable=True); "
    script += "os.execv('/bin/sh', ['sh', '-c', 'echo held; read line'])"
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout.readline() == "held\n" and lock.is_held(tmp_path)
    process.communicate("\n")
    assert not lock.is_held(tmp_path)


def test_nothing_is_held_where_nothing_is(tmp_path):
    assert not lock.is_held(tmp_path / "none") and lock.holder(tmp_path) == {}
    (tmp_path / lock.LOCK).write_text("no json")
    assert lock.holder(tmp_path) == {} and "another host" in lock.refusal(tmp_path)
