"""Values that are wrong alone: signs, ranges, choices that exclude each other."""

import importlib.util
import math
from typing import Any

from scale_llm.config.checkpoint import CheckpointConfig
from scale_llm.config.cluster import MOST_RANKS
from scale_llm.config.data import DataConfig, LoaderKind
from scale_llm.config.model import Head
from scale_llm.config.optim import OptimConfig
from scale_llm.config.policy import PolicyStageConfig
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import EvaluateConfig, GenerateConfig, ScoreConfig, SequenceStageConfig
from scale_llm.config.validate_policy import policy_problems
from scale_llm.config.validate_precision import precision_problems
from scale_llm.config.validate_profile import profile_problems
from scale_llm.config.validate_reward import reward_problems
from scale_llm.config.validate_sampling import prompt_problems, sampling_problems
from scale_llm.config.validate_sequences import sequence_problems

POSITIVE = {
    "model": "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels seq_length "
    "max_position_embeddings vocab_size make_vocab_size_divisible_by norm_epsilon rotary_base num_experts "
    "moe_router_topk moe_ffn_hidden_size",
    "tokenizer": "vocab_size",
    "data": "embedded_megabytes index_workers max_document_megabytes",
    "train": "micro_batch_size global_batch_size train_iters train_samples train_epochs eval_interval exit_interval "
    "exit_duration_in_mins log_interval recompute_num_layers",
    "parallel": "tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size "
    "context_parallel_size expert_model_parallel_size expert_tensor_parallel_size ddp_bucket_size "
    "distributed_timeout_minutes",
    "precision": "initial_loss_scale min_loss_scale loss_scale_window hysteresis fp8_amax_history_len",
    "optim": "lr lr_decay_iters lr_decay_samples lr_wsd_decay_iters lr_wsd_decay_samples adam_eps",
    "checkpoint": "save_interval keep_last keep_every local_interval",
    "health": "max_nan_steps loss_spike_sigmas loss_spike_window loss_spike_steps "
    "check_weight_hash_across_dp_replicas_interval straggler_interval hang_slack_seconds",
    "cluster": "nnodes nproc_per_node omp_num_threads nodes gpus_per_node cpus_per_task",
}
"""Keys that must be larger than 0 where they are set."""

NOT_NEGATIVE = {
    "model": "init_method_std moe_aux_loss_coeff",
    "data": "num_workers",
    "train": "eval_iters seed",
    "optim": "min_lr lr_warmup_iters lr_warmup_samples lr_warmup_init weight_decay clip_grad",
    "checkpoint": "local_replicas",
    "health": "max_rewinds",
    "cluster": "max_restarts spare_nodes",
}

SHARES = {
    "model.hidden_dropout": False,
    "model.attention_dropout": False,
    "model.rotary_percent": True,
    "optim.adam_beta1": False,
    "optim.adam_beta2": False,
    "optim.sgd_momentum": False,
    "optim.lr_warmup_fraction": False,
}
"""Keys between 0 and 1, and whether 1 itself is allowed (and 0 then is not)."""


def value_problems(cfg: RunConfig) -> list[str]:
    """Problems that a single group shows, signs aside."""
    return [
        *_shares(cfg),
        *precision_problems(cfg),
        *optim_problems(cfg.optim),
        *split_problems(cfg.data),
        *loader_problems(cfg.data),
        *fim_rate_problems(cfg.data),
        *retention_problems(cfg.checkpoint),
        *local_copy_problems(cfg.checkpoint, cfg.cluster.nnodes),
        *health_problems(cfg),
        *profile_problems(cfg),
        *stage_problems(cfg),
    ]


def _value(cfg: RunConfig, key: str) -> Any:
    group, name = key.split(".")
    return getattr(getattr(cfg, group), name)


def sign_problems(cfg: RunConfig) -> list[str]:
    """Sizes and counts that are zero, negative or not finite."""
    found = []
    for table, smallest in ((POSITIVE, "larger than 0"), (NOT_NEGATIVE, "0 or larger")):
        for key in (f"{group}.{name}" for group, names in table.items() for name in names.split()):
            value = _value(cfg, key)
            if value is None:
                continue
            if not math.isfinite(value) or value < 0 or (value == 0 and table is POSITIVE):
                found.append(f"{key}={value}: must be {smallest}; give a number {smallest}")
    return found + _too_large(cfg)


