"""What stage=ppo and stage=grpo need beside their own configuration: models of critic and reward, reward functions."""

from scale_llm.checkpoint.written import written_config
from scale_llm.config.errors import UserError
from scale_llm.config.model import Head, PositionEmbedding
from scale_llm.config.peft import PeftMethod
from scale_llm.config.policy import PolicyStageConfig
from scale_llm.config.roles import ROLES, load_of, ranks_of, role_config, roles_of
from scale_llm.config.run import RunConfig
from scale_llm.config.validate_files import adapters_alone, other_tokenizer
from scale_llm.config.validate_layout import layout_problems
from scale_llm.config.validate_model import model_problems
from scale_llm.config.validate_policy import size_problems

KEYS = {"critic": "stage.critic_load", "reward": "reward.load", "reference": "stage.reference_load"}


def role_problems(cfg: RunConfig) -> list[str]:
    """Problems of the files that the roles are made from, and of functions that cannot be imported."""
    if not isinstance(cfg.stage, PolicyStageConfig):
        return []
    found = _functions(cfg)
    if size_problems(cfg.layout):  # which validation has named, and so for the rest
        return found
    try:
        for role in ROLES:
            ranks_of(cfg, role)
    except ValueError:
        return found
    for role in roles_of(cfg):
        if role in KEYS and load_of(cfg, role) is not None:
            found += _role(cfg, role)
    return list(dict.fromkeys(found))


def _functions(cfg: RunConfig) -> list[str]:
    if cfg.reward.function is None:
        return []
    from scale_llm.rewards.loading import load_functions

    try:
        load_functions(cfg.reward)
    except UserError as error:
        return error.problems
    return []


def _role(cfg: RunConfig, role: str) -> list[str]:
    load = load_of(cfg, role)
    assert load is not None
    key = KEYS[role] if load != cfg.checkpoint.load else "checkpoint.load"
    try:
        written = written_config(load, key)
    except (UserError, ValueError) as error:
        return error.problems if isinstance(error, UserError) else [f"{key}={load}: {error}"]
    found = other_tokenizer(cfg, load, key)
    if role == "reward" and written.model.head is Head.language_model:
        found.append(f"{key}={load}: a language model, which gives no number; give the checkpoint of a reward model")
    if role == "reference":
        return found
    if written.peft.method is not PeftMethod.none:
        found.append(adapters_alone(key, load))
    longest = written.model.max_position_embeddings or 0
    if written.model.position_embedding_type is PositionEmbedding.learned_absolute and longest < cfg.model.seq_length:
        found.append(
            f"{key}={load}: has learnt {longest} positions, model.seq_length={cfg.model.seq_length} has more; lower "
            "model.seq_length"
        )
    own = role_config(cfg, role, written.model)
    for problem in [*layout_problems(own), *model_problems(own)]:
        found.append(f"layout.{role} ({key}={load}): {problem}")
    return found
