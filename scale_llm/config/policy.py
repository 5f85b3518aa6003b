"""Stages in which a policy learns from rewards for what it says itself: stage=ppo and stage=grpo.

A sample is a prompt: train.global_batch_size prompts are answered in an iteration.
"""

from dataclasses import dataclass, field
from enum import Enum

from scale_llm.config.stage import StageConfig


class AdvEstimator(Enum):
    gae = "gae"
    grpo = "grpo"
    rloo = "rloo"
    reinforce_plus_plus = "reinforce_plus_plus"
    reinforce_plus_plus_baseline = "reinforce_plus_plus_baseline"


GROUPED = (AdvEstimator.grpo, AdvEstimator.rloo, AdvEstimator.reinforce_plus_plus_baseline)
"""Estimators that compare the answers to one prompt with each other."""


class PolicyLoss(Enum):
    clip = "clip"
    gspo = "gspo"


class LossAggregation(Enum):
    token_mean = "token_mean"
    seq_mean_token_mean = "seq_mean_token_mean"
    seq_mean_token_sum_norm = "seq_mean_token_sum_norm"


class KlLossType(Enum):
    k2 = "k2"
    k3 = "k3"


class KlCtrlType(Enum):
    fixed = "fixed"
    adaptive = "adaptive"


class GuardAction(Enum):
    warn = "warn"
    lower_lr = "lower_lr"
    stop = "stop"


@dataclass(kw_only=True, slots=True)
class KlCtrlConfig:
    """How kl_coef changes."""

    type: KlCtrlType = KlCtrlType.fixed
    """adaptive: it follows target_kl (Ziegler et al. 2019, arXiv 1909.08593, section 2.2)."""
    target_kl: float = 6.0
    """KL of an answer that is aimed at, in nats, summed over its tokens."""
    horizon: float = 10_000.0
    """Answers after which a KL that is a fifth or more off has changed kl_coef by about a fifth."""


@dataclass(kw_only=True, slots=True)
class GuardConfig:
    """Signs that a reward is being gamed; a limit that is null is not watched."""

    action: GuardAction = GuardAction.warn
    """warn: a line in the log; lower_lr: that, and the actor's learning rate is halved whenever a limit is crossed;
    stop: save and end with an error."""
    max_kl: float | None = None
    """Mean KL to the reference, nats a token."""
    min_entropy: float | None = None
    """Mean entropy of the policy, nats a token."""
    max_response_tokens: float | None = None
    """Mean tokens of an answer."""


def limits_of(guard: GuardConfig) -> list[float | None]:
    """Those that a guard has, null or not."""
    return [guard.max_kl, guard.min_entropy, guard.max_response_tokens]


