"""What a run says when memory has run out."""

import errno

import pytest
import torch
from support.configs import config_of

from scale_llm.parallel.device import Device
from scale_llm.stages.out_of_memory import (
    Holding,
    Usage,
    by_kind,
    is_out_of_memory,
    sentence,
)

GIB = 2**30
GPU = Device(torch.device("cuda", 0), "nccl")


def parsed(text: str) -> float:
    """Bytes of such as 1.5 MiB."""
    number, unit = text.split()
    return float(number) * 1024 ** ("B", "KiB", "MiB", "GiB", "TiB").index(unit)


def test_a_run_says_who_holds_the_memory(runs, tmp_path):
    """The allocator's own error, in the second step: a person has to mend it, and gets numbers, names and keys. FP32
    Adam holds as much for gradients as for weights, and twice that for its moments."""
    words = ["train.train_iters=3", "train.global_batch_size=2", "train.micro_batch_size=2", "train.eval_iters=0"]
    ((told, log),) = runs.on_ranks("support.stage:run_without_memory", tmp_path / "run", *words)
    assert told[0] == "TryAgain", "one step is learnt, so a restart may get further"
    (said,) = told[1:]
    assert "rank 0 is out of memory: 1024.0 TiB more was asked for, " in said and "\n" not in said
    assert "is held: " in said and "train.micro_batch_size=1" in said and "train.recompute_granularity=full" in said
    listed = log.split("memory when it ran out:\n")[1].strip().splitlines()
    sizes = {text: parsed(size) for size, text in (line.strip().split("  ") for line in listed)}
    assert sizes["optimizer state"] == pytest.approx(2 * sizes["weights"], rel=0.1)
    assert sizes["gradients"] == sizes["weights"] > 0
    assert sizes["activations and other: logits of lacking float32 [64, 2, 512]"] == 4 * 64 * 2 * 512
    assert sizes["weights: 4 x decoder.layers.*.mlp.linear_fc1.weight float32 [352, 64]"] == 4 * 4 * 352 * 64
    assert "DefaultCPUAllocator" in log


def test_of_a_gpu():
    """Numbers of a GPU that this machine has not; what is asked for is in CUDA's own words."""
    holdings = [Holding(20 * GIB, "weights", "w bfloat16 [5]"), Holding(9 * GIB, "gradients", "g float32 [5]")]
    usage = Usage(total=80 * GIB, held=70 * GIB, spare=8 * GIB)
    assert by_kind(holdings, usage) == {
        "activations and other": 41 * GIB, "weights": 20 * GIB, "gradients": 9 * GIB, "optimizer state": 0,
    }  # fmt: skip
    cfg = config_of("parallel=tp2", "cluster.nproc_per_node=4", "train.micro_batch_size=4", "cluster.device=cuda")
    said = sentence(cfg, "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...", holdings, usage, GPU)
    assert said.startswith(
        "rank 0 is out of memory of its GPU: 2.00 GiB more was asked for, 70.0 GiB of 80.0 GiB is held: 41.0 GiB "
        "activations and other, 20.0 GiB weights, 9.0 GiB gradients; the largest: w bfloat16 [5] (20.0 GiB), "
    )
    for key in ("train.micro_batch_size=2", "parallel.sequence_parallel=true", "use_distributed_optimizer=true",
                "parallel.tensor_model_parallel_size=4", "expandable_segments:True"):  # fmt: skip
        assert key in said


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("NCCL error: Failed to CUDA calloc: Cuda failure 2 'out of memory'"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Connection closed by peer [127.0.0.1]:5"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
    ],
)
def test_what_is_an_error_of_memory(error, is_one):
    assert is_out_of_memory(error) is is_one
