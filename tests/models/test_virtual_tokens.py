"""Prompt tuning's vectors begin as embeddings of real tokens: of any others it learns slowly or not at all (arXiv
2104.08691, section 3.2)."""

import pytest
import torch
from support.batches import VOCAB_SIZE
from support.parity import DISTRIBUTED, PP2, SP, TP2, VPP2

PROMPT = {"peft.method": "prompt_tuning", "peft.num_virtual_tokens": 5}
BF16 = {"precision.bf16": True}
LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, TP2),
    "tp2_sp": (2, SP),
    "pp2_vpp2": (2, VPP2),
    "pp2_untied": (2, {**PP2, "model.untie_embeddings_and_output_weights": True}),
    "bf16": (1, BF16),
    "bf16_dp2_distributed": (2, {**BF16, **DISTRIBUTED}),
}

FROM_BOTH_HALVES = [3, 127, 128, VOCAB_SIZE - 1, 0]
"""Of the 256 rows of the embedding two tensor-parallel ranks have 128 each."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_they_begin_as_rows_of_the_embedding(ranks, layout):
    """On every layout bit for bit; the optimiser's own copy too, or its first step would bring back what was there."""
    world_size, overrides = LAYOUTS[layout]
    begun, stepped = ranks(
        world_size, "support.adapters:begun", overrides={**PROMPT, **overrides}, prompt=FROM_BOTH_HALVES
    )[0]
    for model in (begun, stepped):
        wanted = model["embedding.word_embeddings.weight"][FROM_BOTH_HALVES]
        assert wanted.abs().max() > 0 and len(torch.unique(wanted, dim=0)) == 5
        assert model["virtual_tokens.weight"].equal(wanted)


@pytest.mark.parametrize(
    ("prompt", "rows"), [([7], [7, 7, 7, 7, 7]), ([3, 1], [3, 1, 3, 1, 3]), ([9, 8, 7, 6, 5, 4, 3], [9, 8, 7, 6, 5])]
)
def test_a_prompt_of_another_length_is_repeated_or_cut(ranks, prompt, rows):
    begun, _ = ranks(1, "support.adapters:begun", overrides=PROMPT, prompt=prompt)[0]
    assert begun["virtual_tokens.weight"].equal(begun["embedding.word_embeddings.weight"][rows])
