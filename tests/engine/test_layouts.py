"""Every layout computes what one process computes.

20 steps (8 of some) of a tiny model in FP32 with AdamW and gradient clipping: the loss of every step and the first
step's gradient norm within 1e-5 relative of the single process. The gradient norm is what finds wrong gradients that a
few small steps would hide; the later losses find what goes wrong in the optimizer.
"""

import pytest
from support.batches import SEQ_LENGTH
from support.parity import (
    CP2,
    DISTRIBUTED,
    EP2,
    GPT2,
    MOE,
    OVERLAP,
    PP2,
    SP,
    TP2,
    UNTIED,
    VPP2,
    assert_equal_runs,
    relative,
)
from support.slow import slow_but

TRAIN = "support.training:train"

DENSE_LAYOUTS = {
    "tp2": (2, TP2),
    "tp2_sp": (2, SP),
    "pp2": (2, PP2),
    "pp2_vpp2": (2, VPP2),
    "pp4": (4, {"parallel.pipeline_model_parallel_size": 4}),
    "cp2": (2, CP2),
    "dp2": (2, {}),
    "dp2_micro_batch_2": (2, {"train.micro_batch_size": 2}),
    "dp2_distributed_optimizer": (2, DISTRIBUTED),
    "dp2_distributed_optimizer_overlap": (2, OVERLAP),
    "tp2_pp2": (4, {**TP2, **PP2}),
    "tp2_sp_cp2": (4, {**SP, **CP2}),
    "pp2_vpp2_dp2_overlap_all": (
        4,
        {
            **VPP2,
            **OVERLAP,
            "parallel.overlap_p2p_comm": True,
            "parallel.ddp_bucket_size": 20000,
            "parallel.ddp_pad_buckets_for_high_nccl_busbw": True,
        },
    ),
    "tp2_pp2_dp2": (8, {**SP, **PP2, **DISTRIBUTED}),
    "micro_batch_2": (1, {"train.micro_batch_size": 2}),
    "recompute_selective": (1, {"train.recompute_granularity": "selective"}),
    "recompute_full": (1, {"train.recompute_granularity": "full"}),
    "tp2_sp_recompute_full": (2, {**SP, "train.recompute_granularity": "full", "train.recompute_method": "block"}),
}


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_dense_layout_equals_single_process(ranks, layout):
    world_size, overrides = DENSE_LAYOUTS[layout]
    single = ranks(1, TRAIN, overrides={})[0]
    assert single["grad_norm"][0] > 1.0, "clipping must be active, or scaling errors of gradients would not show"
    assert_equal_runs(ranks(world_size, TRAIN, overrides=overrides), single)


FEWER = 8
"""Steps of a case whose parts the dense layouts have at 20: the optimizer and the schedule have moved by then."""

COMPILED_LAYOUTS = {
    "moe_untied_qk_norm_qkv_bias_tp2_sp": (2, {**MOE, **UNTIED, **SP}),
    "pp2_vpp2": (2, VPP2),
    "dp2_distributed_optimizer_overlap": (2, OVERLAP),
}


@pytest.mark.parametrize("layout", slow_but(COMPILED_LAYOUTS, "dp2_distributed_optimizer_overlap"))
def test_compiled_layout_equals_plain_single_process(ranks, layout):
    """model.compile_ops, as a run has it where there is a compiler, against plain torch on one rank."""
    world_size, overrides = COMPILED_LAYOUTS[layout]
    model = {key: value for key, value in overrides.items() if key.startswith("model.")}
    single = ranks(1, TRAIN, overrides=model)[0]
    compiled = {**overrides, "model.compile_ops": True}
    assert_equal_runs(ranks(world_size, TRAIN, timeout_seconds=300, overrides=compiled, steps=FEWER), single)


