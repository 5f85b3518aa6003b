"""Rotary frequencies for sequences longer than a model was first trained on."""

import math

import torch

from scale_llm.config.model import ModelConfig, RopeScaling


def stretched(frequencies: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """Angles per position [d/2], as model.rope_scaling says.

    linear: positions divided by the factor (Chen et al. 2023, arXiv 2306.15595). llama3: wavelengths above
    original / low_freq_factor divided, those below original / high_freq_factor kept, those between interpolated (the
    Llama 3.1 release).
    """
    factor = model.rope_scaling_factor
    if model.rope_scaling is RopeScaling.none:
        return frequencies
    if model.rope_scaling is RopeScaling.linear:
        return frequencies / factor
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    turns = model.rope_original_max_position_embeddings * frequencies / (2 * math.pi)  # over the original length
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies
