"""Sums over the tokens of each sequence, whole and cut over context-parallel ranks."""

import pytest
import torch
from support.losses import packed_answers

from scale_llm.losses.sequences import masked_sum, segment_sums, spread


def test_sums_and_counts_against_a_loop():
    values, mask, segments = packed_answers()
    sums, counts = segment_sums(values, mask, segments, 5)
    for n in range(5):
        kept = [i for i in range(16) if segments[i, 0] == n and mask[i, 0]]
        assert sums[n].item() == pytest.approx(sum(values[i, 0].item() for i in kept))
        assert counts[n] == len(kept)
    assert sums[4] == 0 and counts[4] == 0  # a segment without tokens
    assert sums.dtype == torch.float64 and not counts.requires_grad


def test_gradient():
    values, mask, segments = packed_answers()
    assert torch.autograd.gradcheck(lambda x: segment_sums(x, mask, segments, 4)[0].square(), values.requires_grad_())


def test_what_lies_under_the_mask_may_be_nan():
    values, mask, segments = packed_answers()
    wanted = segment_sums(values, mask, segments, 4)[0]
    values[(mask == 0) | (segments < 0)] = torch.nan
    values.requires_grad_()
    sums, _ = segment_sums(values, mask, segments, 4)
    assert torch.equal(sums, wanted)
    sums.sum().backward()
    assert torch.equal(values.grad, ((mask == 1) & (segments >= 0)).double())


def test_bf16_values_are_summed_in_fp32():
    ones = torch.ones(1000, 1, dtype=torch.bfloat16)
    sums, counts = segment_sums(ones, ones, torch.zeros(1000, 1, dtype=torch.long), 1)
    assert sums.dtype == torch.float32 and sums.item() == 1000 and counts.item() == 1000


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_context_parallel(ranks, world_size):
    """Each rank has all the losses, and of the gradient the part of its tokens, though no pair lies on one rank.

    With L = sum_n f(sum_r s_rn), dL/ds_r = f'(sum): the whole sum's gradient, which all-reducing it again would
    multiply by the number of ranks.
    """
    results = ranks(world_size, "support.losses:context_parallel_preference")
    for result in results:
        assert result["value_error"] < 1e-12 and result["gradient_error"] < 1e-12
        assert result["counts"] == result["wanted_counts"]
    assert sum(result["tokens_here"] for result in results) == 10  # one of them in no segment


def test_a_rank_without_tokens_joins_the_backward():
    values = torch.zeros(0, 1, requires_grad=True)
    sums, counts = segment_sums(values, torch.zeros(0, 1), torch.zeros(0, 1, dtype=torch.long), 3)
    sums.sum().backward()
    assert sums.tolist() == [0, 0, 0] and counts.tolist() == [0, 0, 0] and values.grad.shape == (0, 1)


def test_spread_gives_tokens_their_sequences_value():
    segments = torch.tensor([[0, 0, 1], [2, -1, -1]])
    values = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    assert spread(values, segments).tolist() == [[1, 1, 2], [3, 0, 0]]
    assert torch.autograd.gradcheck(lambda x: spread(x, segments), values)


def test_masked_sum():
    total, count = masked_sum(torch.tensor([1.0, torch.inf, 3.0]), torch.tensor([1, 0, 1]))
    assert total == 4 and count == 2
