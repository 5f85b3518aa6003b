"""Keys that a run would not read, set to something else than their default: they would do nothing without a word."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from scale_llm.config.health import HealthConfig
from scale_llm.config.layout import LayoutConfig, RoleLayout
from scale_llm.config.peft import LOW_RANK, PeftMethod
from scale_llm.config.policy import AdvEstimator, KlCtrlType, PolicyStageConfig, limits_of
from scale_llm.config.precision import Fp8Recipe
from scale_llm.config.profile import ProfileConfig
from scale_llm.config.reward import RewardFunctionConfig, weighted_functions
from scale_llm.config.roles import ROLES, roles_of
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import (
    REFERENCE_FREE,
    Batching,
    DpoConfig,
    EvaluateConfig,
    GenerateConfig,
    PreferenceLoss,
    PretrainConfig,
    RewardConfig,
    RewardLoss,
    ScoreConfig,
    SequenceStageConfig,
    UntrainedStageConfig,
)
from scale_llm.config.store import STAGES


@dataclass(frozen=True, slots=True)
class Rule:
    """When some keys are read; `reason` may name {cfg.<group>.<key>}, `remedy` the {stages} that read them."""

    keys: str
    is_read: Callable[[RunConfig], bool]
    reason: str
    remedy: str


def _documents(cfg: RunConfig) -> bool:
    return isinstance(cfg.stage, PretrainConfig | EvaluateConfig)


def _conversations(cfg: RunConfig) -> bool:
    return not _documents(cfg)


def _answers(cfg: RunConfig) -> bool:
    return _conversations(cfg) and not isinstance(cfg.stage, GenerateConfig | PolicyStageConfig)


def _not_of_rows(cfg: RunConfig) -> bool:
    """Whether the run does more than go through the rows of data.path once, with a model as it is."""
    return not isinstance(cfg.stage, ScoreConfig | GenerateConfig)


def _comparisons(cfg: RunConfig) -> bool:
    return isinstance(cfg.stage, RewardConfig | DpoConfig)


def _low_rank(cfg: RunConfig) -> bool:
    return cfg.peft.method in LOW_RANK


def _prompt(cfg: RunConfig) -> bool:
    return cfg.peft.method is PeftMethod.prompt_tuning


def _token_budget(cfg: RunConfig) -> bool:
    """Other stages have a key of the same name."""
    return not isinstance(cfg.stage, SequenceStageConfig) or cfg.stage.batching is Batching.token_budget


def _policy(cfg: RunConfig) -> bool:
    return isinstance(cfg.stage, PolicyStageConfig)


def _where(condition: Callable[[PolicyStageConfig], object]) -> Callable[[RunConfig], bool]:
    """Is it so of a stage that trains a policy? Keys of the same name in other stages are not meant."""
    return lambda cfg: not isinstance(cfg.stage, PolicyStageConfig) or bool(condition(cfg.stage))


def _keys(group: str, schema: type) -> list[str]:
    """Every key of a group."""
    names = []
    for field in fields(schema):
        key = f"{group}.{field.name}"
        names += _keys(key, RoleLayout) if field.name in ROLES else [key]
    return names


OF_FUNCTIONS = {
    "reward.default": "",
    "reward.num_workers": "",
    "reward.gsm8k_flexible": "gsm8k",
    "reward.regex_pattern": "regex",
    "reward.length_target_tokens": "length",
    "reward.partial_credit": "python_tests",
    "reward.timeout_seconds": "python_tests",
    "reward.memory_megabytes": "python_tests",
}
"""Keys of reward functions, and of which; empty: of any."""


_OF_HEALTH = ("health.loss_spike_window", "health.loss_spike_steps", "health.straggler_factor")
"""Keys of checks that may not be asked for."""

OF_ROLES = {
    "layout.checksum": "rollout",
    "layout.bucket_megabytes": "rollout",
    **{
        key: role
        for role in ("reference", "critic", "reward")
        for key in _keys(f"layout.{role}", RoleLayout)
        if key.endswith(("_size", "sequence_parallel"))
    },
}
"""Keys of roles that a run may not have. Their ranks and offload are set by options of the layout group for all."""


def _has_role(role: str) -> Callable[[RunConfig], bool]:
    def there(cfg: RunConfig) -> bool:
        try:
            return _policy(cfg) and role in roles_of(cfg)
        except ValueError:  # of ranks: validation says what is wrong with them
            return True

    return there


def _scored_by(name: str) -> Callable[[RunConfig], bool]:
    def called(cfg: RunConfig) -> bool:
        try:
            names = [function.name for function in weighted_functions(cfg.reward.function)]
        except ValueError:  # validation says what is wrong with it
            return True
        return _policy(cfg) and (name in names or not name and bool(names))

    return called


def _loss(*losses: PreferenceLoss) -> Callable[[RunConfig], bool]:
    """Is it one of these? Keys of the same name in other stages are not meant."""
    return lambda cfg: not isinstance(cfg.stage, DpoConfig) or cfg.stage.loss in losses


WITH_REFERENCE = tuple(loss for loss in PreferenceLoss if loss not in REFERENCE_FREE)

RULES = (
    Rule(
        "data.format data.on_too_long data.fields.messages data.fields.role "
        "data.fields.content data.fields.prompt data.fields.system data.fields.tools data.fields.instruction "
        "data.fields.input data.fields.conversations data.fields.sender data.fields.value",
        _conversations,
        "is for conversations and comparisons, stage={cfg.stage.name} reads documents",
        "remove it, or choose {stages}",
    ),
    Rule(
        "tokenizer.chat_template",
        lambda cfg: _conversations(cfg) or cfg.tokenizer.path is None,
        "is for conversations and for a tokenizer trained here, stage={cfg.stage.name} with tokenizer.path has neither",
        "remove it, or choose {stages}",
    ),
    Rule(
        "tokenizer.special_tokens",
        lambda cfg: cfg.tokenizer.path is None,
        "is for a tokenizer trained here, and tokenizer.path names one",
        "remove it, or set tokenizer.path=null",
    ),
    Rule(
        "data.fields.response data.fields.output",
        _answers,
        "is for answers, which stage={cfg.stage.name} does not read",
        "remove it, or choose {stages}",
    ),
    Rule(
        "data.fields.weight",
        lambda cfg: isinstance(cfg.stage, SequenceStageConfig),
        "weighs the loss of answers, which stage={cfg.stage.name} has not",
        "remove it, or choose {stages}",
    ),
    Rule(
        "data.fields.chosen data.fields.rejected data.fields.answers data.fields.ranks data.fields.scores "
        "data.fields.margin data.fields.completion",
        _comparisons,
        "is for comparisons, which stage={cfg.stage.name} does not read",
        "remove it, or choose {stages}",
    ),
    Rule(
        "data.fields.label",
        lambda cfg: _comparisons(cfg) or _policy(cfg),
        "is for comparisons and rewards, which stage={cfg.stage.name} does not read",
        "remove it, or choose {stages}",
    ),
    Rule(
        "data.fields.ground_truth data.fields.data_source data.fields.extra_info",
        _policy,
        "is for reward functions, which stage={cfg.stage.name} does not call",
        "remove it, or choose {stages}",
    ),
    Rule(
        " ".join(
            key
            for key in (*_keys("layout", LayoutConfig), *_keys("reward", RewardFunctionConfig))
            if key not in (*OF_FUNCTIONS, *OF_ROLES, "reward.load_weight")
        ),
        _policy,
        "is for policies that learn from rewards, stage={cfg.stage.name} has none",
        "remove it, or choose {stages}",
    ),
    Rule(
        "reward.load_weight",
        lambda cfg: cfg.reward.load is not None,
        "is of a reward model, and reward.load=null",
        "remove it, or set reward.load",
    ),
    *(
        Rule(
            key,
            _has_role(role),
            f"is of the {role}'s model, and this run has none of its own",
            "remove it",
        )
        for key, role in OF_ROLES.items()
    ),
    *(
        Rule(
            key,
            _scored_by(name),
            f"is for reward.function={name or 'one'}, which this run does not call",
            "remove it, or set reward.function",
        )
        for key, name in OF_FUNCTIONS.items()
    ),
    Rule(
        "stage.guard.action",
        _where(lambda stage: any(limit is not None for limit in limits_of(stage.guard))),
        "no limit of stage.guard is set",
        "remove it, or set a limit such as stage.guard.max_kl",
    ),
    Rule(
        "stage.lam stage.whiten_advantages",
        _where(lambda stage: stage.adv_estimator is AdvEstimator.gae),
        "is for stage.adv_estimator=gae, this is {cfg.stage.adv_estimator.value}",
        "remove it, or choose stage=ppo",
    ),
    Rule(
        "stage.norm_adv_by_std_in_grpo",
        _where(lambda stage: stage.adv_estimator is AdvEstimator.grpo),
        "is for stage.adv_estimator=grpo, this is {cfg.stage.adv_estimator.value}",
        "remove it, or set stage.adv_estimator=grpo",
    ),
    Rule(
        "stage.gamma",
        _where(lambda stage: stage.adv_estimator not in (AdvEstimator.grpo, AdvEstimator.rloo)),
        "has no meaning for stage.adv_estimator={cfg.stage.adv_estimator.value}, which rewards whole answers",
        "remove it, or choose another estimator",
    ),
    Rule(
        "stage.critic_load stage.critic_lr stage.critic_warmup stage.cliprange_value",
        _where(lambda stage: stage.adv_estimator is AdvEstimator.gae),
        "is for a critic, which stage.adv_estimator={cfg.stage.adv_estimator.value} has not",
        "remove it, or set stage.adv_estimator=gae",
    ),
    Rule(
        "stage.kl_ctrl.target_kl stage.kl_ctrl.horizon",
        _where(lambda stage: stage.kl_ctrl.type is KlCtrlType.adaptive),
        "is for stage.kl_ctrl.type=adaptive, this is fixed",
        "remove it, or set stage.kl_ctrl.type=adaptive",
    ),
    Rule(
        "stage.kl_loss_type",
        _where(lambda stage: stage.kl_loss_coef),
        "stage.kl_loss_coef=0 has no KL in the loss",
        "remove it, or set stage.kl_loss_coef",
    ),
    Rule(
        "stage.reference_load",
        lambda cfg: _loss(*WITH_REFERENCE)(cfg) and _where(lambda stage: stage.needs_reference)(cfg),
        "nothing is measured against a reference",
        "remove it, or choose a stage.loss with one, such as dpo; for stage=ppo and grpo set stage.kl_coef, "
        "stage.kl_loss_coef or stage.guard.max_kl",
    ),
    Rule(
        "stage.max_num_gen_batches",
        _where(lambda stage: stage.filter_groups),
        "is for stage.filter_groups=true",
        "remove it, or set stage.filter_groups=true",
    ),
    Rule(
        "stage.overlong_penalty_factor",
        _where(lambda stage: stage.overlong_buffer_tokens),
        "stage.overlong_buffer_tokens=0 has no penalty",
        "remove it, or set stage.overlong_buffer_tokens",
    ),
    Rule(
        "data.fields.text data.index_workers data.max_document_megabytes data.temperature data.reset_position_ids "
        "data.reset_attention_mask data.eod_mask_loss",
        _documents,
        "is for documents, which stage={cfg.stage.name} does not read",
        "remove it, or choose {stages}",
    ),
    Rule(
        "data.split data.embedded_megabytes train.micro_batch_size train.global_batch_size "
        "train.rampup_batch_size train.train_iters train.train_samples train.eval_interval train.eval_iters "
        "train.exit_interval train.exit_duration_in_mins train.log_interval train.recompute_granularity "
        "train.recompute_method train.recompute_num_layers optim.optimizer optim.lr optim.min_lr optim.lr_decay_style "
        "optim.lr_decay_iters optim.lr_decay_samples optim.lr_wsd_decay_style optim.lr_wsd_decay_iters "
        "optim.lr_wsd_decay_samples optim.lr_warmup_iters optim.lr_warmup_samples optim.lr_warmup_fraction "
        "optim.lr_warmup_init optim.weight_decay optim.adam_beta1 optim.adam_beta2 optim.adam_eps optim.sgd_momentum "
        "optim.clip_grad checkpoint.save_interval checkpoint.finetune checkpoint.no_load_optim checkpoint.no_load_rng "
        "checkpoint.async_save checkpoint.keep_last checkpoint.keep_every checkpoint.local_interval "
        "logging.log_params_norm "
        "logging.log_num_zeros_in_grad",
        _not_of_rows,
        "does nothing in stage={cfg.stage.name}, which trains nothing and goes through data.path once",
        "remove it",
    ),
    Rule(
        "checkpoint.local_dir checkpoint.local_replicas",
        lambda cfg: cfg.checkpoint.local_interval is not None,
        "without checkpoint.local_interval no local copies are made",
        "set checkpoint.local_interval=100, or remove it",
    ),
    Rule(
        " ".join(
            ["train.iterations_to_skip", *(key for key in _keys("health", HealthConfig) if key not in _OF_HEALTH)]
        ),
        lambda cfg: not isinstance(cfg.stage, UntrainedStageConfig),
        "does nothing in stage={cfg.stage.name}, which trains nothing",
        "remove it",
    ),
    Rule(
        "health.loss_spike_window health.loss_spike_steps",
        lambda cfg: cfg.health.loss_spike_sigmas is not None,
        "is for spikes of the loss, and health.loss_spike_sigmas=null looks for none",
        "remove it, or set health.loss_spike_sigmas",
    ),
    Rule(
        "health.straggler_factor",
        lambda cfg: cfg.health.straggler_interval is not None,
        "health.straggler_interval=null times no rank",
        "remove it, or set health.straggler_interval",
    ),
    Rule(
        "profile.start",
        lambda cfg: not isinstance(cfg.stage, UntrainedStageConfig),
        "is an iteration, and stage={cfg.stage.name} has none: it trains nothing",
        "remove it, or choose {stages}",
    ),
    Rule(
        " ".join(key for key in _keys("profile", ProfileConfig) if key not in ("profile.start", "profile.with_stack")),
        lambda cfg: cfg.profile.start is not None,
        "profile.start=null profiles nothing",
        "set profile.start, take profile=trace, or remove it",
    ),
    Rule(
        "profile.with_stack",
        lambda cfg: cfg.profile.start is not None and not cfg.profile.nvtx,
        "is of torch's trace, which profile.start=null or profile.nvtx=true leaves out",
        "remove it, or take profile=trace",
    ),
    Rule(
        "data.fim_spm_rate data.fim_prefix_token data.fim_middle_token data.fim_suffix_token",
        lambda cfg: cfg.data.fim_rate > 0,
        "data.fim_rate=0 puts no document in another order",
        "remove it, or set data.fim_rate",
    ),
    Rule(
        "data.loader data.fim_rate",
        lambda cfg: isinstance(cfg.stage, PretrainConfig),
        "is for training on documents, which stage={cfg.stage.name} does not",
        "remove it, or choose {stages}",
    ),
    Rule(
        "data.num_workers",
        lambda cfg: _not_of_rows(cfg) and not _policy(cfg),
        "stage={cfg.stage.name} reads its rows once, at the start",
        "remove it",
    ),
    Rule(
        "train.train_epochs",
        lambda cfg: isinstance(cfg.stage, SequenceStageConfig),
        "stage={cfg.stage.name} has no epochs",
        "remove it, or choose {stages} (of documents train.train_iters or train.train_samples is the length, of an "
        "evaluation train.eval_iters)",
    ),
    Rule(
        "peft.rank peft.alpha peft.use_rslora peft.dropout peft.target_modules",
        _low_rank,
        "is for lora and dora, this is peft.method={cfg.peft.method.value}",
        "set peft=lora or peft=dora, or remove it",
    ),
    Rule(
        "peft.quantize_base",
        _low_rank,
        "only weights beside those of lora and dora can be kept in 4 bits, this is peft.method={cfg.peft.method.value}",
        "set peft=qlora, or peft.quantize_base=none",
    ),
    Rule(
        "peft.num_virtual_tokens peft.prompt_init_text",
        _prompt,
        "is for prompt_tuning, this is peft.method={cfg.peft.method.value}",
        "set peft=prompt_tuning, or remove it",
    ),
    Rule(
        "precision.fp8",
        lambda cfg: not isinstance(cfg.stage, GenerateConfig),
        "is for training and evaluation, generation is in BF16",
        "set precision=bf16",
    ),
    Rule(
        "precision.fp8_recipe precision.first_last_layers_bf16",
        lambda cfg: cfg.precision.fp8 is not None,
        "is for FP8, and precision.fp8=null",
        "remove it, or set precision.fp8=hybrid",
    ),
    Rule(
        "precision.fp8_margin precision.fp8_amax_history_len precision.fp8_amax_compute_algo",
        lambda cfg: cfg.precision.fp8 is not None and cfg.precision.fp8_recipe is Fp8Recipe.delayed,
        "is for FP8 with fp8_recipe=delayed, which this run has not",
        "remove it, or set precision=fp8_delayed",
    ),
    Rule(
        "precision.num_layers_at_start_in_bf16 precision.num_layers_at_end_in_bf16",
        lambda cfg: cfg.precision.first_last_layers_bf16,
        "is for precision.first_last_layers_bf16=true",
        "remove it, or set precision.first_last_layers_bf16=true",
    ),
    Rule(
        "stage.max_tokens_per_micro_batch",
        _token_budget,
        "is for stage.batching=token_budget, this is {cfg.stage.batching.value}",
        "remove it, or set stage.batching=token_budget",
    ),
    Rule(
        "stage.label_smoothing",
        _loss(PreferenceLoss.cdpo, PreferenceLoss.robust_dpo),
        "is for stage.loss=cdpo and robust_dpo, this is {cfg.stage.loss.value}",
        "set it to 0, or choose one of them",
    ),
    Rule(
        "stage.simpo_gamma",
        _loss(PreferenceLoss.simpo),
        "is for stage.loss=simpo, this is {cfg.stage.loss.value}",
        "remove it, or set stage.loss=simpo",
    ),
    Rule(
        "stage.desirable_weight stage.undesirable_weight",
        _loss(PreferenceLoss.kto),
        "is for stage.loss=kto, this is {cfg.stage.loss.value}",
        "remove it, or set stage.loss=kto",
    ),
    Rule(
        "stage.sft_coeff stage.length_normalised",
        _loss(*(loss for loss in PreferenceLoss if loss is not PreferenceLoss.kto)),
        "is for losses of pairs, this is stage.loss=kto",
        "remove it, or choose another loss",
    ),
    Rule(
        "stage.center_rewards_coefficient",
        lambda cfg: not isinstance(cfg.stage, RewardConfig) or cfg.stage.loss is RewardLoss.bradley_terry,
        "is for pairs, this is stage.loss=plackett_luce",
        "set it to 0, or set stage.loss=bradley_terry",
    ),
    Rule(
        "stage.reference",
        _loss(*WITH_REFERENCE),
        "stage.loss={cfg.stage.loss.value} has no reference",
        "remove it, or choose a loss with one, such as stage.loss=dpo",
    ),
)


def unused_problems(cfg: RunConfig) -> list[str]:
    """Keys with another value than their default that this run does not read."""
    default = RunConfig(run_dir="", stage=type(cfg.stage)())
    return [
        f"{key}={_shown(_value(cfg, key))}: {rule.reason.format(cfg=cfg)}; {rule.remedy.format(stages=_stages(rule))}"
        for rule in RULES
        for key in rule.keys.split()
        if _value(cfg, key) != _value(default, key) and not rule.is_read(cfg)
    ]


def _stages(rule: Rule) -> str:
    """Those that read the rule's keys as they are by default."""
    names = [name for name, kind in STAGES.items() if rule.is_read(RunConfig(run_dir="", stage=kind()))]
    return "stage=" + " or ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _value(cfg: RunConfig, key: str) -> Any:
    """None for a key of another stage."""
    found: Any = cfg
    for name in key.split("."):
        found = getattr(found, name, None)
    return found


def _shown(value: Any) -> str:
    """As the command line has it."""
    if isinstance(value, Enum):
        return str(value.value)
    return str(value).lower() if isinstance(value, bool) else str(value)
