"""Layouts, models and the comparison of runs that the tests of the engine share."""

TOLERANCE = 1e-5
"""Relative, in FP32: sums in another order differ by about 1e-7, and 20 steps carry that on."""

TP2 = {"parallel.tensor_model_parallel_size": 2}
SP = {**TP2, "parallel.sequence_parallel": True}
PP2 = {"parallel.pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "parallel.virtual_pipeline_model_parallel_size": 2}
CP2 = {"parallel.context_parallel_size": 2}
EP2 = {"parallel.expert_model_parallel_size": 2}
DISTRIBUTED = {"parallel.use_distributed_optimizer": True}
OVERLAP = {**DISTRIBUTED, "parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True}

MOE = {"model.num_layers": 2, "model.num_experts": 4, "model.moe_router_topk": 2, "model.moe_ffn_hidden_size": 96,
       "model.moe_aux_loss_coeff": 0.01}  # fmt: skip
GPT2 = {"model.normalization": "LayerNorm", "model.swiglu": False, "model.add_bias_linear": True,
        "model.add_qkv_bias": True, "model.position_embedding_type": "learned_absolute", "model.num_query_groups": 4,
        "model.ffn_hidden_size": 256}  # fmt: skip
UNTIED = {"model.untie_embeddings_and_output_weights": True, "model.qk_layernorm": True, "model.add_qkv_bias": True}


def relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / abs(theirs)


def assert_equal_runs(run: list[dict], single: dict, tolerance: float = TOLERANCE) -> None:
    """All ranks report the same losses, and they and the first gradient norm are the single process's, which may have
    gone on longer."""
    assert all(rank["loss"] == run[0]["loss"] for rank in run), "ranks disagree on the loss"
    assert 0 < len(run[0]["loss"]) <= len(single["loss"])
    norms = [rank["grad_norm"][0] for rank in run]
    assert max(relative(norm, single["grad_norm"][0]) for norm in norms) < tolerance, (norms, single["grad_norm"][0])
    worst = max(map(relative, run[0]["loss"], single["loss"]))
    assert worst < tolerance, f"losses differ by {worst:.1e}: {run[0]['loss'][:3]} and {single['loss'][:3]}"