def _too_large(cfg: RunConfig) -> list[str]:
    """Numbers that nothing can hold."""
    found, cluster, seed = [], cfg.cluster, cfg.train.seed
    if cluster.nnodes * (cluster.nproc_per_node or 1) > MOST_RANKS:
        found.append(
            f"cluster.nnodes={cluster.nnodes}, cluster.nproc_per_node={cluster.nproc_per_node}: more than {MOST_RANKS} "
            "ranks; give the nodes that there are"
        )
    if seed >= 2**63:
        found.append(f"train.seed={seed}: generators of random numbers take 63 bits; give a number below {2**63}")
    return found


def _shares(cfg: RunConfig) -> list[str]:
    found = []
    for key, with_one in SHARES.items():
        value = _value(cfg, key)
        if value is None:
            continue
        inside = 0 < value <= 1 if with_one else 0 <= value < 1
        if not inside:
            limits = "above 0 and at most 1" if with_one else "at least 0 and below 1"
            found.append(f"{key}={value}: is a share; give a number {limits}")
    return found


def fim_rate_problems(data: DataConfig) -> list[str]:
    """Shares of documents that are none."""
    values = {"data.fim_rate": data.fim_rate, "data.fim_spm_rate": data.fim_spm_rate}
    return [
        f"{key}={value:g}: is a share of documents; give a number from 0 to 1"
        for key, value in values.items()
        if not 0 <= value <= 1
    ]


def loader_problems(data: DataConfig) -> list[str]:
    """A loader whose package is not there."""
    if data.loader is not LoaderKind.dali:
        return []
    try:
        found = importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no package of NVIDIA's at all
        found = False
    problem = (
        "data.loader=dali: needs the package nvidia-dali-cuda130, which is not installed; pip install -c "
        "constraints.txt '.[dali]', or set data.loader=auto"
    )
    return [] if found else [problem]


