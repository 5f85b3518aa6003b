"""What contestants of several benchmarks share: the model's shape, the optimizer's settings, padded batches.

Everything that a peer needs of torch is imported late, so that a contestant chooses its threads first.
"""

import os
from pathlib import Path

LAYERS, HIDDEN, HEADS, GROUPS, FFN, VOCABULARY, SEQUENCE = 8, 512, 8, 4, 1408, 8192, 512
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPSILON, CLIP = 3e-4, 0.1, (0.9, 0.95), 1e-8, 1.0


def shape():
    """The shape as a group of our configuration."""
    from scale_llm.config.model import ModelConfig

    return ModelConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=HEADS,
        num_query_groups=GROUPS, kv_channels=HIDDEN // HEADS, seq_length=SEQUENCE, vocab_size=VOCABULARY,
        untie_embeddings_and_output_weights=True,
    )  # fmt: skip


def llama_config(longest: int):
    """The shape as transformers' configuration."""
    from transformers import LlamaConfig

    return LlamaConfig(
        num_hidden_layers=LAYERS, hidden_size=HIDDEN, intermediate_size=FFN, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, vocab_size=VOCABULARY, max_position_embeddings=longest,
        tie_word_embeddings=False, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip


def threads() -> int:
    """Has torch use as many as the environment says, and returns their number."""
    import torch

    count = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(count)
    return count


def alone() -> None:
    """A job of one rank, for code that expects one."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(20000 + os.getpid() % 20000))


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


def peak_gib() -> float:
    """Most memory that this process has held. Not getrusage's, which begins at what the parent held at the start."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
