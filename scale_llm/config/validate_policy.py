"""Whether a run of stage=ppo or stage=grpo has what it needs: roles that fit, numbers in range."""

import math
from dataclasses import fields

from scale_llm.config.layout import LayoutConfig
from scale_llm.config.model import Head
from scale_llm.config.peft import LOW_RANK, PeftMethod
from scale_llm.config.policy import GROUPED, AdvEstimator, GrpoConfig, KlCtrlType, PolicyStageConfig
from scale_llm.config.roles import ROLES, ranks_of, role_config, roles_of
from scale_llm.config.run import RunConfig
from scale_llm.config.validate_layout import layout_problems, world_size
from scale_llm.config.validate_sampling import prompt_problems, sampling_problems


def policy_problems(cfg: RunConfig, stage: PolicyStageConfig) -> list[str]:
    """Problems of such a run beyond those of every training run."""
    return [*_start(cfg, stage), *_estimator(stage), *_values(cfg, stage), *_batches(cfg, stage)]


def _start(cfg: RunConfig, stage: PolicyStageConfig) -> list[str]:
    found = []
    if cfg.checkpoint.load is None:
        found.append(
            "checkpoint.load=null: nothing answers; give checkpoint.load=<a run_dir>/checkpoints, or a Hugging Face "
            "directory"
        )
    if cfg.model.head is not Head.language_model:
        found.append(f"model.head={cfg.model.head.value}: gives numbers, no text; set model.head=language_model")
    if cfg.model.hidden_dropout or cfg.model.attention_dropout:
        found.append(
            f"model.hidden_dropout={cfg.model.hidden_dropout}, model.attention_dropout={cfg.model.attention_dropout}: "
            "noise in the ratio of new to old policy; set both to 0"
        )
    if cfg.peft.method in LOW_RANK and cfg.peft.dropout:
        found.append(f"peft.dropout={cfg.peft.dropout}: noise in the ratio of new to old policy; set it to 0")
    if cfg.peft.method is PeftMethod.prompt_tuning:
        found.append("peft.method=prompt_tuning: is for stage=sft; set peft=lora or peft=none")
    return found


def _estimator(stage: PolicyStageConfig) -> list[str]:
    found, estimator = [], stage.adv_estimator
    key = f"stage.adv_estimator={estimator.value}"
    if isinstance(stage, GrpoConfig) and estimator is AdvEstimator.gae:
        found.append(f"{key}: needs a critic, which stage=grpo has not; choose stage=ppo")
    if estimator in GROUPED and stage.num_generations_per_prompt < 2:
        found.append(
            f"stage.num_generations_per_prompt={stage.num_generations_per_prompt}: {key} compares the answers to one "
            "prompt; give at least 2"
        )
    if stage.filter_groups and stage.num_generations_per_prompt < 2:
        found.append("stage.filter_groups=true: one answer to a prompt is always like itself; give "
                     "stage.num_generations_per_prompt of at least 2")  # fmt: skip
    if stage.kl_ctrl.type is KlCtrlType.adaptive and not stage.kl_coef:
        found.append("stage.kl_ctrl.type=adaptive: stage.kl_coef=0 stays 0; give it a value to begin with")
    return found


SMALLEST = {
    "num_generations_per_prompt": 1,
    "generation_batch_size": 1,
    "ppo_epochs": 1,
    "ppo_mini_batch_size": 1,
    "max_tokens_per_micro_batch": 1,
    "max_num_gen_batches": 1,
    "entropy_coeff": None,
    "kl_coef": 0,
    "kl_loss_coef": 0,
    "overlong_buffer_tokens": 0,
    "overlong_penalty_factor": 0,
    "num_samples": 0,
    "critic_warmup": 0,
    "validation_temperature": 0,
}
"""The smallest value of a key; None: any number."""

ABOVE_ZERO = ("clip_ratio", "clip_ratio_high", "tis_imp_ratio_cap", "critic_lr", "cliprange_value")


def _values(cfg: RunConfig, stage: PolicyStageConfig) -> list[str]:
    found = []
    for key, smallest in SMALLEST.items():
        value = getattr(stage, key, None)
        if value is not None and (not math.isfinite(value) or smallest is not None and value < smallest):
            limit = "a number" if smallest is None else f"{smallest} or larger"
            found.append(f"stage.{key}={value}: must be {limit}; give such a one")
    for key in ABOVE_ZERO:
        value = getattr(stage, key, None)
        if value is not None and not 0 < value < math.inf:
            found.append(f"stage.{key}={value}: must be larger than 0; give a number larger than 0")
    for key in ("gamma", "lam"):
        if not 0 <= getattr(stage, key) <= 1:
            found.append(f"stage.{key}={getattr(stage, key)}: is a share; give a number from 0 to 1")
    found += sampling_problems(
        temperature=stage.temperature, top_k=stage.top_k, top_p=stage.top_p, max_new_tokens=stage.max_new_tokens,
        stop_strings=stage.stop_strings, prefix="stage.",
    )  # fmt: skip
    if not stage.temperature:
        found.append("stage.temperature=0: answers to a prompt would all be the same; 1 is usual")
    if stage.clip_ratio_c is not None and stage.clip_ratio_c <= 1:
        found.append(f"stage.clip_ratio_c={stage.clip_ratio_c}: is a ratio above 1; 3 is usual, null for none")
    if stage.kl_ctrl.target_kl <= 0 or stage.kl_ctrl.horizon <= 0:
        found.append(
            f"stage.kl_ctrl.target_kl={stage.kl_ctrl.target_kl}, stage.kl_ctrl.horizon={stage.kl_ctrl.horizon}: must "
            "be larger than 0; 6 and 10000 are usual"
        )
    if stage.overlong_buffer_tokens > stage.max_new_tokens:
        found.append(
            f"stage.overlong_buffer_tokens={stage.overlong_buffer_tokens}: more than stage.max_new_tokens="
            f"{stage.max_new_tokens}; give fewer"
        )
    return found + prompt_problems(cfg, stage.max_new_tokens)


