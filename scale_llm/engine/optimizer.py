"""Optimizer and learning-rate schedule, from megatron-core."""

from collections.abc import Iterator
from contextlib import contextmanager

import megatron.core.optimizer
import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from scale_llm.config.batch import samples_after, total_samples
from scale_llm.config.logging import LoggingConfig
from scale_llm.config.optim import DecayStyle, OptimConfig, Optimizer
from scale_llm.config.parallel import ParallelConfig
from scale_llm.config.precision import PrecisionConfig
from scale_llm.config.train import TrainConfig
from scale_llm.engine.optimizer_kernels import chosen, counts_steps_by_group
from scale_llm.models.transformer_config import model_dtype
from scale_llm.parallel.mesh import Mesh
from scale_llm.parallel.ranges import timer


def build_optimizer(
    chunks, mesh: Mesh, optim: OptimConfig, precision: PrecisionConfig, parallel: ParallelConfig, logging: LoggingConfig
) -> MegatronOptimizer:
    """megatron-core's optimizer over the model chunks, its state allocated, torch's fused kernels where they apply."""
    config = OptimizerConfig(
        optimizer="sgd" if optim.optimizer is Optimizer.sgd else "adam",
        decoupled_weight_decay=optim.optimizer is not Optimizer.adam,
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        sgd_momentum=optim.sgd_momentum,
        clip_grad=optim.clip_grad,
        bf16=precision.bf16,
        fp16=precision.fp16,
        params_dtype=model_dtype(precision),
        initial_loss_scale=precision.initial_loss_scale,
        min_loss_scale=precision.min_loss_scale,
        loss_scale_window=precision.loss_scale_window,
        hysteresis=precision.hysteresis,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
        log_num_zeros_in_grad=logging.log_num_zeros_in_grad,
        timers=timer,
    )
    with _objects_within(mesh.host_group), chosen():
        optimizer = get_megatron_optimizer(config, chunks, use_gloo_process_groups=False, pg_collection=mesh.groups)
    first, *others = parts(optimizer)
    for part in (first, *others):
        if part.optimizer is not None:
            _use_fused_kernels(part.optimizer)
            _allocate_state(part.optimizer)
    for part in others:  # one loss is scaled, so there is one scale
        part.grad_scaler = getattr(first, "grad_scaler", None)
    return optimizer


class _Replaced:
    """An object seen with some attributes replaced."""

    def __init__(self, seen, **replacements):
        self.__dict__.update(replacements)
        self._seen = seen

    def __getattr__(self, name):
        return getattr(self._seen, name)


@contextmanager
def _objects_within(group: dist.ProcessGroup) -> Iterator[None]:
    """megatron-core compares parameter groups over all ranks of the job: ranks outside the mesh would have to join."""

    def all_gather_object(found: list, mine) -> None:
        dist.all_gather_object(found, mine, group=group)

    module = megatron.core.optimizer
    before = module.torch
    distributed = _Replaced(
        before.distributed, get_world_size=lambda: dist.get_world_size(group), all_gather_object=all_gather_object
    )
    module.torch = _Replaced(before, distributed=distributed)
    try:
        yield
    finally:
        module.torch = before


def parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers behind a chained one: dense parameters, then experts."""
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def is_distributed(optimizer: MegatronOptimizer) -> bool:
    return isinstance(optimizer, DistributedOptimizer)


def _use_fused_kernels(optimizer: torch.optim.Optimizer) -> None:
    """One pass over each parameter in place of one per arithmetic operation."""
    if isinstance(optimizer, torch.optim.Adam | torch.optim.SGD):
        optimizer.defaults["fused"] = True
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = True, False


def _allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """State of step 0, so that a checkpoint can be saved or loaded before the first step."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state[param]
            if state:
                continue
            if "momentum" in optimizer.defaults:  # SGD, torch's or a fused one
                state["momentum_buffer"] = torch.zeros_like(param)
            else:
                if isinstance(optimizer, torch.optim.Adam):
                    state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)


def set_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """How many steps it has done, wherever it counts them."""
    if counts_steps_by_group(optimizer):
        for group in optimizer.param_groups:
            group["step"] = steps
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(steps)


def build_scheduler(optimizer: MegatronOptimizer, optim: OptimConfig, train: TrainConfig) -> OptimizerParamScheduler:
    """Learning rate by consumed samples (Megatron counts schedules in samples, so that batch ramp-up is right)."""

    def in_samples(iterations: int | None, samples: int | None, default: int) -> int:
        if samples:
            return samples
        return samples_after(train, iterations) if iterations is not None else default

    decay = max(1, in_samples(optim.lr_decay_iters, optim.lr_decay_samples, total_samples(train)))
    if optim.lr_warmup_fraction is not None:
        warmup = int(optim.lr_warmup_fraction * decay)
    else:
        warmup = in_samples(optim.lr_warmup_iters or None, optim.lr_warmup_samples or None, 0)
    wsd = optim.lr_decay_style is DecayStyle.wsd
    wsd_decay = in_samples(optim.lr_wsd_decay_iters, optim.lr_wsd_decay_samples, max(1, decay // 10))
    return OptimizerParamScheduler(
        optimizer,
        init_lr=optim.lr_warmup_init,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=min(warmup, decay - 1),
        lr_decay_steps=decay,
        lr_decay_style=optim.lr_decay_style.value,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=decay,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=wsd_decay if wsd else None,
        lr_wsd_decay_style=optim.lr_wsd_decay_style.value if wsd else None,
    )
