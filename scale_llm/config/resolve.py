"""Fills what a user may leave open, so that config.yaml says what ran. Pure: the machine is an argument.

Nothing here complains: a value that cannot be derived stays as it is, and `validate` names the cause.
"""

import copy
import json
import math
import os
from pathlib import Path

from scale_llm.config.cluster import Device, Launcher
from scale_llm.config.data import LoaderKind
from scale_llm.config.machine import Machine
from scale_llm.config.model import Backend, Head, ModelConfig
from scale_llm.config.names import run_name
from scale_llm.config.packed import packed_by
from scale_llm.config.parallel import ParallelConfig
from scale_llm.config.peft import LOW_RANK
from scale_llm.config.policy import PolicyStageConfig, PpoConfig
from scale_llm.config.reward import with_absolute_paths
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import (
    Batching,
    DpoConfig,
    PretrainConfig,
    RewardConfig,
    Score,
    SequenceStageConfig,
    UntrainedStageConfig,
    answers_in_a_row,
)
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.config.train import CudaGraphImpl


def resolve(cfg: RunConfig, machine: Machine) -> RunConfig:
    """A copy of cfg with every open value settled for this machine.

    What the machine does not know (`node_of_job`) stays open; resolving the result again, on the node, settles it and
    changes nothing else.
    """
    cfg = copy.deepcopy(cfg)
    _resolve_cluster(cfg, machine)
    _resolve_precision(cfg, machine)
    _resolve_model(cfg.model, cfg.tokenizer)
    if cfg.model.compile_ops is None:
        cfg.model.compile_ops = machine.compiler
    if cfg.parallel.virtual_pipeline_model_parallel_size == 1:
        cfg.parallel.virtual_pipeline_model_parallel_size = None  # one chunk a stage is no interleaving
    if cfg.parallel.expert_tensor_parallel_size is None:
        cfg.parallel.expert_tensor_parallel_size = cfg.parallel.tensor_model_parallel_size
    _resolve_stage(cfg)
    needs_te = cfg.precision.fp8 is not None or cfg.parallel.tp_comm_overlap
    if needs_te and cfg.model.backend is Backend.auto and cfg.peft.method not in LOW_RANK:
        cfg.model.backend = Backend.transformer_engine
    _resolve_health(cfg)
    _resolve_paths(cfg)
    return cfg


def ranks_needed(parallel: ParallelConfig) -> int:
    """Fewest ranks the layout fits on, with one data-parallel replica where experts allow it."""
    dense = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    expert_tensor = parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size
    expert = expert_tensor * parallel.expert_model_parallel_size * parallel.pipeline_model_parallel_size
    return math.lcm(max(dense, 1), max(expert, 1))


def _resolve_cluster(cfg: RunConfig, machine: Machine) -> None:
    cluster = cfg.cluster
    if cluster.nodes is not None and cluster.nnodes == 1:
        cluster.nnodes = cluster.nodes
    if cluster.device is Device.auto:
        cluster.device = Device.cuda if machine.gpus else Device.cpu
    if cluster.nproc_per_node is None:
        on_cpu = math.ceil(ranks_needed(cfg.parallel) / max(cluster.nnodes, 1))
        cluster.nproc_per_node = machine.gpus if cluster.device is Device.cuda and machine.gpus else on_cpu
    slurm = cluster.launcher is Launcher.slurm
    if cluster.max_restarts is None:
        cluster.max_restarts = 10 if slurm else 3
    if cluster.omp_num_threads is None:
        # A task of Slurm is bound to its own cores, so those are not to be shared out a second time
        own = machine.cores_of_rank or machine.cores // max(cluster.nproc_per_node, 1)
        share = (cluster.cpus_per_task or machine.cores_of_rank or 1) if slurm else own
        cluster.omp_num_threads = max(1, share)


def _resolve_precision(cfg: RunConfig, machine: Machine) -> None:
    precision = cfg.precision
    if precision.auto and not (precision.bf16 or precision.fp16):
        on_gpu = cfg.cluster.device is Device.cuda
        if not on_gpu and machine.fast_bf16_cpu is None:
            return
        precision.bf16 = on_gpu or bool(machine.fast_bf16_cpu)
    precision.auto = False


def _resolve_model(model: ModelConfig, tokenizer: TokenizerConfig) -> None:
    if model.ffn_hidden_size is None:
        model.ffn_hidden_size = default_ffn_hidden_size(model)
    if model.num_query_groups is None:
        model.num_query_groups = model.num_attention_heads
    if model.kv_channels is None and model.num_attention_heads > 0:
        model.kv_channels = model.hidden_size // model.num_attention_heads
    if model.max_position_embeddings is None:
        model.max_position_embeddings = model.seq_length
    if model.num_experts is not None and model.moe_ffn_hidden_size is None:
        model.moe_ffn_hidden_size = model.ffn_hidden_size
    if model.vocab_size is None:
        model.vocab_size = tokenizer_vocab_size(tokenizer)


