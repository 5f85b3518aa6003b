"""State that only GPUs have, by stand-ins: fused optimizers' step counts, FP8 scales without pickles."""

import pytest
from support.parity import relative

BF16 = {"precision.bf16": True}
DISTRIBUTED = {**BF16, "parallel.use_distributed_optimizer": True}
TP, PP = {"parallel.tensor_model_parallel_size": 2}, {"parallel.pipeline_model_parallel_size": 2}


@pytest.mark.parametrize("layout", [BF16, DISTRIBUTED])
@pytest.mark.parametrize(("first", "second"), [("Apex", None), (None, "Transformer Engine")])
def test_checkpoints_move_between_optimizer_libraries(ranks, tmp_path, layout, first, second):
    """The first update after a load divides by 1 - beta^4 where the step count came along, by 1 - beta where it did
    not: the losses would part by far more than sums in another order do."""
    world = 2 if layout is DISTRIBUTED else 1
    run = ranks.fresh(world, "support.gpu_state:moved_optimizer", directory=str(tmp_path), overrides=layout,
                      first=first, second=second)[0]  # fmt: skip
    names = ["Apex's FusedAdam" if first == "Apex" else "torch's AdamW",
             "Transformer Engine's FusedAdam" if second else "torch's AdamW"]  # fmt: skip
    assert [kernels.rpartition(", ")[2] for kernels in run["names"]] == names
    for on, moved in zip(run["on"], run["moved"], strict=True):
        assert relative(moved, on) < 1e-4
    assert abs(run["on"][-1] - run["started"][0]) > 0.01, "nothing was learnt"


def test_fp8_scales_are_tensors_that_any_layout_loads_and_no_pickle_is_read(ranks, tmp_path):
    """Saved by two tensor-parallel ranks, of which one writes; loaded by two stages, each its own layers' half."""
    saved = ranks.fresh(2, "support.gpu_state:saved_fp8", directory=str(tmp_path), overrides={**BF16, **TP})
    assert saved[0] == saved[1] and len(saved[0]) == 4 * 4 * 4
    assert "optimizer.fp8.decoder.layers.3.mlp.linear_fc2.amax_history_bwd" in saved[0]
    told = ranks.fresh(2, "support.gpu_state:loaded_fp8", directory=str(tmp_path), overrides={**BF16, **PP})
    assert "set precision.fp8_amax_history_len to what it was" in told[0] and told[0] == told[1]


def test_fp8_begins_anew_from_a_checkpoint_of_bf16(ranks, tmp_path):
    assert ranks.fresh(1, "support.gpu_state:without_fp8", directory=str(tmp_path)) == [0]


def test_fp8_is_on_in_training_and_evaluation_over_a_stages_ranks_and_off_in_generation(ranks):
    """Delayed scaling opens one context a pass, here of one of two stages, each a rank; other recipes one a layer, of
    which the first and last of four stay in BF16."""
    for rank, run in enumerate(ranks(2, "support.gpu_state:fp8_contexts", recipe="delayed", first_last=False)):
        passes = run["micro_batches"]
        assert run["built"] == 1, "the state of step 0"
        assert (run["trained"], run["evaluated"], run["generated"]) == (passes, passes, 0)
        assert run["ranks"] == ("delayed", [rank])
    for run in ranks(2, "support.gpu_state:fp8_contexts", recipe="tensorwise", first_last=True):
        passes = run["micro_batches"]
        assert run["built"] == 0, "weights are BF16"
        assert (run["trained"], run["evaluated"], run["generated"]) == (2 * passes, 2 * passes, 0)
        assert run["ranks"] == ("tensorwise", [0, 1])
