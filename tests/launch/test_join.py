"""Ranks that torchrun or srun started wait for the first, and learn that it has failed."""

import threading

import pytest

from scale_llm.config.errors import UserError
from scale_llm.config.io import write_text
from scale_llm.launch import join
from scale_llm.launch.environment import Joined, start_name


def rank_of(starter: str) -> Joined:
    return Joined(
        rank=1, world_size=2, local_rank=1, local_world_size=2, master_addr="h", master_port=1, starter=starter
    )


def fail(ready) -> None:
    with pytest.raises(RuntimeError), join.marked(ready, "this start"):
        raise RuntimeError("the disk is full")


def test_the_others_learn_that_rank_0_has_failed(tmp_path):
    ready = tmp_path / join.READY
    fail(ready)
    with pytest.raises(UserError, match="rank 0 could not prepare"):
        join.wait_until_ready(ready, "this start", rank_of("srun"))
    with join.marked(ready, "this start"):
        pass
    join.wait_until_ready(ready, "this start", rank_of("srun"))


def test_a_failure_that_an_earlier_start_of_the_same_name_has_left(tmp_path, monkeypatch):
    ready = tmp_path / join.READY
    fail(ready)
    later = threading.Timer(0.3, write_text, (ready, "this start"))
    later.start()
    join.wait_until_ready(ready, "this start", rank_of("torchrun"), poll_seconds=0.05)
    later.join()
    fail(ready)
    monkeypatch.setattr(join, "SECONDS_TO_BELIEVE", 0.2)
    with pytest.raises(UserError, match="rank 0 could not prepare"):
        join.wait_until_ready(ready, "this start", rank_of("torchrun"), poll_seconds=0.05)


def test_names_of_starts():
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    srun = [start_name(rank_of("srun"), {**step, **changed}) for changed in ({}, {"SLURM_RESTART_COUNT": "1"})]
    assert srun == ["7.0.0", "7.1.0"]
    assert start_name(rank_of("torchrun"), {"TORCHELASTIC_RUN_ID": "x"}) == "h:1 x"
