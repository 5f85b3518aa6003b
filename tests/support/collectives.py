"""What ranks do in the tests of collectives through shared memory."""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from scale_llm.parallel import collectives
from scale_llm.parallel.device import start, stop
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
    """Every operation beside torch.distributed's, many times in a row; returns where they differ."""
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


def same_bits() -> list[float]:
    """A thousand sums with no pause between them; what every rank must have alike."""
    group = _joined()
    found = []
    for turn in range(1000):
        value = _drawn(5, torch.float32, 7 * turn + group.rank())
        collectives.all_reduce(value, group=group)
        found.append(value.sum().item())
    return found


def saved_for_backward() -> float:
    """A tensor summed in place after autograd has saved it: no complaint, as with torch.distributed."""
    group = _joined()
    x = torch.ones(3, requires_grad=True)
    saved = x.exp()
    collectives.all_reduce(saved, group=group)
    saved.sum().backward()
    return x.grad.sum().item()


def asynchronous() -> list[bool]:
    """Whether an asynchronous sum is done when it was waited for, within tensor parallelism and outside."""
    start("cpu", threads=1)
    found = []
    for sizes in (MeshSizes(tp=2), MeshSizes(dp=2)):
        mesh = build_mesh(sizes, "gloo")
        group = mesh.groups.tp if sizes.tp == 2 else mesh.groups.dp
        value = torch.ones(3)
        handle = collectives.all_reduce(value, group=group, async_op=True)
        handle.wait()
        found += [value.sum().item() == 6, handle.is_completed()]
        stop()
        if sizes.tp == 2:
            os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
            start("cpu", threads=1)
    return found


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
