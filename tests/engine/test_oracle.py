"""The single process agrees with a reference GPT of our own in plain PyTorch: see support/oracle.py."""

import pytest
import torch
from support import oracle
from support.batches import samples
from support.parity import GPT2, MOE, TOLERANCE, relative

MODELS = {
    "llama": ({}, oracle.Shape()),
    "gpt2": (GPT2, oracle.Shape(style="gpt2", groups=4)),
    "moe": (MOE, oracle.Shape(layers=2, experts=4, aux_loss_coeff=0.01)),
}


@pytest.mark.parametrize("model", MODELS)
def test_engine_equals_plain_pytorch(ranks, model):
    """20 steps: every loss and the first gradient norm within 1e-5 relative."""
    overrides, shape = MODELS[model]
    torch.set_num_threads(1)
    engine = ranks(1, "support.training:train", overrides=overrides, weights=True)[0]
    weights = oracle.from_engine(engine["before"], shape)
    assert sum(t.numel() for name, t in engine["before"].items()) == sum(t.numel() for t in weights.values()) + 6 * 64
    losses, norms = oracle.train(weights, shape, [samples(step) for step in range(20)], engine["learning_rate"])
    assert relative(engine["grad_norm"][0], norms[0]) < TOLERANCE
    worst = max(map(relative, engine["loss"], losses))
    assert worst < TOLERANCE, f"{worst:.1e}"
    assert losses[-1] < losses[0] - 0.1, "it must have learned something for the steps to matter"