def _batches(cfg: RunConfig, stage: PolicyStageConfig) -> list[str]:
    found = []
    mini, prompts = stage.ppo_mini_batch_size, cfg.train.global_batch_size
    if mini is not None and 0 < mini and prompts % mini:
        found.append(
            f"stage.ppo_mini_batch_size={mini}: does not divide the {prompts} prompts of train.global_batch_size; "
            "give a divisor"
        )
    budget = stage.max_tokens_per_micro_batch
    if budget is not None and budget < cfg.model.seq_length:
        found.append(
            f"stage.max_tokens_per_micro_batch={budget}: holds no answer of model.seq_length={cfg.model.seq_length} "
            f"with its prompt; give at least {cfg.model.seq_length}"
        )
    if cfg.train.train_epochs is not None or cfg.train.rampup_batch_size is not None:
        found.append("train.train_epochs, train.rampup_batch_size: are not for stage=ppo and grpo; set "
                     "train.train_iters and train.global_batch_size")  # fmt: skip
    return found


def role_layout_problems(cfg: RunConfig) -> list[str]:
    """Ranks that roles name, and sizes that do not divide; models of critic and reward are looked at when they are
    read."""
    if not isinstance(cfg.stage, PolicyStageConfig):
        return []
    found, ranks = size_problems(cfg.layout), {}
    for role in ROLES:
        try:
            ranks[role] = ranks_of(cfg, role)
        except ValueError as error:
            found.append(f"layout.{role}.ranks={getattr(cfg.layout, role).ranks}: {error}")
    if found:
        return found
    roles = roles_of(cfg)
    if "rollout" in roles and cfg.peft.method is not PeftMethod.none:
        found.append(
            f"layout.rollout: adapters (peft.method={cfg.peft.method.value}) are not moved between models; take "
            "layout=colocated, where the actor itself generates, or peft=none"
        )
    found += _overlaps({role: ranks[role] for role in roles}) + _unused(cfg, {role: ranks[role] for role in roles})
    for role in roles:
        if role in ("critic", "reward"):
            continue  # of models that the launcher looks at
        own = role_config(cfg, role)
        found += [f"layout.{role}: on {len(ranks[role])} ranks: {problem}" for problem in layout_problems(own)]
    return list(dict.fromkeys(found))


def size_problems(layout: LayoutConfig) -> list[str]:
    """Sizes that are zero or negative."""
    found = []
    if not 0 < layout.bucket_megabytes <= 1e9:
        found.append(f"layout.bucket_megabytes={layout.bucket_megabytes}: must be larger than 0 and no more than the "
                     "memory there is; 256 is usual")  # fmt: skip
    for role in ROLES:
        own = getattr(layout, role)
        for field in fields(own):
            value = getattr(own, field.name)
            if field.name.endswith("_size") and value is not None and value < 1:
                found.append(f"layout.{role}.{field.name}={value}: must be larger than 0; give a number larger than 0")
    return found


def _overlaps(ranks: dict[str, tuple[int, ...]]) -> list[str]:
    """Roles work at the same time or in turns: on the same ranks, or on none in common."""
    found = []
    for number, (role, mine) in enumerate(ranks.items()):
        for other, theirs in list(ranks.items())[number + 1 :]:
            both = set(mine) & set(theirs)
            if both and mine != theirs:
                found.append(
                    f"layout.{role}.ranks={span(mine)}, layout.{other}.ranks={span(theirs)}: overlap in "
                    f"{span(sorted(both))}; give both the same ranks, or none in common"
                )
    return found


def _unused(cfg: RunConfig, ranks: dict[str, tuple[int, ...]]) -> list[str]:
    world = world_size(cfg)
    idle = sorted(set(range(world)) - {rank for mine in ranks.values() for rank in mine})
    if not idle:
        return []
    return [
        f"layout: ranks {span(idle)} of {world} have no role; give them to one with layout.<role>.ranks, or start "
        f"fewer with cluster.nproc_per_node"
    ]


def span(ranks) -> str:
    """0-3,6"""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][-1] == rank - 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
