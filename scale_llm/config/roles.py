"""The roles of stage=ppo and stage=grpo: which a run has, on which ranks, and the configuration of each. Pure."""

import copy
from dataclasses import fields

from scale_llm.config.cluster import MOST_RANKS
from scale_llm.config.layout import RoleLayout
from scale_llm.config.model import Backend, Head, ModelConfig
from scale_llm.config.parallel import ParallelConfig
from scale_llm.config.peft import PeftConfig
from scale_llm.config.policy import AdvEstimator, PolicyStageConfig, PpoConfig
from scale_llm.config.run import RunConfig
from scale_llm.config.validate_layout import world_size

ROLES = ("actor", "rollout", "reference", "critic", "reward")

TRAINED_ROLES = ("actor", "critic")

_SIZES = [field.name for field in fields(RoleLayout) if field.name not in ("ranks", "offload")]


def roles_of(cfg: RunConfig) -> list[str]:
    """The roles that the run has a model for, the rollout among them only where it has one of its own."""
    stage = cfg.stage
    assert isinstance(stage, PolicyStageConfig)
    needed = {
        "actor": True,
        "rollout": not is_the_actor(cfg),
        "reference": stage.needs_reference,
        "critic": isinstance(stage, PpoConfig) and stage.adv_estimator is AdvEstimator.gae,
        "reward": cfg.reward.load is not None,
    }
    return [role for role in ROLES if needed[role]]


def is_the_actor(cfg: RunConfig) -> bool:
    """Whether the rollout needs no model of its own."""
    same_ranks = ranks_of(cfg, "rollout") == ranks_of(cfg, "actor")
    return same_ranks and parallel_of(cfg, "rollout") == parallel_of(cfg, "actor")


def layout_of(cfg: RunConfig, role: str) -> RoleLayout:
    return getattr(cfg.layout, role)


def ranks_of(cfg: RunConfig, role: str) -> tuple[int, ...]:
    """Sorted ranks of the whole job.

    Raises:
        ValueError: with what is wrong with `layout.<role>.ranks`.
    """
    text = layout_of(cfg, role).ranks
    if text is None:
        text = "all" if role == "actor" else cfg.layout.actor.ranks or "all"
    return parse_ranks(text, world_size(cfg))


def parse_ranks(text: str, world: int) -> tuple[int, ...]:
    """`all`, `first_half`, `second_half` or numbers and spans of them."""
    if world > MOST_RANKS:
        raise ValueError(f"a job of {world} ranks has more than {MOST_RANKS}")
    named = {"all": range(world), "first_half": range(world // 2), "second_half": range(world // 2, world)}
    if text in named:
        found = list(named[text])
        if not found:
            raise ValueError(f"a job of {world} rank has no {text}")
        return tuple(found)
    found = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"{part.strip()!r} is no rank; give all, first_half, second_half, or such as 0-3,6")
        found += range(int(first), min(int(last if dash else first), world) + 1)
    if not found or max(found) >= world or len(set(found)) != len(found):
        raise ValueError(f"names other ranks than 0 to {world - 1}, or one twice; give ranks of this job")
    return tuple(sorted(found))


def parallel_of(cfg: RunConfig, role: str, model: ModelConfig | None = None) -> ParallelConfig:
    """The sizes of a role's model, by default the run's."""
    layout, found = layout_of(cfg, role), copy.deepcopy(cfg.parallel)
    for name in _SIZES:
        value = getattr(layout, name)
        if value is not None:
            setattr(found, name, value)
    if layout.pipeline_model_parallel_size is not None and layout.virtual_pipeline_model_parallel_size is None:
        found.virtual_pipeline_model_parallel_size = None
    if layout.sequence_parallel is None and found.tensor_model_parallel_size == 1:
        found.sequence_parallel = False
    dense = (model or cfg.model).num_experts is None
    if dense:
        found.expert_model_parallel_size = 1
    if dense or layout.expert_tensor_parallel_size is None and layout.tensor_model_parallel_size is not None:
        found.expert_tensor_parallel_size = found.tensor_model_parallel_size
    return found


def load_of(cfg: RunConfig, role: str) -> str | None:
    """The checkpoint that a role's model starts from."""
    stage = cfg.stage
    assert isinstance(stage, PolicyStageConfig)
    if role == "reference":
        return stage.reference_load or cfg.checkpoint.load
    if role == "reward":
        return cfg.reward.load
    if role == "critic":
        assert isinstance(stage, PpoConfig)
        return stage.critic_load or cfg.reward.load or cfg.checkpoint.load
    return cfg.checkpoint.load


def role_config(cfg: RunConfig, role: str, model: ModelConfig | None = None) -> RunConfig:
    """The run as one role sees it: its ranks are the world, its model and layout the configured ones.

    model: of the checkpoint that it starts from, for critic and reward; the others have the run's.
    """
    found = copy.deepcopy(cfg)
    if model is not None:
        found.model = copy.deepcopy(model)
        found.model.seq_length = cfg.model.seq_length
        found.model.backend, found.model.compile_ops = cfg.model.backend, cfg.model.compile_ops
        found.model.hidden_dropout = found.model.attention_dropout = 0.0  # as of the actor: see validate_policy
    if role == "critic":
        found.model.head, found.model.architecture = Head.value, None
        assert isinstance(cfg.stage, PpoConfig)
        found.optim.lr = cfg.optim.lr if cfg.stage.critic_lr is None else cfg.stage.critic_lr
        found.optim.min_lr = min(cfg.optim.min_lr, found.optim.lr)
        found.optim.lr_warmup_init = min(cfg.optim.lr_warmup_init, found.optim.lr)
    found.parallel = parallel_of(cfg, role, found.model)
    # Rows of all but the rollout are packed, and Transformer Engine cuts them otherwise; the rollout is as the actor
    cut = parallel_of(cfg, "actor" if role == "rollout" else role).context_parallel_size > 1
    if cut and found.model.backend is Backend.auto:
        found.model.backend = Backend.torch
    found.cluster.nnodes, found.cluster.nproc_per_node = 1, len(ranks_of(cfg, role))
    if role in ("critic", "reward"):
        found.peft = PeftConfig()
    return found
