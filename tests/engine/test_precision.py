"""Number formats: BF16 under tensor parallelism, FP16 with dynamic loss scaling."""

import math

from support.parity import EP2, MOE, SP, relative

TRAIN = "support.training:train"
BF16 = {"precision.bf16": True}


def test_bf16_is_near_fp32_and_equal_over_layouts_within_its_rounding(ranks):
    """BF16 keeps 8 bits, so one rounding is up to 0.4%; a loss is a mean over 256 tokens, whose roundings
    mostly cancel.

    Sums in another order may round another way, no more: the same bound of 0.3% holds between layouts and against FP32.
    """
    fp32 = ranks(1, TRAIN, overrides={}, steps=5)[0]
    single = ranks(1, TRAIN, overrides=BF16, steps=5)[0]
    run = ranks(2, TRAIN, overrides={**BF16, **SP}, steps=5)
    assert run[0]["loss"] == run[1]["loss"]
    for step in range(5):
        assert relative(single["loss"][step], fp32["loss"][step]) < 3e-3
        assert relative(run[0]["loss"][step], single["loss"][step]) < 3e-3
    assert relative(run[0]["grad_norm"][0], single["grad_norm"][0]) < 2e-2
    assert single["loss"] != fp32["loss"], "BF16 was not used"


def test_fp16_overflow_is_skipped_and_halves_the_scale(ranks):
    """At a scale of 2^22 gradients overflow: with hysteresis 2 the scale halves at every overflow after the first."""
    fp16 = {"precision.fp16": True, "precision.initial_loss_scale": 2.0**22, "precision.hysteresis": 2,
            "precision.loss_scale_window": 4}  # fmt: skip
    for world_size, layout in ((1, {}), (2, SP)):
        run = ranks(world_size, TRAIN, overrides={**fp16, **layout}, steps=20, weights=True)[0]
        overflows = run["skipped"].index(False)
        assert overflows >= 2, "the scale was not high enough for an overflow"
        assert all(not math.isfinite(norm or math.inf) or skipped is False
                   for norm, skipped in zip(run["grad_norm"], run["skipped"], strict=True))  # fmt: skip
        scales = run["loss_scale"]
        assert scales[0] == 2.0**22, "the first overflow is forgiven"
        assert scales[overflows - 1] == 2.0 ** (22 - (overflows - 1))
        assert scales[overflows + 3] == 2 * scales[overflows - 1], "4 good steps double it"
        stopped = ranks(world_size, TRAIN, overrides={**fp16, **layout}, steps=overflows, weights=True)[0]
        assert all((stopped["after"][name] == weight).all() for name, weight in stopped["before"].items())
        assert any((run["after"][name] != weight).any() for name, weight in run["before"].items())
        assert run["learning_rate"][: overflows + 1] == [run["learning_rate"][0]] * (overflows + 1)


def test_fp16_has_one_scale_for_dense_parameters_and_experts(ranks):
    """Where gradients of experts alone overflow, the step is left out and the one scale is halved, by which all that
    comes after is divided."""
    moe = {**MOE, **EP2}
    right = ranks(2, TRAIN, overrides={**moe, "precision.fp16": True, "precision.initial_loss_scale": 1024.0}, steps=1)
    for rank in ranks(2, "support.experts:overflow_of_experts", overrides=moe):
        assert rank["skipped"] == [True, False] and rank["loss_scale"] == [512.0, 512.0]
        assert relative(rank["grad_norm"][1], right[0]["grad_norm"][0]) < 1e-5


def test_fp16_losses_are_those_of_fp32(ranks):
    """10 bits: within 0.1%."""
    fp16 = {"precision.fp16": True, "precision.initial_loss_scale": 1024.0}
    fp32 = ranks(1, TRAIN, overrides={})[0]
    run = ranks(1, TRAIN, overrides=fp16)[0]
    assert not any(run["skipped"])
    assert max(map(relative, run["loss"], fp32["loss"])) < 1e-3
