"""Whether a run fits into memory, said before it starts, and what to do where it does not. Pure."""

from scale_llm.config.activations import micro_batch_tokens
from scale_llm.config.cluster import Device, Launcher
from scale_llm.config.machine import Machine
from scale_llm.config.optim import Optimizer
from scale_llm.config.peft import PeftMethod
from scale_llm.config.plan import Memory, make_layout, make_plan
from scale_llm.config.policy import PolicyStageConfig
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import Batching, SequenceStageConfig, UntrainedStageConfig
from scale_llm.config.train import CudaGraphImpl, RecomputeGranularity


def memory_problems(cfg: RunConfig, machine: Machine) -> list[str]:
    """What no GPU of this machine has room for, activations apart. Of a valid configuration."""
    limit = machine.gpu_memory_bytes
    if limit is None or cfg.cluster.device is not Device.cuda or isinstance(cfg.stage, PolicyStageConfig):
        return []
    memory = make_plan(cfg).memory
    if memory.total <= limit:
        return []
    return [
        f"{_size(cfg)}: {_states(memory)} of a rank take {human(memory.total)}, a GPU here has {human(limit)}; "
        f"{remedies(cfg, activations=False)}"
    ]


def memory_warnings(cfg: RunConfig, machine: Machine) -> list[str]:
    """Where a run may not fit, by an estimate of its activations; on CPU ranks, into the memory of the machine."""
    if isinstance(cfg.stage, PolicyStageConfig):
        return []
    memory = make_plan(cfg).memory
    if cfg.cluster.device is Device.cuda:
        ranks, limit, whose = 1, machine.gpu_memory_bytes, "a GPU here"
    else:
        ranks, limit, whose = cfg.cluster.nproc_per_node or 1, machine.memory_bytes, "this machine"
    if limit is None or cfg.cluster.launcher is Launcher.slurm or ranks * memory.peak <= limit:
        return []
    parts = f"{_states(memory)} {human(memory.total)}"
    if memory.activations is not None:
        parts += f", activations about {human(memory.activations)}"
    of = f"{ranks} ranks" if ranks > 1 else "a rank"
    return [
        f"memory of {of}: about {human(ranks * memory.peak)} ({parts}{' each' if ranks > 1 else ''}), {whose} has "
        f"{human(limit)}; where that is not enough, {remedies(cfg)}"
    ]


def _size(cfg: RunConfig) -> str:
    parallel = cfg.parallel
    return (
        f"parallel.tensor_model_parallel_size={parallel.tensor_model_parallel_size}, "
        f"pipeline_model_parallel_size={parallel.pipeline_model_parallel_size}"
    )


def _states(memory: Memory) -> str:
    return "weights, gradients and optimizer state" if memory.gradients else "weights"


def remedies(cfg: RunConfig, *, activations: bool = True) -> str:
    """Keys that make a rank of this run smaller, those that cost least first. activations: also those that make no
    weight smaller."""
    untrained = isinstance(cfg.stage, UntrainedStageConfig)
    found = [
        *(_fewer_activations(cfg) if activations and not untrained else []),
        *([] if untrained else _states_cut(cfg)),
    ]
    parallel = cfg.parallel
    if cfg.cluster.device is Device.cpu:
        found.append("a smaller model.seq_length or model")  # more ranks would share the same memory
        return f"set {', or '.join(found)}"
    tp, pp = 2 * parallel.tensor_model_parallel_size, 2 * parallel.pipeline_model_parallel_size
    found.append(
        f"parallel.tensor_model_parallel_size={tp} or parallel.pipeline_model_parallel_size={pp} on more ranks"
    )
    if isinstance(cfg.stage, PolicyStageConfig):
        found.append("layout=split or layout.<role>.offload=true")
    return f"set {', or '.join(found)}"


def _fewer_activations(cfg: RunConfig) -> list[str]:
    train, parallel, stage, found = cfg.train, cfg.parallel, cfg.stage, []
    if isinstance(stage, PolicyStageConfig) or (
        isinstance(stage, SequenceStageConfig) and stage.batching is Batching.token_budget
    ):
        found.append(f"a smaller stage.max_tokens_per_micro_batch={stage.max_tokens_per_micro_batch}")
    elif train.micro_batch_size > 1:
        found.append(f"train.micro_batch_size={train.micro_batch_size // 2} (the same batch in more parts)")
    if train.cuda_graph_impl is CudaGraphImpl.local:
        found.append("train.cuda_graph_impl=none")
    elif train.recompute_granularity is not RecomputeGranularity.full:
        found.append("train.recompute_granularity=full")
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        found.append("parallel.sequence_parallel=true")
    if micro_batch_tokens(cfg) >= 8192:
        found.append(f"parallel.context_parallel_size={2 * parallel.context_parallel_size}")
    return found


def _states_cut(cfg: RunConfig) -> list[str]:
    found, adapters = [], cfg.peft.method is not PeftMethod.none
    layout = make_layout(cfg)
    if (
        layout.dp * layout.cp > 1 and not cfg.parallel.use_distributed_optimizer and not adapters
        and cfg.optim.optimizer is not Optimizer.sgd
    ):  # fmt: skip
        found.append("parallel.use_distributed_optimizer=true")
    if not (cfg.precision.bf16 or cfg.precision.fp16) and cfg.cluster.device is Device.cuda:
        found.append("precision=bf16")
    if isinstance(cfg.stage, SequenceStageConfig) and not adapters:
        found.append("peft=lora")
    return found


def human(size_bytes: float) -> str:
    """Bytes with a binary unit: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size_bytes < 1024 or unit == "TiB":
            break
        size_bytes /= 1024
    return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
