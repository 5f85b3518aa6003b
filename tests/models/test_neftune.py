"""Noise on embeddings: its size follows each sequence's own length, and nothing else changes."""

import torch

from scale_llm.models.neftune import add_noise


def test_size_of_the_noise():
    """Uniform within alpha / sqrt(L h), of mean square a third of its square (arXiv 2310.05914, algorithm 1)."""
    torch.manual_seed(0)
    embedded = torch.randn(200, 1, 64)
    lengths = torch.cat([torch.full((150,), 150.0), torch.full((50,), 50.0)])[:, None, None]
    noise = add_noise(embedded, lengths, 5.0) - embedded
    for part, length in ((noise[:150], 150), (noise[150:], 50)):
        bound = 5.0 / (length * 64) ** 0.5
        assert part.abs().max() <= bound + 1e-6 and part.abs().max() > 0.98 * bound
        assert abs(part.square().mean().item() / (bound**2 / 3) - 1) < 0.05


def test_one_length_and_low_precision():
    embedded = torch.randn(10, 2, 8).bfloat16()
    noisy = add_noise(embedded, 10, 1.0)
    assert noisy.dtype is torch.bfloat16 and not noisy.equal(embedded)
    assert add_noise(embedded, 10, 0.0).equal(embedded)
