"""The model's shape. Field names are Megatron's."""

from dataclasses import dataclass
from enum import Enum


class Normalization(Enum):
    RMSNorm = "RMSNorm"
    LayerNorm = "LayerNorm"


class PositionEmbedding(Enum):
    rope = "rope"
    learned_absolute = "learned_absolute"


class Backend(Enum):
    auto = "auto"
    transformer_engine = "transformer_engine"
    torch = "torch"
    local = "local"


class Head(Enum):
    language_model = "language_model"
    reward = "reward"
    value = "value"


class RopeScaling(Enum):
    none = "none"
    linear = "linear"
    llama3 = "llama3"


class RouterBalancing(Enum):
    aux_loss = "aux_loss"
    seq_aux_loss = "seq_aux_loss"
    none = "none"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    name: str = "tiny"
    """Short name used in run names and log lines."""
    num_layers: int = 4
    hidden_size: int = 256
    ffn_hidden_size: int | None = None
    """None: 4 * hidden_size, or 8/3 of it rounded up to a multiple of 64 with swiglu."""
    num_attention_heads: int = 4
    num_query_groups: int | None = None
    """Key/value heads of grouped-query attention; None: one per attention head."""
    kv_channels: int | None = None
    """Size of one head; None: hidden_size / num_attention_heads."""
    seq_length: int = 512
    """Tokens per sample."""
    max_position_embeddings: int | None = None
    """Longest sequence of a learned position table; None: seq_length."""
    vocab_size: int | None = None
    """Tokens in the vocabulary before padding; None: the tokenizer's."""
    make_vocab_size_divisible_by: int = 128
    """The embedding has the next multiple of this times the tensor-parallel size rows."""
    normalization: Normalization = Normalization.RMSNorm
    norm_epsilon: float = 1e-5
    swiglu: bool = True
    """Gated MLP with SiLU; False: a plain MLP with GELU."""
    openai_gelu: bool = False
    """GELU by its tanh approximation, as GPT-2 has it."""
    position_embedding_type: PositionEmbedding = PositionEmbedding.rope
    rotary_base: int = 10000
    rotary_percent: float = 1.0
    rope_scaling: RopeScaling = RopeScaling.none
    """Stretched positions: linear, all angles are divided by the factor; llama3, those of low frequencies."""
    rope_scaling_factor: float = 8.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_position_embeddings: int = 8192
    """llama3: the sequence length before stretching."""
    window_size: int | None = None
    """Keys that a query sees, its own included (sliding-window attention); None: all before it."""
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    untie_embeddings_and_output_weights: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_method_std: float = 0.02
    num_experts: int | None = None
    """None: dense."""
    moe_router_topk: int = 2
    moe_ffn_hidden_size: int | None = None
    """Hidden size of one expert; None: ffn_hidden_size."""
    moe_router_pre_softmax: bool = False
    """Softmax over all experts, then the top k; False: the top k, then a softmax over their logits."""
    moe_aux_loss_coeff: float = 0.0
    moe_router_load_balancing_type: RouterBalancing = RouterBalancing.aux_loss
    head: Head = Head.language_model
    """reward: one number for each token, without a bias; value: one number, with a bias."""
    architecture: str | None = None
    """The Hugging Face class that exports are written as; None: the first that has this shape."""
    backend: Backend = Backend.auto
    """Layers: Transformer Engine's, torch's fused kernels, or megatron-core's own local spec.
    auto: Transformer Engine on a GPU where it is installed, torch elsewhere."""
    compile_ops: bool | None = None
    """torch.compile for the element-wise passes of the torch backend (norms, SwiGLU, RoPE, softmax), and C++ of ours
    for those and attention in BF16 on processors that multiply BF16: seconds at the first start of a shape, then a
    third faster, or twice as fast with AMX. None: yes where this machine has the compiler for it."""
