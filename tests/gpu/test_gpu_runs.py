"""Whole runs on a GPU: resume to the last bit, saved in the background, and checkpoints between CPU and GPU."""

import pytest
import torch
from support.parity import relative
from support.runs import latest, losses

from scale_llm.config import timeline

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

STOP = "train.exit_interval=10"


@pytest.mark.parametrize("words", [
    ["precision=bf16", "checkpoint.async_save=true", "checkpoint.save_interval=5"],
    ["precision=bf16", "model.hidden_dropout=0.1"],
    ["precision=fp32", "model.backend=torch"],
    ["precision=fp8_delayed"],
], ids=["bf16_saved_in_the_background", "dropout", "fp32_torch", "fp8_delayed"])  # fmt: skip
def test_resume_is_bit_for_bit(gpu_runs, tmp_path, words):
    """20 steps equal 10, a stop and 10 more, in metrics.jsonl and in every tensor saved. Fused optimizers count steps
    elsewhere than torch's, and the tracker of generators holds a GPU's."""
    if "precision=fp8_delayed" in words:
        pytest.importorskip("transformer_engine")
    resumed, whole = tmp_path / "resumed", tmp_path / "whole"
    gpu_runs.command(resumed, *words, STOP)
    assert latest(resumed) == 10
    gpu_runs.command(resumed, *words)
    gpu_runs.command(whole, *words)
    gpu_runs.assert_same_bits(resumed, whole)


def test_kernels_are_in_the_straggler_report(gpu_runs, tmp_path):
    """Where the CUPTI module of nvidia-resiliency-ext is built for this machine."""
    pytest.importorskip("nvrx_cupti_module")
    gpu_runs.command(tmp_path, "health.straggler_interval=4")
    reports = [event for event in timeline.read(tmp_path) if event["event"] == "straggler report"]
    assert reports and all(report["kernels_relative"] == 1.0 for report in reports), "one rank is the fastest"
    assert all(0 < report["kernels_individual"] <= 1.0 for report in reports)


@pytest.mark.parametrize("there", ["cpu_to_gpu", "gpu_to_cpu"])
def test_a_checkpoint_of_the_other_device_is_continued(gpu_runs, runs, tmp_path, there):
    """10 steps on one and 10 on the other, FP32: every loss within 1e-4 of 20 steps on the CPU."""
    first, second = (runs, gpu_runs) if there == "cpu_to_gpu" else (gpu_runs, runs)
    first.command(tmp_path / "mixed", STOP)
    second.command(tmp_path / "mixed")
    runs.command(tmp_path / "whole")
    ours, wanted = losses(tmp_path / "mixed"), losses(tmp_path / "whole")
    assert len(ours) == len(wanted) == 20
    assert max(map(relative, ours, wanted)) < 1e-4
