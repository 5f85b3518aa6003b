"""The estimate of activations against what autograd holds."""

import pytest
from support.batches import SEQ_LENGTH, VOCAB_SIZE
from support.training import config

from scale_llm.config.activations import layer_activations
from scale_llm.config.parameters import padded_vocab_size

TP2 = "parallel.tensor_model_parallel_size"


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, {}),
        (1, {"precision.bf16": True, "model.swiglu": False, "model.qk_layernorm": True}),
        (1, {"train.recompute_granularity": "full"}),
        (1, {"model.num_experts": 4, "model.moe_ffn_hidden_size": 64}),
        (2, {TP2: 2, "parallel.sequence_parallel": True}),
    ],
)
def test_within_three_percent(ranks, world, overrides):
    """All layers, the last norm's input and output, and logits. What is not in the estimate: labels, rotary tables,
    norms' factors, the router's small tables."""
    overrides = {**overrides, "train.micro_batch_size": 4}
    cfg = config(overrides)
    cfg.model.vocab_size = VOCAB_SIZE
    tokens, width = 4 * SEQ_LENGTH, 2 if cfg.precision.bf16 else 4
    layer = layer_activations(cfg.model, cfg.parallel, tokens=tokens, number_bytes=width)
    recomputed = "train.recompute_granularity" in overrides
    head = (2 * cfg.model.hidden_size + padded_vocab_size(cfg.model, world)) // world * tokens * width
    expected = cfg.model.num_layers * (layer.input if recomputed else layer.total) + head
    for kept in ranks(world, "support.saved:kept_bytes", overrides=overrides):
        assert 1 <= kept / expected < 1.03
