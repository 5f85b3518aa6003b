"""Every layout computes what one process computes.

20 steps of a tiny model in FP32 with AdamW and gradient clipping: the loss of every step and the first step's gradient
norm within 1e-5 relative of the single process. The gradient norm is what finds wrong gradients that a few small steps
would hide; the later losses find what goes wrong in the optimizer.
"""

import pytest

TOLERANCE = 1e-5

TP2 = {"parallel.tensor_model_parallel_size": 2}
SP = {**TP2, "parallel.sequence_parallel": True}
PP2 = {"parallel.pipeline_model_parallel_size": 2}
CP2 = {"parallel.context_parallel_size": 2}
EP2 = {"parallel.expert_model_parallel_size": 2}
DISTRIBUTED = {"parallel.use_distributed_optimizer": True}
OVERLAP = {**DISTRIBUTED, "parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True}
MOE = {"model.num_experts": 4, "model.moe_router_topk": 2, "model.moe_ffn_hidden_size": 96,
       "model.moe_aux_loss_coeff": 0.01}  # fmt: skip
GPT2 = {"model.normalization": "LayerNorm", "model.swiglu": False, "model.add_bias_linear": True,
        "model.add_qkv_bias": True, "model.position_embedding_type": "learned_absolute", "model.num_query_groups": 4,
        "model.ffn_hidden_size": 256}  # fmt: skip
UNTIED = {"model.untie_embeddings_and_output_weights": True, "model.qk_layernorm": True, "model.add_qkv_bias": True}


def relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / abs(theirs)


def assert_equal_runs(run: list[dict], single: dict, tolerance: float = TOLERANCE) -> None:
    """All ranks report the same, and it is what the single process reports."""
    assert all(rank["loss"] == run[0]["loss"] for rank in run), "ranks disagree on the loss"
    assert len(run[0]["loss"]) == len(single["loss"])
    worst = max(map(relative, run[0]["loss"], single["loss"]))
    assert worst < tolerance, f"losses differ by {worst:.1e}: {run[0]['loss'][:3]} and {single['loss'][:3]}"
    norms = [rank["grad_norm"][0] for rank in run]
    assert max(relative(norm, single["grad_norm"][0]) for norm in norms) < tolerance, (norms, single["grad_norm"][0])


DENSE_LAYOUTS = {
    "tp2": (2, TP2),
    "tp2_sp": (2, SP),
    "pp2": (2, PP2),
    "pp2_vpp2": (2, {**PP2, "parallel.virtual_pipeline_model_parallel_size": 2}),
    "pp4": (4, {"parallel.pipeline_model_parallel_size": 4}),
    "cp2": (2, CP2),
    "dp2": (2, {}),
    "dp2_micro_batch_2": (2, {"train.micro_batch_size": 2}),
    "dp2_distributed_optimizer": (2, DISTRIBUTED),
    "dp2_distributed_optimizer_overlap": (2, OVERLAP),
    "tp2_pp2": (4, {**TP2, **PP2}),
    "tp2_sp_cp2": (4, {**SP, **CP2}),
    "pp2_vpp2_dp2_overlap": (4, {**PP2, "parallel.virtual_pipeline_model_parallel_size": 2, **OVERLAP}),
    "tp2_pp2_dp2": (8, {**SP, **PP2, **DISTRIBUTED}),
    "micro_batch_2": (1, {"train.micro_batch_size": 2}),
    "recompute_selective": (1, {"train.recompute_granularity": "selective"}),
    "recompute_full": (1, {"train.recompute_granularity": "full"}),
    "tp2_sp_recompute_full": (2, {**SP, "train.recompute_granularity": "full", "train.recompute_method": "block"}),
}


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_dense_layout_equals_single_process(ranks, layout):
    world_size, overrides = DENSE_LAYOUTS[layout]
    single = ranks(1, "support.training:train", overrides={})[0]
    assert single["grad_norm"][0] > 1.0, "clipping must be active, or scaling errors of gradients would not show"
    assert_equal_runs(ranks(world_size, "support.training:train", overrides=overrides), single)
