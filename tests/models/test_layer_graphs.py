"""Layers replayed as CUDA graphs, with a stand-in for a GPU's: which passes are replayed, and that nothing else
changes. What graphs themselves do is tested in tests/gpu."""

import pytest
from support.parity import GPT2

STEPS = 4


@pytest.mark.parametrize(("overrides", "world"), [
    ({}, 1), (GPT2, 1), ({"precision.bf16": True, "train.micro_batch_size": 2}, 1),
    ({"parallel.use_distributed_optimizer": True, "parallel.overlap_grad_reduce": True}, 2),
], ids=["llama", "gpt2", "bf16", "distributed_optimizer"])  # fmt: skip
def test_training_is_the_same_to_the_last_bit(ranks, overrides, world):
    """Losses and gradient norms of steps of several micro-batches, evaluations between, and a step of longer samples.
    Training passes of the first shape are replayed, and no other."""
    function = "support.graphs:train"
    plain = ranks(world, function, overrides=overrides, steps=STEPS, replayed=False)
    replayed = ranks(world, function, overrides=overrides, steps=STEPS, replayed=True)
    for before, after in zip(plain, replayed, strict=True):
        replays = after.pop("replays")
        assert (before.pop("replays"), replays) == (0, STEPS * after["micro_batches"] * 4), "four layers"
        assert not before.pop("graphed") and after.pop("graphed")
        assert before == after
        assert after["loss"][-1] < after["loss"][0] and after["another_shape"] > 0
