"""Which job a run does."""

from dataclasses import dataclass
from enum import Enum


class TrainOn(Enum):
    assistant = "assistant"
    last_assistant = "last_assistant"
    all = "all"


class Batching(Enum):
    packed = "packed"
    padded = "padded"
    token_budget = "token_budget"


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """Common base; each stage has its own dataclass with its own keys."""

    name: str = "pretrain"


@dataclass(kw_only=True, slots=True)
class PretrainConfig(StageConfig):
    """Next-token prediction on documents."""

    name: str = "pretrain"


@dataclass(kw_only=True, slots=True)
class SftConfig(StageConfig):
    """Supervised fine-tuning on conversations."""

    name: str = "sft"
    train_on: TrainOn = TrainOn.assistant
    """Tokens that the loss counts: every assistant turn, the last one alone, or everything."""
    batching: Batching = Batching.packed
    """packed: a sample is a row of model.seq_length tokens with as many whole conversations as fit; padded: a sample is
    a conversation, rows as long as the longest of their micro-batch; token_budget: a sample is a conversation, and each
    micro-batch one row of at most max_tokens_per_micro_batch tokens."""
    max_tokens_per_micro_batch: int | None = None
    """For token_budget; None: train.micro_batch_size * model.seq_length."""
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
class EvaluateConfig(StageConfig):
    """Loss, perplexity and bits per byte of a checkpoint."""

    name: str = "evaluate"
    split: str = "test"
    """train, validation or test."""
