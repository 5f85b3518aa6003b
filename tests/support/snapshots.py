"""What ranks do in the tests of saves in the background: they overwrite everything at once."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from support.stage import checkpoint_tensors


def _start():
    from scale_llm.parallel.device import start

    start("cpu")
    torch.set_num_threads(2)  # the child must not wait for threads that did not come along
    torch.randn(1 << 20).exp_()
    return dist.group.WORLD


def _sharded(key: str, data: torch.Tensor):
    """A tensor of all ranks, one above the other."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return ShardedTensor.from_rank_offsets(key, data, (0, dist.get_rank(), dist.get_world_size()))


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Memory of every kind that a tensor may lie in; large enough for more than one page, and for threads."""
    rank = dist.get_rank()
    flat = torch.randn(600_000)
    mapped = np.memmap(directory / f"mapped_{rank}", dtype=np.float32, mode="w+", shape=(100_000,))
    mapped[:] = rank + 1
    twice = torch.randn(50, 1000)
    tensors = {
        "alone": torch.randn(300, 1001),
        "bf16": torch.randn(1000, 257).bfloat16(),
        "first of a buffer": flat[:200_000].view(200, 1000),
        "middle of a buffer": flat[200_001:400_001].view(200, 1000),
        "every other": torch.randn(400, 2000)[:, ::2],
        "turned": torch.randn(1000, 700).t(),
        "shared": torch.randn(100, 999).share_memory_(),
        "mapped file": torch.from_numpy(mapped).view(100, 1000),
        "under one name": twice,
        "under another": twice,
        "part of it": twice[10:20],
        "another part of it": twice[30:40],
        "small": torch.randn(3),
        "parameter": torch.nn.Parameter(torch.randn(40, 50)),
    }
    return tensors


def overwritten(directory: str, saves: int) -> list[str]:
    """Saves in the background, overwrites every tensor the moment that save returns, and compares what was written with
    copies made before. The structure changes before the last but one save."""
    from scale_llm.checkpoint.checkpointer import Checkpointer, per_rank_object

    root, group = Path(directory), _start()
    checkpointer = Checkpointer(root / "checkpoints", group, asynchronous=True)
    tensors, wrong = _tensors(root), []
    torch.manual_seed(dist.get_rank())
    for iteration in range(1, saves + 1):
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.copy_(torch.randn(tensor.shape))
        if iteration == saves - 1:
            tensors["one more"] = torch.randn(70, 900)
            tensors["small"] = torch.randn(5, 2)
        before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        told = {"iteration": iteration, "rank": dist.get_rank()}
        state = {name: _sharded(name, tensor) for name, tensor in tensors.items()}
        checkpointer.save(iteration, {**state, "plain": iteration, "told": per_rank_object("told", dict(told))})
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.fill_(float("nan"))
        told.clear()
        checkpointer.finish()
        wrong += _compared(root / "checkpoints" / f"iter_{iteration:07d}", before, iteration)
    return wrong


def _compared(path: Path, before: dict[str, torch.Tensor], iteration: int) -> list[str]:
    from scale_llm.checkpoint.only_data import load_data
    from scale_llm.checkpoint.whole import damage

    wrong = damage(path, dist.group.WORLD, hashing=True)
    found = checkpoint_tensors(str(path))
    rank, size = dist.get_rank(), dist.get_world_size()
    for name, tensor in before.items():
        mine = found[name].chunk(size)[rank]
        if mine.dtype != tensor.dtype or not torch.equal(mine, tensor):
            wrong.append(f"iteration {iteration}, rank {rank}: {name} is not what was saved")
    if load_data(path / "common.pt")["plain"] != iteration:
        wrong.append(f"iteration {iteration}: plain state")
    if set(before) != set(found):
        wrong.append(f"iteration {iteration}: {set(before) ^ set(found)}")
    dist.barrier()
    return wrong


def as_megatron_writes(directory: str) -> list[str]:
    """The same state by megatron-core's own writer and by ours, by a plan that serves again: what differs."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    from scale_llm.checkpoint.checkpointer import Checkpointer, per_rank_object
    from scale_llm.checkpoint.only_data import read_index

    root, group = Path(directory), _start()
    tensors = _tensors(root)

    def state():
        sharded = {name: _sharded(name, tensor) for name, tensor in tensors.items()}
        return {**sharded, "plain": [1, "x"], "told": per_rank_object("told", {"rank": dist.get_rank()})}

    checkpointer = Checkpointer(root / "ours", group)
    for iteration in (1, 2):
        checkpointer.save(iteration, state())
    theirs, ours = root / "theirs", root / "ours" / "iter_0000002"
    if dist.get_rank() == 0:
        theirs.mkdir()
    dist.barrier()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save(state(), str(theirs), strategy)
    wrong = []
    if dist.get_rank() == 0:
        indices = [read_index(path) for path in (ours, theirs)]
        for part in ("state_dict_metadata", "storage_data", "planner_data"):
            if getattr(indices[0], part) != getattr(indices[1], part):
                wrong.append(f".metadata differs in {part}")
        names = [{path.name for path in place.iterdir()} for place in (ours, theirs)]
        if names[0] - {"checksums.json"} != names[1]:
            wrong.append(f"files: {names}")
        first, second = (checkpoint_tensors(str(path)) for path in (ours, theirs))
        wrong += [name for name in first.keys() | second.keys() if not torch.equal(first[name], second[name])]
    dist.barrier()
    return wrong


def writer_killed(directory: str) -> list[str]:
    """The writer of one rank is killed during the second save: every rank is told, and the first save stays."""
    from scale_llm.checkpoint import checkpointer as checkpointers
    from scale_llm.config.errors import UserError

    root, group = Path(directory), _start()
    checkpointer = checkpointers.Checkpointer(root, group, asynchronous=True)
    tensor, write = torch.randn(100, 300), checkpointers.write_part

    def save(iteration: int) -> None:
        checkpointer.save(iteration, {"weight": _sharded("weight", tensor), "iteration": iteration})

    save(1)
    checkpointer.finish()
    dies = dist.get_rank() == dist.get_world_size() - 1
    if dies:
        checkpointers.write_part = lambda *arguments: time.sleep(60)
    save(2)
    checkpointer.poll()
    if dies:
        os.kill(checkpointer._pending.part._process.pid, signal.SIGKILL)
    try:
        checkpointer.finish()
    except UserError as error:
        checkpointers.write_part = write
        save(3)
        checkpointer.finish()
        return error.problems
    return []


def order_on_disk(directory: str) -> list[str]:
    """Every fsync and rename of a save, in order, by all of its processes."""
    from scale_llm.checkpoint.checkpointer import Checkpointer

    root, group = Path(directory), _start()
    log = root / "log"
    fsync, replace = os.fsync, os.replace

    def note(line: str) -> None:
        with open(log, "a") as file:
            file.write(line + "\n")

    def noted_fsync(handle):
        fsync(handle)
        note("fsync " + os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), root))

    def noted_replace(source, target):
        replace(source, target)
        note("rename " + os.path.relpath(target, root))

    def extra(path: Path) -> None:
        (path / "config.yaml").write_text("x")
        (path / "tokenizer").mkdir()
        (path / "tokenizer" / "tokenizer.json").write_text("y")

    os.fsync, os.replace = noted_fsync, noted_replace
    try:
        state = {"weight": _sharded("weight", torch.randn(100, 100)), "iteration": 1}
        Checkpointer(root / "checkpoints", group).save(1, state, extra)
    finally:
        os.fsync, os.replace = fsync, replace
    dist.barrier()
    return log.read_text().splitlines()
