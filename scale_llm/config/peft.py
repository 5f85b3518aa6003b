"""What is trained of a model: all of it, or a few weights beside it."""

from dataclasses import dataclass, field
from enum import Enum


class PeftMethod(Enum):
    none = "none"
    lora = "lora"
    dora = "dora"
    prompt_tuning = "prompt_tuning"


LOW_RANK = (PeftMethod.lora, PeftMethod.dora)
"""Methods that put matrices beside the layers' weights."""


class BaseQuantization(Enum):
    none = "none"
    nf4 = "nf4"


@dataclass(kw_only=True, slots=True)
class PeftConfig:
    method: PeftMethod = PeftMethod.none
    """lora: W + alpha/rank B A (Hu et al. 2021, arXiv 2106.09685); dora: the same with a length for every row (Liu et
    al. 2024, arXiv 2402.09353); prompt_tuning: learnt vectors before every sequence (Lester et al. 2021, arXiv
    2104.08691); none: all weights are trained."""
    rank: int = 16
    alpha: float = 32.0
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732)."""
    dropout: float = 0.0
    """Of what goes into A."""
    target_modules: list[str] = field(default_factory=lambda: ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"])
    """Megatron's modules, or parts of them by Hugging Face's names (q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj,
    down_proj). Each part has matrices of its own."""
    quantize_base: BaseQuantization = BaseQuantization.none
    """nf4: weights of target modules are kept in 4 bits and made whole one at a time (QLoRA; Dettmers et al. 2023,
    arXiv 2305.14314). Needs bitsandbytes."""
    num_virtual_tokens: int = 20
    """Vectors of prompt_tuning; they take places of model.seq_length."""
    prompt_init_text: str | None = None
    """Text whose embeddings they begin as; None: random rows of the embedding."""
