"""The plan of a run: layout, batch arithmetic, parameters, operations, bytes. Pure arithmetic on a valid config."""

from dataclasses import dataclass

from scale_llm.config.activations import activation_bytes
from scale_llm.config.batch import global_batch_size, total_iterations, total_samples
from scale_llm.config.optim import Optimizer
from scale_llm.config.parameters import (
    ParameterCounts,
    RankParameters,
    count_parameters,
    flops_per_token,
    padded_vocab_size,
    parameters_of_stage,
)
from scale_llm.config.peft import PeftMethod
from scale_llm.config.policy import PolicyStageConfig
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import UntrainedStageConfig
from scale_llm.config.train import CudaGraphImpl
from scale_llm.config.validate_layout import world_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Sizes of the axes."""

    world: int
    dp: int
    tp: int
    pp: int
    vpp: int
    cp: int
    ep: int
    etp: int

    @property
    def expert_dp(self) -> int:
        """Replicas of an expert."""
        return self.world // (self.ep * self.etp * self.pp)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batches:
    """What a step takes, and how many steps there are."""

    micro_batches: int
    """Forward passes of one rank in one step, after ramp-up."""
    first_micro_batches: int
    """The same in the first step."""
    samples_per_step: int
    tokens_per_step: int
    iterations: int | None
    """None, and so the totals: epochs of data that have not been read."""
    total_samples: int | None
    total_tokens: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one rank of the fullest pipeline stage. Gradients and optimizer state of adapters are left out: they are
    a hundredth of the weights or less."""

    weights: int
    gradients: int
    optimizer: int
    activations: int | None = None
    """An estimate; None where nothing is trained, or by several models."""

    @property
    def total(self) -> int:
        """Without activations."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        return self.total + (self.activations or 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All that --check prints."""

    layout: Layout
    batches: Batches | None
    """None for an evaluation."""
    parameters: ParameterCounts
    padded_vocab_size: int
    per_rank: RankParameters
    """On the fullest pipeline stage."""
    flops_per_token: float
    checkpoint_bytes: int
    memory: Memory


def make_plan(cfg: RunConfig) -> Plan:
    """The plan of a resolved and valid configuration."""
    layout = make_layout(cfg)
    stages = [parameters_of_stage(cfg.model, cfg.parallel, stage) for stage in range(layout.pp)]
    fullest = max(stages, key=lambda stage: stage.total)
    parameters = count_parameters(cfg.model, layout.tp)
    batches = None if isinstance(cfg.stage, UntrainedStageConfig) else make_batches(cfg, layout.dp)
    memories = [estimate_memory(cfg, layout, rank, pp_rank, batches) for pp_rank, rank in enumerate(stages)]
    return Plan(
        layout=layout,
        batches=batches,
        parameters=parameters,
        padded_vocab_size=padded_vocab_size(cfg.model, layout.tp),
        per_rank=fullest,
        flops_per_token=flops_per_token(cfg.model, layout.tp),
        checkpoint_bytes=parameters.total * (_weight_bytes(cfg) + _optimizer_bytes(cfg)),
        memory=max(memories, key=lambda memory: memory.peak),
    )


def make_layout(cfg: RunConfig) -> Layout:
    """Sizes of all axes; data parallel is what remains."""
    parallel, world = cfg.parallel, world_size(cfg)
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    return Layout(
        world=world,
        dp=world // (tp * pp * cp),
        tp=tp,
        pp=pp,
        vpp=parallel.virtual_pipeline_model_parallel_size or 1,
        cp=cp,
        ep=parallel.expert_model_parallel_size,
        etp=parallel.expert_tensor_parallel_size or tp,
    )


def make_batches(cfg: RunConfig, dp: int) -> Batches:
    """Batch arithmetic of a training run."""
    train, at_once = cfg.train, cfg.train.micro_batch_size * dp
    unknown = train.train_iters is None and train.train_samples is None
    samples = None if unknown else total_samples(train)
    return Batches(
        micro_batches=train.global_batch_size // at_once,
        first_micro_batches=global_batch_size(train, 0) // at_once,
        samples_per_step=train.global_batch_size,
        tokens_per_step=train.global_batch_size * cfg.model.seq_length,
        iterations=None if unknown else total_iterations(train),
        total_samples=samples,
        total_tokens=None if samples is None else samples * cfg.model.seq_length,
    )


def _weight_bytes(cfg: RunConfig) -> int:
    return 2 if cfg.precision.bf16 or cfg.precision.fp16 else 4


def _optimizer_bytes(cfg: RunConfig) -> int:
    """Per parameter: FP32 moments (Adam two, SGD one with momentum), and FP32 main weights under a 16-bit model."""
    if cfg.optim.optimizer is Optimizer.sgd:
        moments = 1 if cfg.optim.sgd_momentum else 0
    else:
        moments = 2
    return 4 * moments + (4 if _weight_bytes(cfg) == 2 else 0)


def estimate_memory(
    cfg: RunConfig, layout: Layout, rank: RankParameters, pp_rank: int, batches: Batches | None
) -> Memory:
    """Of one rank of a pipeline stage; the distributed optimizer cuts its state over replicas. batches: of a run that
    trains."""
    activations, weights = None, rank.total * _weight_bytes(cfg)
    if batches is not None and not isinstance(cfg.stage, PolicyStageConfig):
        activations = activation_bytes(
            cfg, number_bytes=_weight_bytes(cfg), pp_rank=pp_rank, micro_batches=batches.micro_batches
        )
    if batches is None or cfg.peft.method is not PeftMethod.none:
        return Memory(weights=weights, gradients=0, optimizer=0, activations=activations)
    in_fp32 = cfg.precision.accumulate_allreduce_grads_in_fp32 or _weight_bytes(cfg) == 4
    distributed = cfg.parallel.use_distributed_optimizer
    dense_share, expert_share = (layout.dp * layout.cp, layout.expert_dp) if distributed else (1, 1)
    # Graphs of layers have a place for the gradients of their weights, beside those that are summed
    graphs = weights if cfg.train.cuda_graph_impl is CudaGraphImpl.local else 0
    owned = -(-rank.dense // dense_share) + -(-rank.experts // expert_share)
    return Memory(
        weights=weights,
        gradients=rank.total * (4 if in_fp32 else 2) + graphs,
        optimizer=owned * _optimizer_bytes(cfg),
        activations=activations,
    )
