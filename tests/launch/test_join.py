"""Ranks that torchrun or srun started wait for the first, and learn that it has failed."""

import os
import threading
from dataclasses import replace

import pytest

from scale_llm.config.compose import compose
from scale_llm.config.errors import UserError
from scale_llm.config.io import write_text
from scale_llm.config.machine import Machine
from scale_llm.config.resolve import resolve
from scale_llm.launch import environment, join
from scale_llm.launch.environment import Joined, start_name

MACHINE = Machine(cores=4, gpus=1, fast_bf16_cpu=False)


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


@pytest.mark.parametrize(("device", "way", "world", "libraries"), [
    ("cpu", "eth1", 4, "GLOO"), ("cuda", "eth1", 4, "GLOO NCCL"), ("cuda", "lo", 2, "GLOO"), ("cpu", "lo", 4, ""),
])  # fmt: skip
def test_a_rank_takes_the_interface_that_leads_to_the_first(tmp_path, monkeypatch, device, way, world, libraries):
    """The libraries' own choice is a bridge of containers on some nodes."""
    for library in ("GLOO", "NCCL"):
        monkeypatch.delenv(f"{library}_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(environment, "interface_towards", lambda host, port: way)
    monkeypatch.setattr(join, "wait_until_ready", lambda ready, start, rank: None)
    found = {}
    monkeypatch.setattr(os, "execve", lambda program, words, variables: found.update(variables))
    cfg = resolve(compose([f"run_dir={tmp_path}", f"cluster.device={device}"]), MACHINE)
    join.join_ranks(cfg, replace(rank_of("torchrun"), world_size=world), "x")
    names = {name: value for name, value in found.items() if name.endswith("_SOCKET_IFNAME")}
    assert names == {f"{library}_SOCKET_IFNAME": way for library in libraries.split()}


def test_names_of_starts():
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    srun = [start_name(rank_of("srun"), {**step, **changed}) for changed in ({}, {"SLURM_RESTART_COUNT": "1"})]
    assert srun == ["7.0.0", "7.1.0"]
    here, there = (replace(rank_of("torchrun"), master_addr=address) for address in ("localhost", "10.0.0.1"))
    assert [start_name(rank, {"TORCHELASTIC_RUN_ID": "x"}) for rank in (here, there)] == ["1 x"] * 2
