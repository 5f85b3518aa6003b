"""Stopping and resuming changes nothing; another layout or optimizer changes no more than rounding does."""

import pytest
from support.parity import MOE, relative
from support.runs import CP2, PP2, RANKS2, SP, TP2, VPP2, latest, losses
from support.slow import slow_but

STOP = "train.exit_interval=10"
DISTRIBUTED = "parallel.use_distributed_optimizer=true"
OVERLAP = [DISTRIBUTED, "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
RANKS4 = "cluster.nproc_per_node=4"
DROPOUT = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"]


def test_command_line_resumes_bit_for_bit(runs, tmp_path):
    """20 steps equal 10 + stop + 10 in metrics.jsonl and in every tensor saved, BF16 on two tensor-parallel ranks."""
    words = ["precision=bf16", TP2, SP]
    resumed, whole = tmp_path / "resumed", tmp_path / "whole"
    first = runs.command(resumed, *words, STOP)
    assert "train.exit_interval=10" in first and latest(resumed) == 10
    assert len(losses(resumed)) == 10
    second = runs.command(resumed, *words, STOP)
    assert "resum" in second.splitlines()[0], second
    assert latest(resumed) == 20
    assert runs(whole, *words) == []
    runs.assert_same_bits(resumed, whole)
    assert len(losses(whole)) == 20


VARIANTS = {
    "dropout": ["precision=bf16", *DROPOUT],
    "dropout_tp2_sp": ["precision=bf16", *DROPOUT, TP2, SP],
    "distributed_optimizer_bf16": ["precision=bf16", *OVERLAP, RANKS2],
    # no evaluation gathers the weights before the save
    "gathered_late": [*OVERLAP, RANKS2, "train.eval_interval=null"],
    "distributed_optimizer_bf16_plain": ["precision=bf16", DISTRIBUTED, RANKS2],
    "distributed_optimizer_fp32": [*OVERLAP, RANKS2],
    "pp2_vpp2": [PP2, VPP2],
    "moe_ep2": [f"{key}={value}" for key, value in MOE.items() if key != "model.num_layers"]
    + ["parallel.expert_model_parallel_size=2"],
    "sgd": ["optim=sgd"],
    "stopped_between_log_lines": ["train.log_interval=4"],
    "fp16": ["precision=fp16", "precision.initial_loss_scale=1024", "precision.loss_scale_window=3"],
}


QUICK = ("dropout_tp2_sp", "distributed_optimizer_bf16", "pp2_vpp2", "moe_ep2", "fp16")


@pytest.mark.parametrize("variant", slow_but(VARIANTS, *QUICK))
def test_resume_is_bit_for_bit(runs, tmp_path, variant):
    """Dropout: every rank's generators must continue where they stood."""
    runs.resumed_and_whole(tmp_path, "train.train_iters=12", *VARIANTS[variant], stop=6, iteration=12)


@pytest.fixture(scope="module")
def uninterrupted(runs, tmp_path_factory):
    """20 steps of one process in FP32."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    assert runs(directory) == []
    return directory


CHANGES = {
    "tp2_to_pp2_dp2_distributed": ([TP2], [PP2, DISTRIBUTED, RANKS4]),
    "pp2_dp2_distributed_to_tp2": ([PP2, DISTRIBUTED, RANKS4], [TP2]),
    "plain_to_distributed": ([RANKS2], [DISTRIBUTED, RANKS2]),
    "distributed_to_plain": ([*OVERLAP, RANKS2], [RANKS2]),
    "vpp2_to_cp2": ([PP2, VPP2], [CP2]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_resume_on_another_layout(runs, uninterrupted, tmp_path, change):
    """10 steps on one and 10 on another: each loss within 1e-5 of the uninterrupted run, weights within 1e-4."""
    before, after = CHANGES[change]
    assert runs(tmp_path, *before, STOP) == []
    assert runs(tmp_path, *after) == []
    ours, wanted = losses(tmp_path), losses(uninterrupted)
    assert len(ours) == len(wanted) == 20
    assert max(map(relative, ours, wanted)) < 1e-5
    worst = {name: d for name, d in runs.differences(tmp_path, uninterrupted).items() if d > 1e-3}
    assert not worst, worst


@pytest.mark.parametrize("order", ["plain_first", "distributed_first"])
def test_bf16_main_weights_move_between_optimizers(runs, tmp_path, order):
    """FP32 main weights keep their bits when the optimizer that holds them changes: two ranks add alike either way."""
    plain = ["precision=bf16", RANKS2]
    layouts = [plain, [*plain, DISTRIBUTED]]
    before, after = layouts if order == "plain_first" else layouts[::-1]
    assert runs(tmp_path / "moved", *before, STOP) == []
    assert runs(tmp_path / "moved", *after) == []
    assert runs(tmp_path / "whole", *before) == []
    assert max(map(relative, losses(tmp_path / "moved"), losses(tmp_path / "whole"))) < 1e-4
    assert max(runs.differences(tmp_path / "moved", tmp_path / "whole").values()) < 0.05
