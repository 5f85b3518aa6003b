"""Which job a run does."""

from dataclasses import dataclass, field
from enum import Enum


class TrainOn(Enum):
    assistant = "assistant"
    last_assistant = "last_assistant"
    all = "all"


class Batching(Enum):
    packed = "packed"
    padded = "padded"
    token_budget = "token_budget"


class PreferenceLoss(Enum):
    dpo = "dpo"
    cdpo = "cdpo"
    robust_dpo = "robust_dpo"
    ipo = "ipo"
    hinge = "hinge"
    simpo = "simpo"
    orpo = "orpo"
    kto = "kto"


REFERENCE_FREE = (PreferenceLoss.simpo, PreferenceLoss.orpo)
"""Losses that measure the policy against nothing."""


class ReferenceModel(Enum):
    cached = "cached"
    copy = "copy"
    base = "base"


class RewardLoss(Enum):
    bradley_terry = "bradley_terry"
    plackett_luce = "plackett_luce"


class Score(Enum):
    last_token = "last_token"
    mean_of_tokens = "mean_of_tokens"


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """Common base; each stage has its own dataclass with its own keys."""

    name: str = "pretrain"


@dataclass(kw_only=True, slots=True)
class PretrainConfig(StageConfig):
    """Next-token prediction on documents."""

    name: str = "pretrain"


@dataclass(kw_only=True, slots=True)
class SequenceStageConfig(StageConfig):
    """Common base of stages that train on whole sequences."""

    batching: Batching = Batching.packed
    """packed: a sample is a row of model.seq_length tokens (twice that for pairs) with as many whole conversations as
    fit; padded: a sample is a conversation, rows as long as the longest of their micro-batch; token_budget: a sample is
    a conversation, and each micro-batch one row of at most max_tokens_per_micro_batch tokens."""
    max_tokens_per_micro_batch: int | None = None
    """For token_budget; None: train.micro_batch_size packed rows."""


@dataclass(kw_only=True, slots=True)
class SftConfig(SequenceStageConfig):
    """Supervised fine-tuning on conversations."""

    name: str = "sft"
    train_on: TrainOn = TrainOn.assistant
    """Tokens that the loss counts: every assistant turn, the last one alone, or everything."""
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread over the vocabulary (Szegedy et al. 2015, arXiv 1512.00567)."""
    neftune_noise_alpha: float = 0.0
    """Uniform noise on embeddings while training, of alpha / sqrt(tokens * hidden_size) (Jain et al. 2023, arXiv
    2310.05914); 0: none."""
    num_samples: int = 4
    """Validation prompts that the model answers before and after training; 0: none."""
    max_new_tokens: int = 64
    """Longest answer of such a sample."""


@dataclass(kw_only=True, slots=True)
class RewardConfig(SequenceStageConfig):
    """A reward model from answers in order of preference."""

    name: str = "reward"
    loss: RewardLoss = RewardLoss.bradley_terry
    """bradley_terry: of pairs, and of the best and the worst of longer lists; plackett_luce: of whole lists."""
    score: Score = Score.last_token
    """An answer's reward: the head's number at its last token (model.head=reward); or the mean of those of all its
    tokens, so that each has a reward of its own (model.head=value)."""
    center_rewards_coefficient: float = 0.0
    """Weight of the square of a pair's sum of rewards, which keeps their mean near 0 (Eisenstein et al. 2023, arXiv
    2312.09244)."""


@dataclass(kw_only=True, slots=True)
class DpoConfig(SequenceStageConfig):
    """Direct preference optimisation, on pairs of answers or (kto) on single ones."""

    name: str = "dpo"
    loss: PreferenceLoss = PreferenceLoss.dpo
    """dpo (Rafailov et al. 2023), cdpo and robust_dpo (with label_smoothing), ipo, hinge (SLiC), simpo and orpo (which
    need no reference), kto (single answers that are desirable or not: data.fields.label)."""
    beta: float = 0.1
    label_smoothing: float = 0.0
    """Share of pairs whose answers are the wrong way round, for cdpo and robust_dpo."""
    simpo_gamma: float = 1.0
    """simpo's target margin."""
    desirable_weight: float = 1.0
    """kto's weight of desirable answers."""
    undesirable_weight: float = 1.0
    """kto's weight of undesirable ones; so that the sums of weights of both kinds are alike."""
    sft_coeff: float = 0.0
    """Weight of the chosen answer's mean negative log-likelihood beside the loss."""
    length_normalised: bool = False
    """Log-probabilities as means over an answer's tokens in place of sums; ipo, simpo and orpo always take means."""
    reference: ReferenceModel = ReferenceModel.cached
    """cached: its log-probabilities computed once, before training, and kept in run_dir/reference; copy: a frozen model
    beside the policy, with the same bits; base: the policy without its adapters (peft=lora, dora or qlora), which needs
    no memory."""
    reference_load: str | None = None
    """Checkpoint that the reference is; None: checkpoint.load, where the policy starts."""


@dataclass(kw_only=True, slots=True)
class UntrainedStageConfig(StageConfig):
    """Common base of stages that train nothing and write no checkpoint."""


@dataclass(kw_only=True, slots=True)
class ScoreConfig(UntrainedStageConfig):
    """Rewards of the answers in data.path by a reward model (checkpoint.load), to run_dir/scores.jsonl."""

    name: str = "score"


@dataclass(kw_only=True, slots=True)
class GenerateConfig(UntrainedStageConfig):
    """Answers of a model (checkpoint.load) to the prompts in data.path, to run_dir/generations.jsonl."""

    name: str = "generate"
    temperature: float = 1.0
    """Logits are divided by it; 0: the likeliest token always."""
    top_k: int = 0
    """Of so many likeliest tokens only; 0: of all."""
    top_p: float = 1.0
    """Of the fewest likeliest tokens whose probabilities reach this sum."""
    max_new_tokens: int = 256
    stop_strings: list[str] = field(default_factory=list)
    """Texts that end an answer, beside the ends of text and turn."""
    num_generations_per_prompt: int = 1
    batch_size: int = 32
    """Answers at once on each replica of the model."""


@dataclass(kw_only=True, slots=True)
class EvaluateConfig(UntrainedStageConfig):
    """Loss, perplexity and bits per byte of a checkpoint."""

    name: str = "evaluate"
    split: str = "test"
    """train, validation or test."""


def answers_in_a_row(stage: StageConfig) -> int:
    """Longest answers that the rows of a stage must hold: those of a pair lie in one."""
    paired = isinstance(stage, RewardConfig) or (isinstance(stage, DpoConfig) and stage.loss is not PreferenceLoss.kto)
    return 2 if paired else 1
