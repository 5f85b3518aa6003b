"""Noise on embeddings while a model is fine-tuned (NEFTune; Jain et al. 2023, arXiv 2310.05914, algorithm 1)."""

import torch


def add_noise(embedded: torch.Tensor, lengths: torch.Tensor | int, alpha: float) -> torch.Tensor:
    """embedded [s, b, h] + uniform(-1, 1) * alpha / sqrt(L h), L the length of the sequence that a place belongs to:
    one number, or [s, 1, 1]."""
    noise = torch.rand_like(embedded, dtype=torch.float32) * 2 - 1
    lengths = torch.as_tensor(lengths, dtype=torch.float32, device=embedded.device)
    return embedded + (noise * alpha / (lengths * embedded.size(-1)).sqrt()).to(embedded.dtype)
