"""Policy and value losses against their formulas and against plain torch."""

import math

import pytest
import torch

from scale_llm.losses import policy
from scale_llm.losses.sequences import spread


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dual_clip", [None, 2.0])
def test_clipped_policy_loss_against_a_loop(dual_clip):
    """PPO eq. 7 with clip-higher; dual clip max(min(r A, clip(r) A), c A) where A < 0."""
    log_ratio, weights = randn(200), randn(200, seed=1)
    found = policy.clipped_policy_loss(log_ratio, weights, clip_low=0.2, clip_high=0.28, dual_clip=dual_clip)
    wanted = []
    for x, a in zip(log_ratio.tolist(), weights.tolist(), strict=True):
        r = math.exp(x)
        objective = min(r * a, min(max(r, 0.8), 1.28) * a)
        if dual_clip and a < 0:
            objective = max(objective, dual_clip * a)
        wanted.append(-objective)
    assert found.tolist() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("dual_clip", [None, 2.0])
def test_clipped_policy_loss_gradient(dual_clip):
    weights = randn(50, seed=1)
    assert torch.autograd.gradcheck(
        lambda x: policy.clipped_policy_loss(x, weights, clip_high=0.28, dual_clip=dual_clip),
        randn(50).requires_grad_(),
    )


def test_clipping_stops_the_gradient_on_one_side_only():
    log_ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 9.0]).log().requires_grad_()
    weights = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])
    policy.clipped_policy_loss(log_ratio, weights, dual_clip=3.0).sum().backward()
    assert (log_ratio.grad != 0).tolist() == [False, True, True, False, False]


def test_extreme_ratios_are_finite():
    log_ratio = torch.tensor([200.0, -200.0, 200.0, -200.0], requires_grad=True)
    weights = torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss = policy.clipped_policy_loss(log_ratio, weights) + policy.kl_k3(log_ratio)
    loss.sum().backward()
    assert loss.isfinite().all() and log_ratio.grad.isfinite().all()


def test_metrics_count_what_has_no_gradient():
    log_ratio = torch.tensor([1.5, 0.5, 4.0, 1.0, 1.5, 100.0]).log()
    weights = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, 1.0])
    mask = torch.tensor([1, 1, 1, 1, 1, 0])
    metrics = policy.policy_metrics(log_ratio, weights, mask, dual_clip=3.0)
    assert {name: value[0].item() for name, value in metrics.items() if "clipped" in name} == {
        "policy/clipped low": 1.0,
        "policy/clipped high": 1.0,
        "policy/dual clipped": 1.0,
    }
    assert metrics["policy/ratio"][0].item() == pytest.approx(8.5)
    assert all(count == 5 for _, count in metrics.values())
    wanted = sum(r - 1 - math.log(r) for r in (1.5, 0.5, 4.0, 1.0, 1.5))
    assert metrics["policy/kl to old"][0].item() == pytest.approx(wanted, rel=1e-5)


def test_gspo_is_the_geometric_mean_of_ratios():
    """Eq. 7; tokens under the mask and in no sequence take no part."""
    log_ratio = randn(6, 1)
    segments = torch.tensor([0, 0, 0, 1, 1, -1])[:, None]
    mask = torch.tensor([1, 0, 1, 1, 1, 1])[:, None]
    found = policy.sequence_log_ratio(log_ratio, mask, segments, 2).exp()
    r = log_ratio[:, 0].exp()
    torch.testing.assert_close(found, torch.stack([(r[0] * r[2]).sqrt(), (r[3] * r[4]).sqrt()]))


def test_gspo_token_with_equal_advantages_is_gspo():
    """Zheng et al. 2025, section 4.3: the same value and gradient, up to the mean over a sequence's tokens."""
    segments = torch.tensor([0, 0, 0, 1, 1])[:, None]
    mask, advantages, tokens = torch.ones(5, 1), torch.tensor([0.7, -1.2], dtype=torch.float64), torch.tensor([3, 2])
    log_ratio = (0.3 * randn(5, 1)).requires_grad_()
    of_sequence = policy.sequence_log_ratio(log_ratio, mask, segments, 2)
    whole = policy.clipped_policy_loss(of_sequence, advantages).sum()
    token_ratio = policy.gspo_token_log_ratio(log_ratio, spread(of_sequence, segments))
    losses = policy.clipped_policy_loss(token_ratio, spread(advantages, segments))
    by_token = (losses / spread(tokens, segments)).sum()
    torch.testing.assert_close(whole, by_token)
    (wanted,), (found,) = (torch.autograd.grad(x, log_ratio, retain_graph=True) for x in (whole, by_token))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_clipped_value_loss_against_a_loop(clip):
    values, old, returns = randn(100), randn(100, seed=1), randn(100, seed=2)
    wanted = []
    for v, o, r in zip(values.tolist(), old.tolist(), returns.tolist(), strict=True):
        near = v if clip is None else min(max(v, o - clip), o + clip)
        wanted.append(0.5 * max((v - r) ** 2, (near - r) ** 2))
    assert policy.clipped_value_loss(values, old, returns, clip=clip).tolist() == pytest.approx(wanted, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda v: policy.clipped_value_loss(v, old, returns, clip=clip), values.requires_grad_()
    )


@pytest.mark.parametrize("name", policy.KL_ESTIMATORS)
def test_kl_gradient(name):
    assert torch.autograd.gradcheck(policy.KL_ESTIMATORS[name], randn(20).requires_grad_())


def test_k3_of_small_differences_keeps_its_digits():
    """exp(-d) - 1 + d in FP32 without expm1 would be 0 or 1.2e-7 here, not 5e-9."""
    assert policy.kl_k3(torch.tensor(1e-4)).item() == pytest.approx(5e-9, rel=2e-2)


def test_k1_and_k3_are_unbiased():
    p, q = randn(8).softmax(0), randn(8, seed=1).softmax(0)
    kl = (p * (p / q).log()).sum()
    for name in ("k1", "k3"):
        torch.testing.assert_close((p * policy.KL_ESTIMATORS[name]((p / q).log())).sum(), kl)


def test_entropy_bonus_lowers_the_loss():
    assert policy.entropy_bonus(torch.tensor([2.0, 1.0]), coefficient=0.5).tolist() == [-1.0, -0.5]


def test_truncated_importance_weights():
    log_probs = torch.tensor([0.5, 1.0, 3.0, 200.0], requires_grad=True)
    found = policy.truncated_importance_weights(log_probs.abs().log(), torch.zeros(4), cap=2.0)
    assert found.tolist() == pytest.approx([0.5, 1.0, 2.0, 2.0])
    assert not found.requires_grad
