"""An engine whose memory is taken away between steps computes the same bits as one that keeps it."""

import pytest
import torch
from support.parity import DISTRIBUTED, EP2, MOE, OVERLAP, PP2, TP2, VPP2

BF16 = {"precision.bf16": True}
CASES = {
    "fp32": (1, {}),
    "bf16": (1, BF16),
    "bf16_gradients": (1, {**BF16, "precision.accumulate_allreduce_grads_in_fp32": False}),
    "sgd": (1, {"optim.optimizer": "sgd", "optim.lr": 0.1}),
    "lora_nf4": (1, {"peft.method": "lora", "peft.quantize_base": "nf4"}),
    "dp2_distributed_optimizer": (2, {**DISTRIBUTED}),
    "dp2_bf16_overlap": (2, {**BF16, **OVERLAP}),
    "dp2_overlapped_reduction": (2, {"parallel.overlap_grad_reduce": True}),
    "pp2_vpp2_dp2_overlap": (4, {**VPP2, **OVERLAP}),
    "tp2_pp2": (4, {**TP2, **PP2}),
    "moe_ep2_bf16_distributed_optimizer": (2, {**MOE, **EP2, **BF16, **DISTRIBUTED}),
}


@pytest.mark.parametrize("case", CASES)
def test_same_bits_with_memory_away_between_steps(ranks, case):
    world_size, overrides = CASES[case]
    kept = ranks(world_size, "support.offload:train", overrides=overrides, away=False)
    away = ranks(world_size, "support.offload:train", overrides=overrides, away=True)
    for one, other in zip(kept, away, strict=True):
        for what in ("loss", "grad_norm", "evaluated"):
            assert one[what] == other[what]
    assert all(torch.equal(value, away[0]["model"][name]) for name, value in kept[0]["model"].items())


@pytest.mark.parametrize("case", CASES)
def test_memory_is_free_while_away(ranks, case):
    """Counted over all tensors of the process, whoever holds them: batches and tables of angles are left."""
    world_size, overrides = CASES[case]
    for rank in ranks(world_size, "support.offload:train", overrides=overrides, away=True):
        left = rank["left"]
        assert left["held"] == 0
        assert left["freed"] == left["returned"] > left["copied"]
        # of storages that are there both times: gloo's threads let the sums of metrics go when they like
        assert left["came_back"] == left["freed"]
        assert left["away"] < 100_000 < 800_000 < left["freed"]
        assert left["gradients"] == 0


def test_frozen_engine(ranks):
    (found,) = ranks(1, "support.offload:frozen")
    assert found["same"]
    assert found["left"]["held"] == 0 and found["left"]["freed"] == found["left"]["copied"] > 100_000


def test_use_while_away_is_an_error(ranks):
    (said,) = ranks(1, "support.offload:used_while_away")
    assert set(said.values()) == {"the engine is offloaded: call onload first"}, said