def _resolve_stage(cfg: RunConfig) -> None:
    """What trains on sequences takes weights alone from its base, and begins at iteration 0."""
    stage = cfg.stage
    if cfg.data.reset_attention_mask and cfg.model.backend is Backend.auto:
        cfg.model.backend = Backend.torch  # Transformer Engine passes over masks of its own causal attention
    if cfg.parallel.context_parallel_size > 1 and packed_by(cfg) is not None and cfg.model.backend is Backend.auto:
        cfg.model.backend = Backend.torch  # Transformer Engine cuts each sequence, we cut the row
    if cfg.train.cuda_graph_impl is CudaGraphImpl.local and cfg.data.loader is LoaderKind.auto:
        cfg.data.loader = LoaderKind.torch  # DALI's threads would call CUDA while graphs are captured
    if isinstance(stage, PolicyStageConfig):
        cfg.checkpoint.finetune = True
        if stage.max_tokens_per_micro_batch is None:
            stage.max_tokens_per_micro_batch = cfg.train.micro_batch_size * cfg.model.seq_length
    if not isinstance(stage, SequenceStageConfig):
        return
    cfg.checkpoint.finetune = True
    if isinstance(stage, RewardConfig):
        cfg.model.head = Head.reward if stage.score is Score.last_token else Head.value
        cfg.model.architecture = None  # not the class of the model it begins as
    if stage.batching is Batching.token_budget and stage.max_tokens_per_micro_batch is None:
        stage.max_tokens_per_micro_batch = cfg.train.micro_batch_size * cfg.model.seq_length * answers_in_a_row(stage)


def _resolve_health(cfg: RunConfig) -> None:
    if cfg.health.hang_slack_seconds is None and not isinstance(cfg.stage, UntrainedStageConfig):
        one_shape = isinstance(cfg.stage, PretrainConfig) and cfg.model.num_experts is None
        quick = one_shape and cfg.cluster.launcher is Launcher.local
        cfg.health.hang_slack_seconds = 8.0 if quick else 60.0


def default_ffn_hidden_size(model: ModelConfig) -> int:
    """4h; with a gate 8/3 h, which keeps the parameters of 4h without one, up to a multiple of 64."""
    if not model.swiglu:
        return 4 * model.hidden_size
    return -(-8 * model.hidden_size // (3 * 64)) * 64


def tokenizer_vocab_size(tokenizer: TokenizerConfig) -> int | None:
    """Tokens of the tokenizer: the size asked for, or 1 + the highest id in a given file; None where unreadable."""
    if tokenizer.path is None:
        return tokenizer.vocab_size
    path = Path(tokenizer.path).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return 1 + max(_token_ids(content))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _token_ids(content: dict) -> list[int]:
    vocab = content["model"]["vocab"]
    # Unigram keeps a list of [token, score], every other kind a table of token to id
    ids = list(range(len(vocab))) if isinstance(vocab, list) else list(vocab.values())
    return ids + [token["id"] for token in content.get("added_tokens", [])]


def _resolve_paths(cfg: RunConfig) -> None:
    cfg.run_dir = os.path.expanduser(cfg.run_dir or os.path.join("runs", run_name(cfg)))
    cfg.checkpoint.save = os.path.expanduser(cfg.checkpoint.save or os.path.join(cfg.run_dir, "checkpoints"))
    cfg.data.cache_dir = os.path.expanduser(cfg.data.cache_dir or os.path.join(cfg.run_dir, "data"))
    if cfg.checkpoint.load is not None:
        cfg.checkpoint.load = os.path.expanduser(cfg.checkpoint.load)
    if cfg.checkpoint.local_dir is not None:
        cfg.checkpoint.local_dir = os.path.expanduser(cfg.checkpoint.local_dir)
    if isinstance(cfg.stage, DpoConfig | PolicyStageConfig) and cfg.stage.reference_load is not None:
        cfg.stage.reference_load = os.path.expanduser(cfg.stage.reference_load)
    if isinstance(cfg.stage, PpoConfig) and cfg.stage.critic_load is not None:
        cfg.stage.critic_load = os.path.expanduser(cfg.stage.critic_load)
    cfg.reward.function = with_absolute_paths(cfg.reward.function)
    if cfg.reward.load is not None:
        cfg.reward.load = os.path.expanduser(cfg.reward.load)
    if cfg.tokenizer.path is not None:
        cfg.tokenizer.path = os.path.expanduser(cfg.tokenizer.path)