OTHER_MODELS = {
    "moe_ep2": (2, MOE, EP2),
    "moe_tp2_sp": (2, MOE, SP),
    "moe_cp2": (2, MOE, CP2),
    "moe_pp2": (2, MOE, PP2),
    "moe_dp2_distributed_optimizer": (2, MOE, DISTRIBUTED),
    "moe_tp2_sp_ep2_dp2": (4, MOE, {**SP, **EP2, "parallel.expert_tensor_parallel_size": 2}),
    "moe_tp2_sp_ep2_etp1": (4, MOE, {**SP, **EP2, "parallel.expert_tensor_parallel_size": 1}),
    "moe_tp2_sp_etp1": (2, MOE, {**SP, "parallel.expert_tensor_parallel_size": 1}),
    "moe_dp2_etp2": (2, MOE, {"parallel.expert_tensor_parallel_size": 2}),
    "gpt2_tp2_sp": (2, GPT2, SP),
    "gpt2_pp2": (2, GPT2, PP2),
    "gpt2_cp2": (2, GPT2, CP2),
    "untied_qk_norm_qkv_bias_tp2": (2, UNTIED, TP2),
    "untied_qk_norm_qkv_bias_tp2_sp": (2, UNTIED, SP),
    "untied_qk_norm_qkv_bias_pp2": (2, UNTIED, PP2),
}


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_layout_of_another_model_equals_single_process(ranks, case):
    world_size, model, layout = OTHER_MODELS[case]
    single = ranks(1, TRAIN, overrides=model)[0]
    steps = 20 if case == "moe_ep2" else FEWER
    assert_equal_runs(ranks(world_size, TRAIN, overrides={**model, **layout}, steps=steps), single)


def test_load_balancing_weighs_the_same_beside_any_loss(ranks):
    """Whether a loss counts every place of a row or the row as one, as losses of pairs do, on one rank and on two."""
    found = [
        ranks(world_size, "support.experts:balancing_gradient", overrides=MOE, counted=counted)[0]
        for world_size, counted in ((1, float(SEQ_LENGTH)), (1, 1.0), (2, 0.5))
    ]
    assert found[0] > 1e-3
    assert max(relative(norm, found[0]) for norm in found[1:]) < 1e-5


SPLITS = {
    "micro_batches_of_4": (1, {"train.micro_batch_size": 4}),
    "dp2": (2, {}),
    "dp2_micro_batches_of_2": (2, {"train.micro_batch_size": 2}),
    "cp2": (2, {**CP2, "train.micro_batch_size": 2}),
    "pp2": (2, {**PP2, "train.micro_batch_size": 2}),
    "dp2_overlapped_reduction": (2, {"parallel.overlap_grad_reduce": True}),
}


@pytest.mark.parametrize("split", SPLITS)
def test_gradient_does_not_depend_on_how_the_batch_is_split(ranks, split):
    """The mean is over all tokens that count, wherever they lie: one division, by the global count.

    Sample i counts 18 i tokens, so any mean of means would differ. One step of SGD with learning rate 1,
    without momentum,
    clipping or decay, subtracts the gradient: the difference of weights is compared, element for element.
    """
    sgd = {"optim.optimizer": "sgd", "optim.lr": 1.0, "optim.lr_decay_style": "constant", "optim.sgd_momentum": 0.0,
           "optim.clip_grad": 0.0, "optim.weight_decay": 0.0}  # fmt: skip
    wanted = {"steps": 1, "masks": "ragged", "weights": True}
    single = ranks(1, TRAIN, overrides=sgd, **wanted)[0]
    world_size, layout = SPLITS[split]
    run = ranks(world_size, TRAIN, overrides={**sgd, **layout}, **wanted)[0]
    assert relative(run["loss"][0], single["loss"][0]) < 1e-6
    for name, before in single["before"].items():
        gradient, theirs = before - single["after"][name], run["before"][name] - run["after"][name]
        assert gradient.abs().max() > 0, name
        # 3e-7: weights are near 1, so that a difference of two of them is exact to about 1e-7
        assert (theirs - gradient).abs().max() < 1e-5 * gradient.abs().max() + 3e-7, name


@pytest.mark.parametrize("layout", ["cp2", "dp2"])
def test_document_masks(ranks, layout):
    """An explicit attention mask, which stops at document ends, is cut to each rank's part of the sequence."""
    single = ranks(1, TRAIN, overrides={}, masks="documents")[0]
    plain = ranks(1, TRAIN, overrides={})[0]
    assert relative(single["loss"][0], plain["loss"][0]) > 1e-5, "the mask must matter"
    assert_equal_runs(ranks(2, TRAIN, overrides=CP2 if layout == "cp2" else {}, masks="documents"), single)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_other_optimizers_under_tensor_parallelism(ranks, optimizer):
    rate = 0.1 if optimizer == "sgd" else 1e-3
    overrides = {"optim.optimizer": optimizer, "optim.lr": rate, "optim.weight_decay": 0.1}
    single = ranks(1, TRAIN, overrides=overrides)[0]
    adamw = ranks(1, TRAIN, overrides={"optim.weight_decay": 0.1})[0]
    assert relative(single["loss"][-1], adamw["loss"][-1]) > 1e-4, "another optimizer takes other steps"
    assert_equal_runs(ranks(2, TRAIN, overrides={**overrides, **SP}), single)
