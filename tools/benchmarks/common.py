"""What contestants of several benchmarks share: the model's shape, the optimizer's settings, padded batches.

Everything that a peer needs of torch is imported late, so that a contestant chooses its threads first.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LAYERS, HIDDEN, HEADS, GROUPS, FFN, VOCABULARY, SEQUENCE = 8, 512, 8, 4, 1408, 8192, 512
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPSILON, CLIP = 3e-4, 0.1, (0.9, 0.95), 1e-8, 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A Llama and the micro-batch that it is measured with."""

    layers: int = LAYERS
    hidden: int = HIDDEN
    heads: int = HEADS
    groups: int = GROUPS
    ffn: int = FFN
    vocabulary: int = VOCABULARY
    sequence: int = SEQUENCE
    batch: int = 4
    tied: bool = False

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequence * self.batch


SIZES = {
    "small": Size(),
    "tiny": Size(layers=2, hidden=64, heads=4, groups=2, ffn=128, vocabulary=256, sequence=64, batch=1),
    "1b": Size(layers=16, hidden=2048, heads=32, groups=8, ffn=8192, vocabulary=128256, sequence=8192, batch=1,
               tied=True),
    "8b_4_layers": Size(layers=4, hidden=4096, heads=32, groups=8, ffn=14336, vocabulary=128256, sequence=8192,
                        batch=1),
}  # fmt: skip
"""small: what the benchmarks on a CPU have. 1b: Llama 3.2 1B. 8b_4_layers: 4 of the 32 layers of Llama 3 8B."""


def shape(size: str = "small"):
    """The shape as a group of our configuration."""
    from scale_llm.config.model import ModelConfig

    s = SIZES[size]
    return ModelConfig(
        num_layers=s.layers, hidden_size=s.hidden, ffn_hidden_size=s.ffn, num_attention_heads=s.heads,
        num_query_groups=s.groups, kv_channels=s.hidden // s.heads, seq_length=s.sequence, vocab_size=s.vocabulary,
        untie_embeddings_and_output_weights=not s.tied,
    )  # fmt: skip


def llama_config(longest: int, size: str = "small"):
    """The shape as transformers' configuration."""
    from transformers import LlamaConfig

    s = SIZES[size]
    return LlamaConfig(
        num_hidden_layers=s.layers, hidden_size=s.hidden, intermediate_size=s.ffn, num_attention_heads=s.heads,
        num_key_value_heads=s.groups, vocab_size=s.vocabulary, max_position_embeddings=longest,
        tie_word_embeddings=s.tied, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip


def precision_named(name: str):
    """The option of our group `precision`, as a run composes it.

    Raises:
        UserError: there is no such option.
    """
    from scale_llm.config.compose import compose

    return compose(["stage=pretrain", f"precision={name}"]).precision


@contextmanager
def quick_weights() -> Iterator[None]:
    """Engines made meanwhile draw their weights on the device: by name, on the host, a billion take a minute."""
    import torch

    from scale_llm.models import gpt

    def draw(chunks, config, mesh, *, seed: int) -> None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
                parameter.normal_(std=config.init_method_std) if parameter.dim() > 1 else parameter.fill_(1.0)

    before, gpt.initialise = gpt.initialise, draw
    try:
        yield
    finally:
        gpt.initialise = before


def threads() -> int:
    """Has torch use as many as the environment says, and returns their number."""
    import torch

    count = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(count)
    return count


def alone() -> None:
    """A job of one rank, for code that expects one."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(20000 + os.getpid() % 20000)  # of its own: contestants run side by side


def set_optimizer(cfg, learning_rate: float = LEARNING_RATE) -> None:
    """The settings of `adamw` and `update` in our configuration, in place."""
    optim = cfg.optim
    optim.lr, optim.weight_decay, optim.clip_grad = learning_rate, WEIGHT_DECAY, CLIP
    optim.adam_beta1, optim.adam_beta2, optim.adam_eps = *BETAS, EPSILON


def adamw(weights: list, learning_rate: float = LEARNING_RATE):
    """torch's fused AdamW, as transformers' Trainer takes it."""
    import torch

    return torch.optim.AdamW(
        weights, lr=learning_rate, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY, fused=True
    )  # fmt: skip


def update(optimizer, weights: list) -> float:
    """Clips the gradients, applies them, lets them go; returns their norm before."""
    import torch

    norm = torch.nn.utils.clip_grad_norm_(weights, CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


def padded(examples: list):
    """Tokens, attention mask and labels [b, s] as transformers takes them: -100 where the loss counts nothing."""
    import torch

    width = max(len(example.tokens) for example in examples)
    tokens, mask = torch.zeros(len(examples), width, dtype=torch.int64), torch.zeros(len(examples), width)
    labels = torch.full((len(examples), width), -100)
    for row, example in enumerate(examples):
        ids, trained = torch.from_numpy(example.tokens), torch.from_numpy(example.trained)
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, 1
        labels[row, : len(ids)][trained] = ids[trained]
    return tokens, mask, labels


def uses_gpu() -> bool:
    """Whether this process has computed on one."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def peak_gib() -> float:
    """Most memory that this process has held: tensors on the GPU where it computes there. Not getrusage's, which begins
    at what the parent held at the start."""
    if uses_gpu():
        return sys.modules["torch"].cuda.max_memory_allocated() / 2**30
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
