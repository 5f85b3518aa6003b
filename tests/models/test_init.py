"""Initial weights depend on the seed and on global names alone."""

import math

import pytest
import torch
from support.parity import EP2, GPT2, MOE, PP2, SP, TP2, UNTIED, VPP2

WEIGHTS = "support.training:initial_weights"

LAYOUTS = {
    "tp2": (2, UNTIED, TP2),
    "pp2": (2, {}, PP2),
    "pp2_vpp2": (2, {}, VPP2),
    "tp2_pp2": (4, UNTIED, {**TP2, **PP2}),
    "gpt2_tp2": (2, GPT2, TP2),
    "moe_ep2": (2, MOE, EP2),
    "moe_tp2_ep2": (4, MOE, {**SP, **EP2}),
    "moe_etp1": (2, MOE, {**SP, "parallel.expert_tensor_parallel_size": 1, **EP2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_do_not_depend_on_the_layout(ranks, layout):
    """Put together from the shards, they equal the single process's bit for bit."""
    world_size, model, parallel = LAYOUTS[layout]
    single = ranks(1, WEIGHTS, overrides=model)[0]
    # the padding of the vocabulary follows the tensor-parallel size; 64 rows for each rank fit 250 tokens alike
    whole = ranks(world_size, WEIGHTS, overrides={**model, **parallel})[0]
    assert whole.keys() == single.keys()
    for name, weight in single.items():
        assert torch.equal(whole[name], weight), name


def test_mean_and_deviation(ranks):
    """Megatron's rule: normal with init_method_std, over sqrt(2 layers) where a projection writes to the
    residual stream.

    Bounds: 5 standard errors of the mean and of the deviation of n normals, s / sqrt(n) and s / sqrt(2 n).
    """
    whole = ranks(1, WEIGHTS, overrides={**UNTIED, "model.init_method_std": 0.05})[0]
    assert len(whole) == 12
    for name, weight in whole.items():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in name:
            assert (weight == 1).all(), name
        else:
            std = 0.05 / math.sqrt(2 * 4) if "linear_proj" in name or "linear_fc2" in name else 0.05
            n = weight.numel()
            assert abs(weight.mean()) < 5 * std / math.sqrt(n), name
            assert abs(weight.std() - std) < 5 * std / math.sqrt(2 * n), name


def test_parameters_and_layers_differ_from_each_other(ranks):
    """Equal values in two tensors, layers or experts would mean that a name is not part of the seed."""
    whole = ranks(1, WEIGHTS, overrides=MOE)[0]
    firsts = []
    for name, weight in whole.items():
        if "norm" not in name:
            leading = 2 if ".experts." in name else 1 if "layers" in name else 0
            firsts += [float(part.flatten()[0]) for part in (weight.flatten(0, leading - 1) if leading else [weight])]
    assert len(firsts) == len(set(firsts)) >= 22


def test_seed_changes_the_weights(ranks):
    one, two = (ranks(1, WEIGHTS, overrides={"train.seed": seed})[0] for seed in (1, 2))
    name = "embedding.word_embeddings.weight"
    assert not torch.equal(one[name], two[name])
    assert abs(torch.corrcoef(torch.stack([one[name].flatten(), two[name].flatten()]))[0, 1]) < 5 / math.sqrt(250 * 64)


def test_padding_of_the_vocabulary_leaves_the_rows_the_same(ranks):
    name = "embedding.word_embeddings.weight"
    narrow = ranks(1, WEIGHTS, overrides={})[0][name]
    wide = ranks(1, WEIGHTS, overrides={"model.make_vocab_size_divisible_by": 512})[0][name]
    assert narrow.shape == (256, 64) and wide.shape == (512, 64)
    assert torch.equal(narrow[:250], wide[:250])
