"""The accelerator of a rank and the process group of the whole job."""

import datetime
import os
import random
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from scale_llm.config.model import Backend
from scale_llm.config.precision import Fp8Recipe
from scale_llm.parallel.collectives import forget_all
from scale_llm.parallel.fused import use_compiler
from scale_llm.parallel.memory import keep_freed_memory


@dataclass(frozen=True, slots=True)
class Device:
    """What one rank computes on.

    device: `cpu`, or `cuda:<local rank>`.
    backend: `gloo` or `nccl`, the library of its collectives.
    """

    device: torch.device
    backend: str

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Waits until the device has finished what it was given."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)


def start(
    kind: str, timeout_minutes: int = 10, threads: int | None = None, *, compile_ops: bool = False,
    any_size: bool = False, backend: Backend = Backend.auto, fp8_recipe: Fp8Recipe | None = None,
) -> Device:  # fmt: skip
    """Joins the job as the rank that the environment names (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).

    kind: `cpu` or `cuda`. On a CPU megatron-core is adapted first, so call this before importing it.
    threads: threads of one CPU operation; None leaves torch's choice. compile_ops, any_size: see
    `fused.use_compiler`. backend, fp8_recipe: layers and FP8 of the run's models, see `gpu.prepare`.

    Raises:
        UserError: a GPU has not what its layers or FP8 need.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda":
        device = Device(torch.device("cuda", local_rank), "nccl")
        torch.cuda.set_device(device.device)
        from scale_llm.parallel import gpu

        gpu.prepare(backend, fp8_recipe)
        gpu.give_kernels(device.device)
    else:
        from scale_llm.parallel import cpu

        cpu.adapt()
        keep_freed_memory()
        device = Device(torch.device("cpu"), "gloo")
        if threads is not None:
            torch.set_num_threads(threads)
    if not dist.is_initialized():
        # No device_id: with one, torch has ranks outside a new gloo group wait in NCCL for those inside
        dist.init_process_group(device.backend, timeout=datetime.timedelta(minutes=timeout_minutes))
    _make_memory_buffer()
    if device.is_cuda:
        _use_one_norm()
    use_compiler(compile_ops, any_size=any_size)
    return device


def start_alone() -> Device:
    """Joins a job of this process alone, on its CPU, unless it is in one already: for tools."""
    if not dist.is_initialized():
        from scale_llm.parallel import cpu

        cpu.adapt()  # before anything of megatron-core is imported
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return start("cpu")


def _make_memory_buffer() -> None:
    """megatron-core's scratch memory for gathered sequences: all of `parallel_state` that is ever initialised."""
    from megatron.core import parallel_state

    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()


def _use_one_norm() -> None:
    """Without Transformer Engine and Apex megatron-core waits for the GPU once for every gradient of the norm."""
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _norm_of_all


def _norm_of_all(chunk_size, overflow_buffer, tensor_lists, per_tensor=False):
    """(Euclidean norm [1] of all tensors together, None)."""
    norms = torch.stack(torch._foreach_norm(tensor_lists[0]))
    return torch.linalg.vector_norm(norms).reshape(1), None


def matmul_rate(device: Device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product on this rank, as measured: what model-FLOP utilisation is a share of."""
    # On a GPU several at a time: one of them takes no longer than its launch and the wait for it
    size, products = (8192, 10) if device.is_cuda else (2048, 1)
    generator = torch.Generator(device.device).manual_seed(1)  # of its own: those of the run stay where they are
    a = torch.randn(size, size, dtype=dtype, device=device.device, generator=generator)
    best = float("inf")
    for _ in range(5):
        device.synchronize()
        began = time.perf_counter()
        for _ in range(products):
            torch.mm(a, a)
        device.synchronize()
        best = min(best, time.perf_counter() - began)
    return products * 2 * size**3 / best


def stop() -> None:
    """Leaves the job."""
    if dist.is_initialized():
        forget_all()
        dist.destroy_process_group()


def seed_everything(seed: int, *, tp_rank: int, pp_rank: int, ep_rank: int, etp_rank: int) -> None:
    """Seeds every generator of this rank: dropout differs between tensor shards and pipeline stages where it must."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    stage_seed = seed + 100 * pp_rank
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(
        stage_seed, tp_rank=tp_rank, ep_rank=ep_rank, etp_rank=etp_rank, force_reset_rng=True
    )
