"""Whole sequences packed, padded or dealt out by tokens give what each of them alone gives.

Lengths, the share of tokens that count and weights all differ, so that any mean of means, any attention or label across
a boundary and any position that goes on over one would show.
"""

import numpy as np
import pytest
import torch
from support.parity import CP2, EP2, GPT2, MOE, PP2, SP, TP2, UNTIED, VPP2, relative
from support.sequences import Pieces

from scale_llm.data.prefixed import PrefixedSequences
from scale_llm.engine import counted
from scale_llm.engine.counted import COUNTED, only_counted

STEP = "support.sequences:step"

WAYS = {
    "packed": (1, {}, "packed", {}),
    "packed_two_rows_at_once": (1, {}, "packed", {"micro_batch_size": 2}),
    "packed_tp2": (2, TP2, "packed", {}),
    "packed_tp2_sp": (2, SP, "packed", {}),
    "packed_pp2": (2, PP2, "packed", {}),
    "packed_pp2_vpp2": (2, VPP2, "packed", {}),
    "packed_cp2": (2, CP2, "packed", {}),
    "packed_cp2_two_rows": (2, CP2, "packed", {"micro_batch_size": 2}),
    "packed_dp2": (2, {}, "packed", {}),
    "packed_recompute_full": (1, {"train.recompute_granularity": "full"}, "packed", {}),
    "packed_recompute_selective": (1, {"train.recompute_granularity": "selective"}, "packed", {}),
    "padded_by_four": (1, {}, "padded", {"micro_batch_size": 4}),
    "padded_dp2": (2, {}, "padded", {"micro_batch_size": 3}),
    "padded_pp2": (2, PP2, "padded", {"micro_batch_size": 2}),
    "padded_cp2": (2, CP2, "padded", {"micro_batch_size": 2}),
    "padded_tp2_sp": (2, SP, "padded", {"micro_batch_size": 2}),
    "budget": (1, {}, "token_budget", {}),
    "budget_of_100_dp2": (2, {}, "token_budget", {"budget": 100}),
    "budget_of_everything_dp4": (4, {}, "token_budget", {"budget": 400}),
    "budget_pp2_vpp2": (2, VPP2, "token_budget", {"budget": 100}),
    "budget_tp2_cp2": (4, {**SP, **CP2}, "token_budget", {"budget": 100}),
}


def assert_same(found: list[dict], alone: dict) -> None:
    assert relative(found[0]["loss"], alone["loss"]) < 1e-6
    assert relative(found[0]["grad_norm"], alone["grad_norm"]) < 1e-5
    for name, gradient in alone["gradient"].items():
        assert gradient.abs().max() > 0, name
        # 3e-7: weights are near 1, so that a difference of two of them is exact to about 1e-7
        worst = (found[0]["gradient"][name] - gradient).abs().max()
        assert worst < 1e-5 * gradient.abs().max() + 3e-7, (name, worst)


@pytest.mark.parametrize("way", WAYS)
def test_equals_one_by_one(ranks, way):
    alone = ranks(1, STEP, overrides={}, batching="padded")[0]
    assert len(alone["shapes"]) == 12, "each alone in its forward pass"
    world_size, overrides, batching, options = WAYS[way]
    found = ranks(world_size, STEP, timeout_seconds=300, overrides=overrides, batching=batching, unit=8, **options)
    assert_same(found, alone)
    places = sum(rows * tokens for rows, tokens in found[-1]["shapes"])
    places //= overrides.get("parallel.context_parallel_size", 1)
    if "parallel.sequence_parallel" in overrides:
        assert found[-1]["logits"] == places
    elif places > 8:  # about four tokens in ten count, of padding none; a rank may have one empty unit alone
        assert 0 < found[-1]["logits"] < 0.75 * places
        if "train.recompute_granularity" not in overrides:
            assert found[-1]["last_mlp"] == found[-1]["logits"]


