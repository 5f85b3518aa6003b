"""A distributed optimizer's state is saved where it lies; what is saved is what gathering it would have given."""

import math
from pathlib import Path

import pytest
import torch
from support.parity import MOE
from support.runs import RANKS2, SP, TP2

from scale_llm.engine.distributed_state import boxes

SHAPES = [(), (1,), (7,), (4, 5), (1, 6), (6, 1), (2, 3, 4), (3, 1, 2), (2, 2, 2, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boxes_hold_a_range(shape):
    """Every range of every shape: the boxes' elements, one box after another, are the range, and lie together."""
    tensor = torch.arange(math.prod(shape)).view(shape)
    for first in range(tensor.numel() + 1):
        for end in range(first, tensor.numel() + 1):
            found = []
            for offsets, sizes in boxes(shape, first, end):
                box = tensor
                for axis, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
                    box = box.narrow(axis, offset, size)
                assert box.is_contiguous() and box.numel()
                found += box.flatten().tolist()
            assert found == list(range(first, end))
            if shape:
                assert len(list(boxes(shape, first, end))) <= 2 * len(shape) - 1


DISTRIBUTED = "parallel.use_distributed_optimizer=true"
LAYOUTS = {
    "dp2_bf16": [RANKS2, "precision=bf16"],
    "dp2_fp32": [RANKS2],
    "tp2_dp2": [TP2, SP, "cluster.nproc_per_node=4", "precision=bf16"],
    "moe_ep2_dp2": [f"{key}={value}" for key, value in MOE.items() if key != "model.num_layers"]
    + ["parallel.expert_model_parallel_size=2", "cluster.nproc_per_node=4", "train.micro_batch_size=2"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranges_are_what_gathering_gives(runs, tmp_path, layout):
    """Every tensor, bit for bit; and every rank writes its part of the optimizer's state (weights are written by the
    first rank that has them)."""
    words = [*LAYOUTS[layout], DISTRIBUTED, "model.num_layers=2", "train.train_iters=3", "train.eval_interval=null"]
    assert runs(tmp_path / "ranges", *words) == []
    assert not any(map(len, runs.on_ranks("support.stage:run_gathering", tmp_path / "gathered", *words)))
    runs.assert_same_bits(tmp_path / "ranges", tmp_path / "gathered", 3)
    ours, theirs = (file_sizes(tmp_path / name / "checkpoints" / "iter_0000003") for name in ("ranges", "gathered"))
    assert min(ours) > 0.25 * max(ours)
    assert min(theirs) < 0.05 * max(theirs), "what is gathered is written by some"


def file_sizes(checkpoint: Path) -> list[int]:
    return [path.stat().st_size for path in sorted(checkpoint.glob("__*_0.distcp"))]
