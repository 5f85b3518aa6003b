"""What ranks do in the tests of collectives through shared memory."""

import gc
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scale_llm.parallel import collectives, shared_memory
from scale_llm.parallel.device import start
from scale_llm.parallel.mesh import MeshSizes, build_mesh
from scale_llm.parallel.shared_memory import SLOT_BYTES

SLOT = SLOT_BYTES // 4
"""FP32 elements of a slot."""


def _joined(timeout_minutes: float = 5):
    start("cpu", threads=1)
    mesh = build_mesh(MeshSizes(tp=dist.get_world_size()), "gloo", timeout_minutes=timeout_minutes)
    assert mesh.groups.tp in collectives._channels, "ranks of one machine share memory"
    return mesh.groups.tp


def _drawn(shape, dtype, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + rank)
    values = torch.randn(shape, generator=generator) * 100
    return values.to(dtype)


def as_torch(counts: list[int]) -> list[str]:
    """Every operation beside torch.distributed's; returns where they differ."""
    group = _joined()
    rank, size = group.rank(), group.size()
    wrong = []

    def compare(what, ours, theirs, exact):
        same = (
            torch.equal(ours, theirs) if exact else torch.allclose(ours.double(), theirs.double(), rtol=1e-6, atol=1e-4)
        )
        if not same:
            wrong.append(f"{what}: {(ours.double() - theirs.double()).abs().max()}")

    for count in counts:
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64):
            mine = _drawn(count, dtype, rank)
            what = f"{dtype} {count}"
            for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN):
                ours, theirs = mine.clone(), mine.clone()
                collectives.all_reduce(ours, op=op, group=group)
                dist.all_reduce(theirs, op=op, group=group)
                # halves of more than two ranks are rounded once here, by gloo with every addend
                rounded = dtype == torch.bfloat16 and size > 2 and op == dist.ReduceOp.SUM
                exact = not (op == dist.ReduceOp.SUM and dtype.is_floating_point and size > 2)
                if not rounded:
                    compare(f"all_reduce {op} {what}", ours, theirs, exact)
                else:
                    every = sum(_drawn(count, dtype, other).float() for other in range(size)).to(dtype)
                    compare(f"all_reduce {op} {what}", ours, every, True)
            ours, theirs = (torch.empty(size * count, dtype=dtype) for _ in range(2))
            collectives.all_gather_into_tensor(ours, mine, group=group)
            collectives.torch_all_gather(theirs, mine, group=group)
            compare(f"all_gather {what}", ours, theirs, True)
            if dtype in (torch.float32, torch.int64):
                whole = _drawn(size * count, dtype, rank)
                ours, theirs = (torch.empty(count, dtype=dtype) for _ in range(2))
                collectives.reduce_scatter_tensor(ours, whole, group=group)
                collectives.torch_reduce_scatter(theirs, whole, group=group)
                compare(f"reduce_scatter {what}", ours, theirs, size == 2 or dtype == torch.int64)
    turned = _drawn((6, 4), torch.float32, rank).t()
    theirs = turned.contiguous()
    dist.all_reduce(theirs, group=group)
    collectives.all_reduce(turned, group=group)
    compare("a transposed tensor", turned, theirs, size == 2)
    return wrong


