"""Optimizer and learning-rate schedule. Field names are Megatron's."""

from dataclasses import dataclass
from enum import Enum


class Optimizer(Enum):
    adamw = "adamw"
    adam = "adam"
    sgd = "sgd"


class DecayStyle(Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    inverse_square_root = "inverse-square-root"
    wsd = "WSD"


class WsdDecayStyle(Enum):
    exponential = "exponential"
    linear = "linear"
    cosine = "cosine"
    minus_sqrt = "minus_sqrt"


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    optimizer: Optimizer = Optimizer.adamw
    lr: float = 3e-4
    """Highest learning rate."""
    min_lr: float = 0.0
    lr_decay_style: DecayStyle = DecayStyle.cosine
    lr_decay_iters: int | None = None
    """Iterations over which the learning rate decays; None: the whole run."""
    lr_decay_samples: int | None = None
    lr_wsd_decay_style: WsdDecayStyle = WsdDecayStyle.linear
    lr_wsd_decay_iters: int | None = None
    """Length of the last phase of WSD (warm-up, stable, decay); None: a tenth of the run."""
    lr_wsd_decay_samples: int | None = None
    lr_warmup_iters: int = 0
    lr_warmup_samples: int = 0
    lr_warmup_fraction: float | None = None
    """Share of the decay length spent warming up. At most one of the three warm-up keys."""
    lr_warmup_init: float = 0.0
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    sgd_momentum: float = 0.9
    clip_grad: float = 1.0
    """Gradient norm above which gradients are scaled down; 0: no clipping."""