def optim_problems(optim: OptimConfig) -> list[str]:
    """Learning rates out of order, and several keys for one length."""
    found = []
    if optim.min_lr > optim.lr:
        found.append(f"optim.min_lr={optim.min_lr}: above optim.lr={optim.lr}; give a lower min_lr")
    if optim.lr_warmup_init > optim.lr:
        found.append(f"optim.lr_warmup_init={optim.lr_warmup_init}: above optim.lr={optim.lr}; give a lower start")
    warmups = [key for key in ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction") if getattr(optim, key)]
    found += _only_one(optim, warmups)
    for ends in (("lr_decay_iters", "lr_decay_samples"), ("lr_wsd_decay_iters", "lr_wsd_decay_samples")):
        found += _only_one(optim, [key for key in ends if getattr(optim, key) is not None])
    return found


def _only_one(optim: OptimConfig, keys: list[str]) -> list[str]:
    if len(keys) < 2:
        return []
    given = ", ".join(f"optim.{key}={getattr(optim, key)}" for key in keys)
    return [f"{given}: several lengths for one phase; keep one of them"]


def split_problems(data: DataConfig) -> list[str]:
    """The three shares of the documents."""
    form = "give three shares for training, validation and test, such as data.split='949,50,1'"
    try:
        shares = [float(part) for part in data.split.split(",")]
    except ValueError:
        return [f"data.split={data.split}: not numbers separated by commas; {form}"]
    if len(shares) != 3 or not all(math.isfinite(share) and share >= 0 for share in shares) or sum(shares) == 0:
        return [f"data.split={data.split}: not three shares of 0 or more; {form}"]
    return []


def retention_problems(checkpoint: CheckpointConfig) -> list[str]:
    """A choice of checkpoints to keep where all are kept."""
    if checkpoint.keep_every is None or checkpoint.keep_last is not None:
        return []
    return [
        f"checkpoint.keep_every={checkpoint.keep_every}: without checkpoint.keep_last every checkpoint stays; set "
        "checkpoint.keep_last=2, or remove it"
    ]


def local_copy_problems(checkpoint: CheckpointConfig, nodes: int) -> list[str]:
    """Local copies that have no place, or replicas that have no node."""
    interval, replicas = checkpoint.local_interval, checkpoint.local_replicas
    found = []
    if interval is not None and checkpoint.local_dir is None:
        found.append(
            f"checkpoint.local_interval={interval}: there is no place for copies; set checkpoint.local_dir to a "
            "directory of every node's own, such as /dev/shm/copies"
        )
    if interval is not None and replicas >= nodes:
        found.append(
            f"checkpoint.local_replicas={replicas}: with cluster.nnodes={nodes} there are {nodes - 1} other nodes; set "
            f"at most {nodes - 1}"
        )
    return found


def health_problems(cfg: RunConfig) -> list[str]:
    """Iterations that there are not, and a factor that names every rank."""
    lists = {
        "train.iterations_to_skip": cfg.train.iterations_to_skip,
        "health.drill_nan_gradients": cfg.health.drill_nan_gradients,
    }
    found = [
        f"{key}={iterations}: iterations begin at 1; give numbers from 1 on"
        for key, iterations in lists.items()
        if any(iteration < 1 for iteration in iterations)
    ]
    if not cfg.health.straggler_factor > 1:
        found.append(
            f"health.straggler_factor={cfg.health.straggler_factor}: would name ranks that are as fast as the others; "
            "give a number above 1, such as 1.5"
        )
    return found


def stage_problems(cfg: RunConfig) -> list[str]:
    """How long to run, and what an evaluation needs."""
    if isinstance(cfg.stage, EvaluateConfig):
        return _evaluate_problems(cfg, cfg.stage)
    if isinstance(cfg.stage, ScoreConfig):
        return _score_problems(cfg)
    if isinstance(cfg.stage, GenerateConfig):
        return _generate_problems(cfg, cfg.stage)
    lengths = {f"train.{key}": getattr(cfg.train, key) for key in ("train_iters", "train_samples", "train_epochs")}
    given = {key: value for key, value in lengths.items() if value is not None}
    keys = ", ".join(f"{key}={value}" for key, value in given.items())
    if not given:
        return ["train.train_iters=null, train.train_samples=null: no length given; set train.train_iters=1000"]
    if len(given) > 1:
        return [f"{keys}: {len(given)} lengths; set one of them, the others to null"]
    if isinstance(cfg.stage, SequenceStageConfig):
        return sequence_problems(cfg, cfg.stage)
    if isinstance(cfg.stage, PolicyStageConfig):
        return [*policy_problems(cfg, cfg.stage), *reward_problems(cfg.reward)]
    return []


def _generate_problems(cfg: RunConfig, stage: GenerateConfig) -> list[str]:
    found = []
    if cfg.checkpoint.load is None:
        found.append("checkpoint.load=null: nothing to ask; give checkpoint.load=<a run_dir>/checkpoints")
    if cfg.data.path is None:
        found.append("data.path=null: no prompts; give a JSONL, JSON or Parquet file with prompt or messages")
    if cfg.model.head is not Head.language_model:
        found.append(f"model.head={cfg.model.head.value}: gives numbers, no text; give a language model's checkpoint")
    found += sampling_problems(
        temperature=stage.temperature, top_k=stage.top_k, top_p=stage.top_p, max_new_tokens=stage.max_new_tokens,
        stop_strings=stage.stop_strings, prefix="stage.",
    )  # fmt: skip
    for key in ("num_generations_per_prompt", "batch_size"):
        if getattr(stage, key) < 1:
            found.append(f"stage.{key}={getattr(stage, key)}: must be at least 1; give a larger number")
    return found + prompt_problems(cfg, stage.max_new_tokens)


def _score_problems(cfg: RunConfig) -> list[str]:
    found = []
    if cfg.checkpoint.load is None:
        found.append("checkpoint.load=null: nothing scores; give checkpoint.load=<a reward run's run_dir>/checkpoints")
    if cfg.data.path is None:
        found.append("data.path=null: nothing to score; give a JSONL, JSON or Parquet file of conversations")
    if cfg.model.head is Head.language_model:
        found.append(
            "model.head=language_model: has no number for an answer; give the checkpoint of a reward model, with "
            "model=from_checkpoint"
        )
    return found


def _evaluate_problems(cfg: RunConfig, stage: EvaluateConfig) -> list[str]:
    found = []
    if stage.split not in ("train", "validation", "test"):
        found.append(f"stage.split={stage.split}: no such split; one of train, validation, test")
    if cfg.checkpoint.load is None:
        found.append("checkpoint.load=null: nothing to evaluate; give checkpoint.load=<a run_dir>/checkpoints")
    if cfg.train.eval_iters == 0:
        found.append("train.eval_iters=0: an evaluation of no batches; give the number of global batches")
    return found