def mixed(turns: int) -> dict:
    """Operations of all kinds and sizes one after another, nothing between them but, now and then, a rank that is late:
    what they gave is compared with sums over all ranks' tensors when all is done."""
    group = _joined()
    rank, size = group.rank(), group.size()
    plan, own = random.Random(5), random.Random(rank)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32)
    kinds = ("all_reduce", "all_gather", "reduce_scatter")
    turns_planned = [
        (turn, plan.choice(kinds), plan.choice(dtypes), plan.choice([0, 1, 5, 700, 40_000, SLOT // 2, SLOT + 3]))
        for turn in range(turns)
    ]
    outputs = []
    for turn, kind, dtype, count in turns_planned:
        if own.random() < 0.05:
            time.sleep(own.random() * 0.02)
        outputs.append(
            _done(kind, _drawn(count * (size if kind == "reduce_scatter" else 1), dtype, rank + 7 * turn), group)
        )
    wrong = []
    for (turn, kind, dtype, count), output in zip(turns_planned, outputs, strict=True):
        every = [_drawn(count * (size if kind == "reduce_scatter" else 1), dtype, i + 7 * turn) for i in range(size)]
        if kind == "all_gather":
            wanted = torch.cat(every)
        else:
            half = dtype in (torch.bfloat16, torch.float16)
            wanted = sum((each.float() for each in every[1:]), every[0].float()).to(dtype) if half else sum(every)
            wanted = wanted.view(size, count)[rank] if kind == "reduce_scatter" else wanted
        if not torch.equal(output, wanted):
            wrong.append(f"{turn} {kind} {dtype} {count}")
    channel = collectives._channels[group]
    return {"wrong": wrong, "exchanges": channel._count}


def _done(kind: str, mine: torch.Tensor, group) -> torch.Tensor:
    size = group.size()
    if kind == "all_reduce":
        collectives.all_reduce(mine, group=group)
        return mine
    if kind == "all_gather":
        output = mine.new_empty(size * mine.numel())
        collectives.all_gather_into_tensor(output, mine, group=group)
        return output
    output = mine.new_empty(mine.numel() // size)
    collectives.reduce_scatter_tensor(output, mine, group=group)
    return output


def mismatched() -> list[str]:
    """What is said of tensors that do not go together, before anything is exchanged."""
    group = _joined()
    said = []
    for output, tensor in ((torch.empty(4), torch.empty(3)), (torch.empty(4), torch.empty(2, dtype=torch.bfloat16))):
        try:
            collectives.all_gather_into_tensor(output, tensor, group=group)
        except ValueError as error:
            said.append(str(error))
    return said


def handles_left() -> list[int]:
    """Open files after a job has ended, for each of three jobs' meshes."""
    start("cpu", threads=1)
    found = []
    for _ in range(3):
        build_mesh(MeshSizes(tp=2), "gloo")
        collectives.forget_all()
        gc.collect()
        found.append(sum("pidfd" in os.readlink(f"/proc/self/fd/{name}") for name in _open_files()))
    return found


def _open_files() -> list[str]:
    return [name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]


def where_there_is_none() -> float:
    """A sum where the kernel does not let ranks share: gloo's."""
    shared_memory.machine = lambda: "riscv64"
    start("cpu", threads=1)
    mesh = build_mesh(MeshSizes(tp=2), "gloo")
    assert mesh is not None and mesh.groups.tp not in collectives._channels
    value = torch.ones(3)
    collectives.all_reduce(value, group=mesh.groups.tp)
    return value.sum().item()


def saved_for_backward() -> float:
    """A tensor summed in place after autograd has saved it: no complaint, as with torch.distributed."""
    group = _joined()
    x = torch.ones(3, requires_grad=True)
    saved = x.exp()
    collectives.all_reduce(saved, group=group)
    saved.sum().backward()
    return x.grad.sum().item()


def of_tensor_parallelism() -> dict[str, Any]:
    """What megatron-core's layers start, as it is before they wait for it."""
    start("cpu", threads=1)
    from megatron.core.tensor_parallel import layers

    group = build_mesh(MeshSizes(tp=2), "gloo").groups.tp
    channel = collectives._channels[group]
    before, mine = channel._count, float(group.rank() + 1)
    total, whole, share = torch.full((3,), mine), torch.zeros(4), torch.zeros(2)
    handles = [
        layers.torch.distributed.all_reduce(total, group=group, async_op=True),
        layers.dist_all_gather_func(whole, torch.full((2,), mine), group=group, async_op=True),
        layers.dist_reduce_scatter_func(share, torch.arange(4.0) * mine, group=group, async_op=True),
    ]
    return {"total": total.tolist(), "weights": whole.tolist(), "share": share.tolist(),
            "exchanges": channel._count - before, "waited": all(handle.wait() for handle in handles),
            "awaited": layers.torch.distributed.all_reduce(total, group=group)}  # fmt: skip


def of_data_parallelism() -> dict[str, Any]:
    """megatron-core's overlapped operations on buckets, as they are before they are waited for."""
    start("cpu", threads=1)
    from megatron.core.distributed import param_and_grad_buffer as buffers

    group = build_mesh(MeshSizes(dp=2), "gloo").groups.dp
    channel = collectives._channels[group]
    before, mine = channel._count, float(group.rank() + 1)
    weights, share, total = torch.zeros(4), torch.zeros(2), torch.full((3,), mine)
    with buffers._coalescing_manager(group, async_ops=True) as handle:
        buffers.dist_all_gather_func(weights, torch.full((2,), mine), group=group, async_op=True)
        buffers.dist_reduce_scatter_func(share, torch.arange(4.0) * mine, group=group, async_op=True)
        buffers.torch.distributed.all_reduce(total, group=group, async_op=True)
    with buffers._coalescing_manager(group, async_ops=False) as awaited:
        buffers.torch.distributed.all_reduce(total, group=group)
    return {"weights": weights.tolist(), "share": share.tolist(), "total": total.tolist(),
            "exchanges": channel._count - before, "waited": handle.wait(), "awaited": awaited}  # fmt: skip


def without_a_peer(words: str, *, ends: bool) -> None:
    """The last rank ends, or stays away; what the first one meets goes to the file `words`."""
    group = _joined(timeout_minutes=0.05)
    if group.rank() == group.size() - 1:
        if ends:
            os._exit(0)
        time.sleep(5)
        return
    began = time.monotonic()
    try:
        collectives.all_reduce(torch.ones(1), group=group)
    except (RuntimeError, TimeoutError) as error:
        if group.rank() == 0:
            Path(words).write_text(f"{type(error).__name__} after {time.monotonic() - began:.0f} s: {error}")
