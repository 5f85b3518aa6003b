"""What ranks do in the tests of the engine: train a tiny model on fixed random tokens.

Legend: b samples of a micro-batch, s sequence.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from scale_llm.config.model import Backend, Normalization, PositionEmbedding
from scale_llm.config.optim import DecayStyle, Optimizer
from scale_llm.config.peft import BaseQuantization, PeftMethod
from scale_llm.config.run import RunConfig
from scale_llm.config.train import CudaGraphImpl, RecomputeGranularity, RecomputeMethod
from scale_llm.engine.engine import Engine
from scale_llm.losses.language_model import language_model_loss
from scale_llm.parallel.device import Device, seed_everything
from scale_llm.parallel.mesh import Mesh, build_mesh
from scale_llm.stages.context import mesh_sizes
from support.batches import GLOBAL_BATCH, SEQ_LENGTH, VOCAB_SIZE, samples
from support.device import begin
from support.whole_model import whole_model

TINY = {
    "model.num_layers": 4, "model.hidden_size": 64, "model.ffn_hidden_size": 176, "model.num_attention_heads": 4,
    "model.num_query_groups": 2, "model.kv_channels": 16, "model.seq_length": SEQ_LENGTH, "model.init_method_std": 0.1,
    "train.train_iters": 20, "train.micro_batch_size": 1, "train.global_batch_size": GLOBAL_BATCH, "optim.lr": 1e-3,
}  # fmt: skip
_ENUMS = {
    "model.backend": Backend, "train.cuda_graph_impl": CudaGraphImpl,
    "model.normalization": Normalization, "model.position_embedding_type": PositionEmbedding,
    "optim.optimizer": Optimizer, "optim.lr_decay_style": DecayStyle,
    "peft.method": PeftMethod, "peft.quantize_base": BaseQuantization,
    "train.recompute_granularity": RecomputeGranularity, "train.recompute_method": RecomputeMethod,
}  # fmt: skip


def config(overrides: dict[str, Any]) -> RunConfig:
    """The tiny model's configuration with `group.field` values replaced."""
    cfg = RunConfig(run_dir="unused")
    for key, value in {**TINY, **overrides}.items():
        group, field = key.split(".")
        setattr(getattr(cfg, group), field, _ENUMS[key](value) if key in _ENUMS else value)
    return cfg


def join(cfg: RunConfig) -> tuple[Device, Mesh]:
    """This rank's device and mesh, its generators seeded."""
    device = begin(compile_ops=bool(cfg.model.compile_ops))
    mesh = build_mesh(mesh_sizes(cfg.parallel, dist.get_world_size()), device.backend)
    seed_everything(
        cfg.train.seed, tp_rank=mesh.tp_rank, pp_rank=mesh.pp_rank, ep_rank=mesh.ep_rank, etp_rank=mesh.etp_rank
    )
    return device, mesh


def micro_batches(batch: dict[str, torch.Tensor], mesh: Mesh, size: int) -> list[dict[str, torch.Tensor]]:
    """This data-parallel rank's part of a global batch, in micro-batches of `size` samples."""
    stride = size * mesh.sizes.dp
    starts = range(mesh.dp_rank * size, GLOBAL_BATCH, stride)
    return [{key: value[i : i + size] for key, value in batch.items()} for i in starts]


def make_engine(cfg: RunConfig, vocab_size: int = VOCAB_SIZE):
    """An engine on this rank and the loss of next-token prediction."""
    device, mesh = join(cfg)
    engine = Engine(cfg, mesh, device, vocab_size=vocab_size)
    return engine, partial(language_model_loss, tp_group=mesh.groups.tp, vocab_size=vocab_size)


def train(
    overrides: dict[str, Any], steps: int = 20, masks: str = "ones", weights: bool = False
) -> dict[str, list | dict]:
    """Every step's loss, gradient norm, learning rate, loss scale and whether it was skipped.

    weights: also the whole model's, before the first and after the last step (on rank 0).
    """
    cfg = config(overrides)
    engine, loss = make_engine(cfg)
    seen: dict[str, Any] = {"loss": [], "grad_norm": [], "learning_rate": [], "loss_scale": [], "skipped": []}
    if weights:
        seen["before"] = whole_model(engine)
    for step in range(steps):
        batches = micro_batches(samples(step, masks), engine.mesh, cfg.train.micro_batch_size)
        result = engine.train_step(batches, loss, samples=GLOBAL_BATCH)
        seen["loss"].append(result.metrics["lm loss"])
        for key in ("grad_norm", "learning_rate", "loss_scale", "skipped"):
            seen[key].append(getattr(result, key))
    if weights:
        seen["after"] = whole_model(engine)
    return seen


def initial_weights(overrides: dict[str, Any]) -> dict[str, torch.Tensor] | None:
    """The whole model before any training, on rank 0."""
    return whole_model(make_engine(config(overrides))[0])


def learning_rates(overrides: dict[str, Any], steps: int) -> list[float]:
    """The optimizer's rate before each update, the schedule stepped as the engine steps it."""
    cfg = config(overrides)
    engine, _ = make_engine(cfg)
    rates = []
    for _ in range(steps):
        rates.append(engine.optimizer.param_groups[0]["lr"])
        engine.scheduler.step(increment=cfg.train.global_batch_size)
    return rates


def megatron_batch_sizes(ramp: list[int], global_batch_size: int, steps: int) -> list[int]:
    """Global batch sizes by megatron-core's own calculator."""
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    start, increment, samples_of_ramp = ramp
    calculator = RampupBatchsizeNumMicroBatchesCalculator(
        global_batch_size=global_batch_size, micro_batch_size=4, data_parallel_size=1,
        decrease_batch_size_if_needed=False,
        rank=1, start_global_batch_size=start, batch_size_increment=increment, ramup_samples=samples_of_ramp,
    )  # fmt: skip
    consumed, sizes = 0, []
    for _ in range(steps):
        calculator.update(consumed, consistency_check=False, verbose=False)
        sizes.append(calculator.get_current_global_batch_size())
        consumed += sizes[-1]
    return sizes