@dataclass(kw_only=True, slots=True)
class PolicyStageConfig(StageConfig):
    """What PPO and GRPO share: rollout, rewards, the policy's loss."""

    num_generations_per_prompt: int = 1
    """Answers to every prompt."""
    temperature: float = 1.0
    """Logits are divided by it, in sampling and in training."""
    validation_temperature: float = 0.0
    """The same for answers to prompts that are held out (verl: val_kwargs.temperature); 0: the likeliest answer."""
    top_k: int = 0
    """Of so many likeliest tokens only; 0: of all. Of fewer than all (top_p alike), what is sampled is another
    distribution than the one whose log-probabilities are trained."""
    top_p: float = 1.0
    """Of the fewest likeliest tokens whose probabilities reach this sum."""
    max_new_tokens: int = 256
    stop_strings: list[str] = field(default_factory=list)
    """Texts that end an answer, beside the ends of text and turn."""
    generation_batch_size: int = 32
    """Answers at once on each replica of the rollout's model."""

    adv_estimator: AdvEstimator = AdvEstimator.gae
    """gae (with a critic; Schulman et al. 2016), grpo (Shao et al. 2024), rloo (Ahmadian et al. 2024),
    reinforce_plus_plus (Hu 2025), and the same after the mean of a prompt's answers (reinforce_plus_plus_baseline)."""
    gamma: float = 1.0
    lam: float = 0.95
    """Of gae."""
    norm_adv_by_std_in_grpo: bool = True
    """Divide by the standard deviation of a prompt's rewards; false: Dr. GRPO (Liu et al. 2025)."""
    whiten_advantages: bool = True
    """Advantages of gae to mean 0 and variance 1 over the tokens of the whole batch."""

    policy_loss: PolicyLoss = PolicyLoss.clip
    """clip: ratios of tokens (Schulman et al. 2017); gspo: of whole answers (Zheng et al. 2025)."""
    clip_ratio: float = 0.2
    clip_ratio_high: float | None = None
    """Upper side (DAPO's clip-higher, Yu et al. 2025); null: clip_ratio."""
    clip_ratio_c: float | None = None
    """Dual clip (Ye et al. 2020): with a negative advantage, ratios above it give no gradient. null: none."""
    loss_agg_mode: LossAggregation = LossAggregation.token_mean
    """token_mean: every token of the batch weighs the same; seq_mean_token_mean: every answer does;
    seq_mean_token_sum_norm: sums of answers over max_new_tokens (Dr. GRPO)."""
    entropy_coeff: float = 0.0

    kl_coef: float = 0.0
    """Weight of the KL to the reference (k1) that is taken from every token's reward."""
    kl_ctrl: KlCtrlConfig = field(default_factory=KlCtrlConfig)
    kl_loss_coef: float = 0.0
    """Weight of the KL to the reference in the loss."""
    kl_loss_type: KlLossType = KlLossType.k3

    ppo_epochs: int = 1
    """Times that the answers of an iteration are gone through."""
    ppo_mini_batch_size: int | None = None
    """Prompts in one optimizer step; null: train.global_batch_size."""
    max_tokens_per_micro_batch: int | None = None
    """Places of a row of answers; null: train.micro_batch_size * model.seq_length."""

    filter_groups: bool = False
    """DAPO's dynamic sampling: prompts whose answers all have the same reward are replaced by new ones."""
    max_num_gen_batches: int = 10
    """Batches of prompts that an iteration draws at most to fill up."""
    overlong_buffer_tokens: int = 0
    """DAPO's soft punishment (eq. 13): the reward falls over so many tokens before max_new_tokens; 0: none."""
    overlong_penalty_factor: float = 1.0
    """By how much at max_new_tokens."""
    tis_imp_ratio_cap: float | None = None
    """Truncated importance sampling (Yao et al. 2025): tokens weigh min(p of training / p of sampling, cap); null: the
    mismatch of the two is measured only."""

    reference_load: str | None = None
    """Checkpoint that the KL is measured against; null: checkpoint.load, where the policy starts."""
    num_samples: int = 4
    """Transcripts of every logged iteration in TensorBoard; run_dir/transcripts.jsonl has as many. 0: none."""
    guard: GuardConfig = field(default_factory=GuardConfig)

    @property
    def needs_reference(self) -> bool:
        """Whether anything is measured against it."""
        adaptive = self.kl_ctrl.type is KlCtrlType.adaptive
        return bool(self.kl_coef or self.kl_loss_coef or adaptive or self.guard.max_kl is not None)


@dataclass(kw_only=True, slots=True)
class PpoConfig(PolicyStageConfig):
    """Proximal policy optimisation (Schulman et al. 2017) with a critic."""

    name: str = "ppo"
    kl_coef: float = 0.05
    clip_ratio_c: float | None = 3.0
    critic_load: str | None = None
    """Checkpoint that the critic starts from; null: reward.load, or checkpoint.load. Its model may be another one."""
    critic_lr: float | None = None
    """null: optim.lr."""
    critic_warmup: int = 0
    """Iterations in which the critic learns alone."""
    cliprange_value: float = 0.2
    """How far a value may move from the old one within an iteration before its loss gives no gradient."""


@dataclass(kw_only=True, slots=True)
class GrpoConfig(PolicyStageConfig):
    """Group-relative policy optimisation (Shao et al. 2024) and its kin, without a critic."""

    name: str = "grpo"
    num_generations_per_prompt: int = 8
    adv_estimator: AdvEstimator = AdvEstimator.grpo
    kl_loss_coef: float = 0.001
