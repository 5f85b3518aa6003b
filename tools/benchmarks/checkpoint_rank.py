"""A rank of a job of the benchmark of checkpoints. For every line that it reads rank 0 prints {name: value}.

python -m benchmarks.checkpoint_rank '{"directory": ..., "contestants": ["sync", "ours"], "layers": 8, "tp": 1}'

Settings: also `distributed`, the distributed optimizer; `size` of `common.SIZES`, `device`, `longest`.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.common import quick_weights, set_optimizer, shape, threads

BATCH, SEQUENCE, HIDDEN, FFN, VOCABULARY = 2, 256, 1024, 2816, 8192
UNDISTURBED = 3
"""Steps of a round without a save."""
BACKGROUND = ("ours", "megatron", "torch")
LONGEST = 60
"""Steps that a background save may take."""


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    directory = Path(settings["directory"])
    step, contestants = build(directory, settings)
    import torch.distributed as dist

    from scale_llm.parallel.device import stop

    names = settings["contestants"]
    while told():
        values = {}
        for name in names:
            quiet(directory)
            undisturbed = timed_steps(step) if name in BACKGROUND else 0.0
            values |= contestants[name](undisturbed) | ({"undisturbed": undisturbed} if name in BACKGROUND else {})
        names = names[1:] + names[:1]
        if dist.get_rank() == 0:
            print(json.dumps(values), file=answers, flush=True)
    stop()


def told() -> bool:
    """Whether there is another turn, which rank 0 reads; the others wait for what it says."""
    import torch.distributed as dist

    lines = [sys.stdin.readline() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(lines)
    return bool(lines[0])


def quiet(directory: Path) -> None:
    """Nothing of an earlier contestant is left to write or remove."""
    import torch.distributed as dist

    dist.barrier()
    if dist.get_rank() == 0:
        for path in directory.iterdir():
            shutil.rmtree(path)
        os.sync()
    dist.barrier()


def slowest(seconds: float) -> float:
    import torch
    import torch.distributed as dist

    if dist.get_world_size() == 1:
        return seconds
    value = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()


def timed_steps(step: Callable[[], Any]) -> float:
    """Median seconds of an undisturbed step."""
    taken = []
    for _ in range(UNDISTURBED):
        began = time.perf_counter()
        step()
        taken.append(time.perf_counter() - began)
    return slowest(sorted(taken)[len(taken) // 2])


def in_background(
    name: str, step: Callable[[], Any], save: Callable[[], None], done: Callable[[], bool], longest: int = LONGEST
):  # fmt: skip
    """A contestant: saves, then trains until `done`, which is asked after every step, at most `longest` of them."""

    def run(undisturbed: float) -> dict[str, float]:
        import torch.distributed as dist

        dist.barrier()
        began = time.perf_counter()
        save()
        stall, steps = time.perf_counter() - began, 0
        taken = []
        while True:
            before = time.perf_counter()
            step()
            after = time.perf_counter()
            is_done = done()
            taken.append(after - before)
            stall += time.perf_counter() - after
            steps += 1
            if is_done:
                break
            assert steps < longest, f"{name} does not end"
        whole = time.perf_counter() - began
        values = {"stall": stall, "cost": whole - steps * undisturbed, "step": sum(taken) / len(taken)}
        found = {f"{name} {key}": slowest(value) for key, value in values.items()}
        return {**found, f"{name} save": slowest(whole)}

    return run


def build(directory: Path, settings: dict[str, Any]):
    """(a training step, contestants by name)."""
    from scale_llm.config.run import RunConfig
    from scale_llm.parallel import device as devices

    device = devices.start(settings.get("device", "cpu"), threads=threads(), compile_ops=False)
    import torch
    import torch.distributed as dist

    from scale_llm.checkpoint.checkpointer import Checkpointer
    from scale_llm.engine.engine import Engine
    from scale_llm.losses.language_model import language_model_loss
    from scale_llm.parallel.mesh import MeshSizes, build_mesh
    from scale_llm.stages.progress import Progress
    from scale_llm.stages.run_state import gradients, state_to_save

    model, tp = shape(settings.get("size", "small")), settings.get("tp", 1)
    model.seq_length = SEQUENCE
    if "size" not in settings:
        model.num_layers, model.hidden_size, model.ffn_hidden_size = settings["layers"], HIDDEN, FFN
        model.kv_channels, model.vocab_size = HIDDEN // model.num_attention_heads, VOCABULARY
    vocabulary = model.vocab_size
    cfg = RunConfig(run_dir="unused", model=model)
    set_optimizer(cfg)
    cfg.precision.bf16, cfg.train.train_iters = True, 10**6
    cfg.train.micro_batch_size, cfg.train.global_batch_size = BATCH, BATCH * dist.get_world_size() // tp
    cfg.parallel.tensor_model_parallel_size = tp
    cfg.parallel.use_distributed_optimizer = settings.get("distributed", False)
    mesh = build_mesh(MeshSizes(tp=tp, dp=dist.get_world_size() // tp), device.backend)
    devices.seed_everything(1234, tp_rank=mesh.tp_rank, pp_rank=0, ep_rank=0, etp_rank=mesh.tp_rank)
    with quick_weights():
        engine = Engine(cfg, mesh, device, vocab_size=vocabulary)
    text = torch.randint(0, vocabulary, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(mesh.dp_rank))
    batch = {
        "tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous(),
        "loss_mask": torch.ones(BATCH, SEQUENCE),
        "position_ids": torch.arange(SEQUENCE).expand(BATCH, -1).contiguous(),
    }  # fmt: skip

    def loss(output, batch):
        return language_model_loss(output, batch, mesh.groups.tp, vocabulary)

    def step() -> None:
        engine.train_step([batch], loss, samples=cfg.train.global_batch_size)
        device.synchronize()

    stage = SimpleNamespace(engines={"": engine}, state=dict)

    def state() -> dict[str, Any]:
        return state_to_save(stage, Progress(), mesh.host_group)

    ours = {kind: Checkpointer(directory / "ours", mesh.host_group, asynchronous=kind == "async")
            for kind in ("sync", "async")}  # fmt: skip
    mine = 0

    def sync(_: float) -> dict[str, float]:
        nonlocal mine
        dist.barrier()
        began = time.perf_counter()
        ours["sync"].save(1, state())
        taken = slowest(time.perf_counter() - began)
        mine = sum(path.stat().st_size for path in directory.glob(f"ours/iter_*/__{dist.get_rank()}_*.distcp"))
        total = torch.tensor([mine])
        dist.all_reduce(total, group=mesh.host_group)
        return {"sync": taken, "bytes": float(total.item())}

    memory: list[memoryview] = []

    def plain(name: str, *, begin_early: bool) -> Callable[[float], dict[str, float]]:
        def run(_: float) -> dict[str, float]:
            (directory / "plain").mkdir(exist_ok=True)
            if not memory:  # real memory: zeros would come out of a cache
                memory.append(memoryview(torch.randint(256, (mine,), dtype=torch.uint8).numpy()))
            dist.barrier()
            began = time.perf_counter()
            write_plain(directory / "plain" / str(dist.get_rank()), memory[0], begin_early=begin_early)
            return {name: slowest(time.perf_counter() - began)}

        return run

    def poll() -> bool:
        ours["async"].poll()
        return ours["async"]._pending is None

    def save() -> None:
        ours["async"].save(1, state(), unneeded=gradients(stage))

    background = in_background("ours", step, save, poll, settings.get("longest", LONGEST))
    contestants = {
        "sync": sync, "ours": background, "plain": plain("plain", begin_early=False),
        "behind": plain("behind", begin_early=True),
    }  # fmt: skip
    for name, peer in {"megatron": _megatron, "torch": _torch}.items():
        if name in settings["contestants"]:
            contestants[name] = in_background(name, step, *peer(directory / name, state))
    return step, contestants


def write_plain(path: Path, data: memoryview, *, begin_early: bool) -> None:
    """In pieces, and on the disk when it returns; nothing where there is nothing. begin_early: the kernel is asked to
    write to the disk from the start, as our writer asks it."""
    from scale_llm.checkpoint.work import WriteBehind

    if len(data):
        behind = WriteBehind()
        with open(path, "wb", buffering=0) as file:
            for first in range(0, len(data), 8 << 20):
                file.write(data[first : first + (8 << 20)])
                if begin_early:
                    behind.flush(path)
            os.fsync(file.fileno())
        behind.close()


def _megatron(directory: Path, state: Callable[[], dict[str, Any]]):
    """megatron-core's own asynchronous save, as Megatron-LM calls it, its plans cached."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    queue = AsyncCallsQueue()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1, cached_metadata=True)
    count = 0

    def save() -> None:
        nonlocal count
        if dist.get_rank() == 0:
            directory.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        # As Megatron-LM: ranks compare what they hold the first time only
        request = dist_checkpointing.save(
            state(), str(directory), strategy, async_sharded_save=True, validate_access_integrity=count == 0
        )
        queue.schedule_async_request(request)
        count += 1

    def done() -> bool:
        queue.maybe_finalize_async_calls(blocking=False)
        return not queue.get_num_unfinalized_calls()

    return save, done


def _torch(directory: Path, state: Callable[[], dict[str, Any]]):
    """torch.distributed.checkpoint.async_save of the tensors that this rank writes, as tensors of its own."""
    import torch
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
    from torch.distributed.checkpoint import async_save
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    group = dist.new_group(backend="gloo")  # its thread exchanges plans while training uses the others
    futures: list[Any] = []

    def save() -> None:
        whole = state()
        apply_factories(whole)
        leaves = [leaf for leaf in nested_values(whole) if isinstance(leaf, ShardedTensor)]
        tensors = {
            f"{dist.get_rank()}.{leaf.key}.{leaf.global_offset}": leaf.data.detach()
            for leaf in leaves
            if is_main_replica(leaf.replica_id)
        }
        futures.append(async_save(tensors, storage_writer=FileSystemWriter(directory), process_group=group))

    def done() -> bool:
        flag = torch.tensor([int(futures[-1].done())])
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        if flag.item():
            with suppress(IndexError):
                futures.pop().result()
        return bool(flag.item())

    return save, done


if __name__ == "__main__":
    main()
