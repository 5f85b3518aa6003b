"""A profile shows what a step does, changes no number, and ends no run."""

import gzip
import json

import pytest
import torch
from support.runs import RANKS2, rows

from scale_llm.config.profile import ProfileConfig
from scale_llm.config.run import RunConfig
from scale_llm.config.train import TrainConfig
from scale_llm.parallel import ranges
from scale_llm.parallel.device import Device
from scale_llm.parallel.profilers import MemoryHistory, Nvtx
from scale_llm.stages.health.watchdog import NoWatchdog
from scale_llm.stages.profile import Profile
from scale_llm.stages.report import TIMES

WORDS = [RANKS2, "train.micro_batch_size=2", "train.train_iters=4", "train.eval_interval=2",
         "checkpoint.save_interval=3", "profile.start=1", "profile.stop=3"]  # fmt: skip

NAMES = {"iteration 2", "iteration 3", "data", "forward-backward", "forward-compute", "backward-compute",
         "reduction of gradients", "all-grads-sync", "optimizer", "optimizer-inner-step", "evaluation",
         "save"}  # fmt: skip


def numbers(run_dir) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows(run_dir)]


def test_trace_of_one_rank_and_the_same_numbers(runs, tmp_path):
    """Iterations 2 and 3 on rank 1 of 2. The other run cannot write: it says so, goes on, and has the same numbers."""
    seen, unseen = tmp_path / "seen", tmp_path / "unseen"
    unseen.mkdir()
    (unseen / "profile").write_text("not a directory")
    assert runs(seen, *WORDS, "profile.ranks=[1]") == []
    assert runs(unseen, *WORDS, "profile.ranks=[0,1]") == []
    assert numbers(seen) == numbers(unseen)
    stem = "rank_00001_iterations_2_to_3"
    assert {path.name for path in (seen / "profile").iterdir()} == {f"{stem}.pt.trace.json.gz", f"{stem}.txt"}
    with gzip.open(seen / "profile" / f"{stem}.pt.trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    named = [event for event in events if event.get("cat") == "user_annotation"]
    assert {event["name"] for event in named} >= NAMES
    assert not {"iteration 1", "iteration 4"} & {event["name"] for event in named}
    counts = [sum(event["name"] == name for event in named) for name in ("backward-compute", "evaluation", "save")]
    assert counts == [4, 1, 1], "2 steps of 8 samples as micro-batches of 2 on 2 ranks"
    assert "aten::mm" in (seen / "profile" / f"{stem}.txt").read_text()


def test_nothing_is_named_and_nothing_begun_without_a_profile(tmp_path, monkeypatch):
    """Ranges are one object that does nothing; a run that resumes beyond profile.stop starts no profiler."""
    assert ranges.named("a") is ranges.named("b") and ranges.timer("a") is ranges.timer("b", log_level=2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    cfg = RunConfig(run_dir=str(tmp_path), train=TrainConfig(train_iters=8), profile=ProfileConfig(start=1, stop=3))
    profile = Profile(cfg, Device(torch.device("cpu"), "gloo"), None, NoWatchdog())
    assert profile.after(3) == [] and profile.after(4) == []
    profile.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NVTX and the memory history are of GPUs")
def test_profilers_of_a_gpu(tmp_path):
    """A snapshot is written; NVTX ranges begin and end without an Nsight that listens."""
    watching = [MemoryHistory(), Nvtx(record_shapes=True)]
    for profiler in watching:
        profiler.start()
    ranges.show_ranges(True)
    with ranges.named("a product"):
        torch.ones(64, 64, device="cuda").mm(torch.ones(64, 64, device="cuda"))
    ranges.show_ranges(False)
    files = [file for profiler in reversed(watching) for file in profiler.stop(tmp_path / "rank_00000")]
    assert [file.name for file in files] == ["rank_00000.memory.pickle"] and files[0].stat().st_size
