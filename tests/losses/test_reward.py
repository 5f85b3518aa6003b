"""Losses of reward models against their formulas."""

import itertools
import math

import pytest
import torch

from scale_llm.losses.reward import bradley_terry, plackett_luce, ranking_accuracy, reward_metrics


def scores(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def test_bradley_terry_with_margin_and_centring():
    chosen, rejected = scores(2, 5)
    margin = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.5], dtype=torch.float64)
    wanted = [
        -math.log(1 / (1 + math.exp(-(c - r - m)))) + 0.01 * (c + r) ** 2
        for c, r, m in zip(chosen.tolist(), rejected.tolist(), margin.tolist(), strict=True)
    ]
    assert bradley_terry(chosen, rejected, margin=margin, centring=0.01).tolist() == pytest.approx(wanted, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda c, r: bradley_terry(c, r, margin=margin, centring=0.01),
        (chosen.requires_grad_(), rejected.requires_grad_()),
    )


def test_plackett_luce_of_two_is_bradley_terry():
    pairs = scores(6, 2)
    torch.testing.assert_close(plackett_luce(pairs), bradley_terry(pairs[:, 0], pairs[:, 1]))


def test_plackett_luce_is_a_distribution_over_rankings():
    row = scores(4)
    rankings = torch.stack([row[list(order)] for order in itertools.permutations(range(4))])
    assert (-plackett_luce(rankings)).exp().sum().item() == pytest.approx(1.0)


def test_plackett_luce_of_lists_that_end_early():
    """What is behind the end has no say and no gradient, and an empty list costs nothing."""
    rows = scores(3, 4)
    valid = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    rows[valid == 0] = torch.nan
    found = plackett_luce(rows.requires_grad_(), valid)
    for n, k in enumerate((3, 2)):
        torch.testing.assert_close(found[n], plackett_luce(rows[n : n + 1, :k])[0])
    assert found[2] == 0
    (gradient,) = torch.autograd.grad(found.sum(), rows)
    assert gradient.isfinite().all() and gradient[valid == 0].eq(0).all()


def test_plackett_luce_gradient():
    valid = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    assert torch.autograd.gradcheck(lambda x: plackett_luce(x, valid), scores(2, 4).requires_grad_())


def test_metrics_are_sums_and_counts():
    chosen, rejected = torch.tensor([2.0, 1.0, 5.0]), torch.tensor([1.0, 1.0, 9.0])
    metrics = reward_metrics(chosen, rejected, torch.tensor([1, 1, 0]))
    assert {name: (s.item(), n.item()) for name, (s, n) in metrics.items()} == {
        "rewards/chosen": (3.0, 2.0),
        "rewards/rejected": (2.0, 2.0),
        "rewards/accuracies": (1.0, 2.0),
        "rewards/margins": (1.0, 2.0),
    }


def test_ranking_accuracy():
    """3 > 1 and 3 > 2 are right, 1 > 2 is not; of the second list only one pair is there."""
    right, pairs = ranking_accuracy(
        torch.tensor([[3.0, 1.0, 2.0], [1.0, 0.0, 9.0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    )
    assert (right.item(), pairs.item()) == (3, 4)
