"""What ranks do in the tests of movement: two engines on two meshes of one job, weights from one to the other."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from scale_llm.config.errors import UserError
from scale_llm.engine.engine import Engine
from scale_llm.engine.movement import Movement
from scale_llm.losses.language_model import language_model_loss
from scale_llm.parallel.device import seed_everything, start
from scale_llm.parallel.mesh import build_mesh
from scale_llm.stages.context import mesh_sizes
from support.batches import GLOBAL_BATCH, VOCAB_SIZE, samples
from support.training import config, micro_batches
from support.whole_model import whole_model

Side = tuple[list[int], dict[str, Any]]
"""Ranks and overrides of one engine."""


def role(
    ranks: list[int], overrides: dict[str, Any], *, seed: int, trainable: bool, vocab_size: int = VOCAB_SIZE
) -> Engine | None:
    """An engine on these ranks of the job; None elsewhere. Every rank calls it."""
    cfg = config({**overrides, "train.seed": seed})
    device = start("cpu", threads=1)
    mesh = build_mesh(mesh_sizes(cfg.parallel, len(ranks)), device.backend, ranks)
    if mesh is None:
        return None
    seed_everything(seed, tp_rank=mesh.tp_rank, pp_rank=mesh.pp_rank, ep_rank=mesh.ep_rank, etp_rank=mesh.etp_rank)
    return Engine(cfg, mesh, device, vocab_size=vocab_size, trainable=trainable)


def train_step(engine: Engine | None, step: int) -> None:
    if engine is not None:
        engine.train_step(micro_batches(samples(step), engine.mesh, 1), _loss(engine), samples=GLOBAL_BATCH)


def loss(engine: Engine | None) -> float | None:
    """Over fixed tokens; of rank 0's knowledge: the lowest rank that has the engine tells all."""
    found = [None]
    if engine is not None:
        total, count = engine.evaluate(micro_batches(samples(7), engine.mesh, 1), _loss(engine))["lm loss"]
        found = [total / count]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, found[0])
    return next(value for value in every if value is not None)


def _loss(engine: Engine):
    return partial(language_model_loss, tp_group=engine.mesh.groups.tp, vocab_size=VOCAB_SIZE)


def moved(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each case: `model` overrides; `source` and `target` (ranks, overrides); `bucket_bytes`.

    The source is trained a step, its weights are moved to a target of another seed, and both again. Whether the whole
    models are the same, both losses, bytes: after each movement, on rank 0.
    """
    start("cpu", threads=1)
    return {name: _case(**case) for name, case in cases.items()}


def _case(source: Side, target: Side, model: dict[str, Any], bucket_bytes: int = 1 << 20) -> dict[str, Any]:
    first = role(source[0], {**model, **source[1]}, seed=1, trainable=True)
    second = role(target[0], {**model, **target[1]}, seed=2, trainable=False)
    world = dist.group.WORLD
    movement = Movement(first, second, world, world, bucket_bytes=bucket_bytes, checksum=True)
    rounds = []
    for step in range(2):
        train_step(first, step)
        result = movement.run()
        ours, theirs = _plain(first), _plain(second)
        rounds.append(
            {
                "unlike": None if ours is None else _unlike(ours, theirs),
                "loss": (loss(first), loss(second)),
                "sent": result.sent_bytes,
                "total": result.total_bytes,
            }
        )
    return {"rounds": rounds, "buckets": len(movement._buckets), "most": _most(movement), "model": ours}


def _plain(engine: Engine | None) -> dict[str, torch.Tensor] | None:
    if engine is not None:
        engine.gather_parameters()
    return whole_model(engine)


def _most(movement: Movement) -> int:
    """The most bytes that this rank has in buffers at once."""
    return max((sum(part.room for part in bucket) for bucket in movement._buckets), default=0)


def _unlike(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not the same bit for bit, but for rows of padding, which must be 0."""
    names = sorted(ours.keys() ^ theirs.keys())
    for name in ours.keys() & theirs.keys():
        mine, other = ours[name], theirs[name]
        if mine.shape != other.shape:
            rows = min(len(mine), len(other))
            padding = other[rows:]
            assert rows >= VOCAB_SIZE and ("embedding" in name or "output_layer" in name), name
            mine, other = mine[:rows], other[:rows]
            if padding.any():
                names.append(name)
        if mine.dtype != other.dtype:
            mine = mine.to(other.dtype)
        if not torch.equal(mine, other):
            names.append(name)
    return names


def into_a_trained_one(source: dict[str, Any], target: dict[str, Any]) -> float | None:
    """The largest difference of two models after one step of each from the weights that one got from the other."""
    start("cpu", threads=1)
    world = dist.group.WORLD
    first = role([0, 1], source, seed=1, trainable=True)
    second = role([2, 3], target, seed=2, trainable=True)
    train_step(second, 3)
    Movement(first, second, world, world, checksum=True).run()
    train_step(first, 0)
    train_step(second, 0)
    ours, theirs = _plain(first), _plain(second)
    if ours is None:
        return None
    return max(float((value.float() - theirs[name].float()).abs().max()) for name, value in ours.items())


def flipped() -> dict[str, Any]:
    """What is said after one bit of one replica of the target has changed, and after each of two more wrongs."""
    start("cpu", threads=1)
    world = dist.group.WORLD
    first, second = role([0, 1], {}, seed=1, trainable=False), role([2, 3], {}, seed=2, trainable=False)
    movement = Movement(first, second, world, world, checksum=True)
    movement.run()
    said = {"right": _said(movement.verify)}
    if dist.get_rank() == 3:
        bits = _weight(second, "mlp.linear_fc2.weight").view(-1)[77:78].view(torch.int32)
        bits ^= 1
    said["bit"] = _said(movement.verify)
    movement.run()
    if dist.get_rank() in (2, 3):  # both replicas alike, so that only the source tells
        rows = _weight(second, "self_attention.linear_qkv.weight")
        rows.copy_(rows.flip(0))  # the same elements at other places
    said["order"] = _said(movement.verify)
    return said


def _weight(engine: Engine, name: str) -> torch.Tensor:
    return next(p.detach() for key, p in engine.modules[0].named_parameters() if key.endswith(f"layers.1.{name}"))


def _said(action) -> str | None:
    try:
        action()
    except (RuntimeError, UserError) as error:
        return str(error)
    return None


def refused(pairs: dict[str, tuple[dict[str, Any], dict[str, Any], int]]) -> dict[str, str | None]:
    """What is said of each pair of models: overrides of the source and of the target, the target's vocabulary."""
    start("cpu", threads=1)
    world, said = dist.group.WORLD, {}
    for name, (source, target, vocab_size) in pairs.items():
        first = role([0], source, seed=1, trainable=False)
        second = role([1], target, seed=2, trainable=False, vocab_size=vocab_size)
        said[name] = _said(lambda first=first, second=second: Movement(first, second, world, world))
    return said
