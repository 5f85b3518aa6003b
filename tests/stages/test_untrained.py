"""Stages without training end on all ranks at once."""

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from scale_llm import stages


@pytest.mark.parametrize("name", ["evaluate", "score", "generate"])
def test_all_ranks_wait_for_the_results(name, monkeypatch):
    """Slurm kills a task half a minute after the first one has ended, and the last rank writes alone."""
    done = []
    monkeypatch.setattr(f"scale_llm.stages.{name}.{name}", lambda run: done.append("written"))
    monkeypatch.setattr(dist, "barrier", lambda group: done.append(group))
    stages.run_stage(SimpleNamespace(cfg=SimpleNamespace(stage=SimpleNamespace(name=name)),
                                     mesh=SimpleNamespace(host_group="waited")))  # fmt: skip
    assert done == ["written", "waited"]