def test_logits_are_made_for_the_places_that_count():
    """Two rows of six places, of which five count: one unit of eight, filled up with places whose mask is 0, all in the
    order of [s, b]. Where nearly all count, and without a mask, nothing is cut."""
    mask = torch.tensor([[0.0, 2.0, 1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]])
    batch = {"tokens": torch.arange(12).view(2, 6), "labels": torch.arange(12).view(2, 6), "loss_mask": mask}
    counted.UNIT, before = 8, counted.UNIT
    try:
        cut = only_counted(batch)
        places = cut[COUNTED]
        assert places.shape == (8,) and places.unique().numel() == 8
        assert places[:5].tolist() == [1, 2, 4, 7, 10]  # of [s, b]: (0, 1), (1, 0), (2, 0), (3, 1), (5, 0)
        assert cut["labels"].tolist()[0][:5] == [6, 1, 2, 9, 5] and cut["loss_mask"].shape == (1, 8)
        assert cut["loss_mask"][0].tolist() == [1.0, 2.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
        assert cut["tokens"] is batch["tokens"]
        assert only_counted({**batch, "loss_mask": torch.ones(2, 6)})["labels"] is batch["labels"]
        assert COUNTED in only_counted({**batch, "loss_mask": torch.zeros(2, 6)}), "an empty row has a loss too"
        assert COUNTED not in only_counted({"tokens": batch["tokens"], "labels": batch["labels"]})
    finally:
        counted.UNIT = before


MODELS = {
    "gpt2": (1, GPT2, {}),
    "gpt2_cp2": (2, GPT2, CP2),
    "untied_qk_norm": (1, UNTIED, {}),
    "window": (1, {"model.window_size": 7}, {}),
    "window_cp2": (2, {"model.window_size": 7}, CP2),
    "moe_ep2": (2, {**MOE, "model.moe_aux_loss_coeff": 0.0}, EP2),
}


@pytest.mark.parametrize("case", MODELS)
def test_packed_equals_one_by_one_for_other_models(ranks, case):
    world_size, model, layout = MODELS[case]
    alone = ranks(1, STEP, overrides=model, batching="padded")[0]
    assert_same(ranks(world_size, STEP, overrides={**model, **layout}, batching="packed"), alone)


PROMPT = {"peft.method": "prompt_tuning", "peft.num_virtual_tokens": 5}
VECTORS = "virtual_tokens.weight"


@pytest.mark.parametrize(
    "way", ["packed", "packed_tp2_sp", "packed_pp2_vpp2", "packed_cp2", "padded_by_four", "budget"]
)
def test_virtual_tokens_come_before_each_sequence(ranks, way):
    """Of a packed row, too: what they learn is what sequences one by one teach them."""
    alone = ranks(1, STEP, overrides=PROMPT, batching="padded")[0]
    world_size, overrides, batching, options = WAYS[way]
    found = ranks(world_size, STEP, overrides={**PROMPT, **overrides}, batching=batching, **options)
    for each in (alone, found[0]):
        assert [name for name, gradient in each["gradient"].items() if gradient.any()] == [VECTORS]
        each["gradient"] = {VECTORS: each["gradient"][VECTORS]}
    assert_same(found, alone)


def test_a_prefix_is_no_target():
    pieces = Pieces()
    prefixed = PrefixedSequences(pieces, np.array([90, 91]))
    assert prefixed.lengths.tolist() == [length + 2 for length in pieces.lengths]
    for number in (0, 3):
        piece, found = pieces[number], prefixed[number]
        assert found.tokens.tolist() == [90, 91, *piece.tokens]
        assert found.trained.tolist() == [False, False, *piece.trained]
        assert found.weight == piece.weight


def test_a_rank_without_a_sequence_takes_part(ranks):
    """Four ranks, two rows: the others run a forward and backward pass of nothing, which recomputation asks a gradient
    of, and join every collective."""
    recompute = {"train.recompute_granularity": "selective"}
    found = ranks(4, STEP, overrides=recompute, batching="token_budget", budget=400)
    assert {rank["shapes"][0][1] for rank in found} == {8, max(rank["shapes"][0][1] for rank in found)}


def test_a_context_parallel_rank_with_padding_alone_takes_part(ranks):
    """All sequences lie in the first quarter of the row, and the second of two ranks has its middle."""
    alone = ranks(1, STEP, overrides={}, batching="padded")[0]
    found = ranks(2, STEP, overrides={**CP2, "model.seq_length": 1600}, batching="packed")
    assert found[0]["shapes"] == [(1, 1600)]
    assert_same(found, alone)


@pytest.mark.slow
def test_packed_in_bf16(ranks):
    """By compiled kernels, which take a row of sequences as it is where the processor multiplies BF16: as close to one
    by one as BF16 is, which is far less than what a look at another sequence would change."""
    overrides = {"precision.bf16": True, "model.compile_ops": True}
    alone = ranks(1, STEP, overrides=overrides, batching="padded")[0]
    found = ranks(1, STEP, overrides=overrides, batching="packed", micro_batch_size=2)[0]
    assert relative(found["loss"], alone["loss"]) < 1e-3
    assert relative(found["grad_norm"], alone["grad_norm"]) < 3e-3
    for name, gradient in alone["gradient"].items():
        difference = found["gradient"][name] - gradient
        if "norm" in name:  # their weights are 1, so that a gradient, a difference of two, is of whole units in BF16
            assert difference.abs().max() <= 2**-7, name
        else:
            assert difference.norm() < 0.02 * gradient.norm(), name
