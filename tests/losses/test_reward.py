"""Losses of reward models against their formulas."""

import itertools
import math
from functools import partial

import pytest
import torch

from scale_llm.losses.reward import (
    bradley_terry,
    calibration_bins,
    plackett_luce,
    ranking_accuracy,
    ranking_loss,
    reward_loss,
    reward_metrics,
)


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


def test_calibration_bins():
    """Margins of 0, 1, -1 and 5: probabilities of 0.5, 0.731 twice, once wrong, and 0.993; parts 0, 4 and 9 of 10."""
    chosen, rejected = torch.tensor([1.0, 2.0, 0.0, 5.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    found = {name: (value.item(), count.item()) for name, (value, count) in calibration_bins(chosen, rejected).items()}
    assert found["calibration/0/confidence"] == (0.5, 1.0) and found["calibration/0/accuracy"] == (0.0, 1.0)
    assert found["calibration/4/confidence"] == (pytest.approx(2 / (1 + math.exp(-1))), 2.0)
    assert found["calibration/4/accuracy"] == (1.0, 2.0)
    assert found["calibration/9/confidence"] == (pytest.approx(1 / (1 + math.exp(-5))), 1.0)
    assert sum(count for name, (_, count) in found.items() if name.endswith("accuracy")) == 4


def test_ranking_loss_of_lists_behind_each_other():
    """Lists of 3, 2 and 4 answers in two rows: the sum of each list's own loss; its pairs, its best and its worst."""
    sizes, generator = [3, 2, 4], torch.Generator().manual_seed(7)
    values = torch.randn(9, generator=generator, dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([[0, 0, 1, 2, 2, 3, 4, -1], [5, 6, 6, 7, 8, 8, -1, -1]])
    scores = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    last = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0], [1, 0, 1, 1, 0, 1, 0, 0]])
    scores = torch.where(last.bool(), values[segments.clamp(min=0)], scores)
    batch = {"loss_mask": last, "segments": segments, "numbers": torch.arange(9),
             "sequence_weights": torch.ones(9),
             "lists": torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))}  # fmt: skip
    loss, count, metrics = ranking_loss(scores.t()[..., None], batch, None)
    parts = values.split(sizes)
    wanted = sum(plackett_luce(part[None])[0] for part in parts)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(loss, values, retain_graph=True), torch.autograd.grad(wanted, values)
    )
    assert count == 3 and metrics["rewards/accuracies"][1] == 3 + 1 + 6
    assert metrics["rewards/chosen"][0].item() == pytest.approx(sum(part[0].item() for part in parts))
    assert metrics["rewards/rejected"][0].item() == pytest.approx(sum(part[-1].item() for part in parts))


def rows_of(scores, sizes, weights):
    """Lists of so many answers, a token each, in one row; every list with its weight."""
    numbers, of_lists = torch.arange(len(scores)), torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    batch = {"loss_mask": torch.ones(1, len(scores)), "segments": numbers[None], "numbers": numbers, "lists": of_lists,
             "margins": torch.zeros(len(scores)), "sequence_weights": weights[of_lists]}  # fmt: skip
    return scores[:, None, None], batch


@pytest.mark.parametrize("loss", [partial(reward_loss, centring=0.1, calibrated=True), ranking_loss])
def test_a_weight_counts_as_so_many(loss):
    """Pairs of weights 2, 0 and 1 are the first one twice and the last one; metrics see both once."""
    values, sizes = scores(6).requires_grad_(), torch.tensor([2, 2, 2])
    weighted, count, metrics = loss(*rows_of(values, sizes, torch.tensor([2.0, 0.0, 1.0])), None)
    again, number, _ = loss(*rows_of(values[[0, 1, 0, 1, 4, 5]], sizes, torch.ones(3)), None)
    _, _, once = loss(*rows_of(values[[0, 1, 4, 5]], sizes[:2], torch.ones(2)), None)
    assert count == number == 3 and metrics["reward loss"][1] == 3
    torch.testing.assert_close(weighted, again)
    torch.testing.assert_close(torch.autograd.grad(weighted, values), torch.autograd.grad(again, values))
    once.pop("reward loss"), metrics.pop("reward loss")
    torch.testing.assert_close(metrics, once)


def test_a_rank_without_answers_joins():
    scores = torch.randn(4, 1, 1, requires_grad=True)
    batch = {"loss_mask": torch.zeros(1, 4), "segments": torch.full((1, 4), -1), "numbers": torch.empty(0).long(),
             "sequence_weights": torch.empty(0), "margins": torch.empty(0), "lists": torch.empty(0).long()}  # fmt: skip
    for loss in (reward_loss, ranking_loss):
        value, count, metrics = loss(scores, batch, None)
        assert value == 0 and count == 0 and all(number == 0 for _, number in metrics.values())
        (gradient,) = torch.autograd.grad(value, scores)
        assert not gradient.any()
