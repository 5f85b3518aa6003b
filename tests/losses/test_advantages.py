"""Advantages against loops over tokens and answers."""

import pytest
import torch

from scale_llm.losses import advantages


def random_rows(b=6, s=37):
    """Rewards, values, mask [b, s]: tool output in the middle, a row of padding only, nan under the mask."""
    generator = torch.Generator().manual_seed(6)
    rewards = torch.randn(b, s, generator=generator, dtype=torch.float64)
    values = torch.randn(b, s, generator=generator, dtype=torch.float64)
    mask = torch.rand(b, s, generator=generator) < 0.7
    mask[0], mask[1], mask[2, 20:] = True, False, False
    return rewards.masked_fill(~mask, torch.nan), values.masked_fill(~mask, torch.nan), mask


@pytest.mark.parametrize("length", [1, 2, 31, 37])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (0.9, 0.0)])
def test_gae_against_a_loop_over_trainable_tokens(gamma, lam, length):
    """The loop sees only the trainable tokens, as if the others had never been there."""
    rewards, values, mask = (x[:, :length] for x in random_rows())
    found, returns = advantages.gae(rewards, values, mask, gamma=gamma, lam=lam)
    wanted = torch.zeros_like(found)
    for b in range(6):
        following = carried = 0.0
        for t in reversed(range(length)):
            if mask[b, t]:
                delta = rewards[b, t] + gamma * following - values[b, t]
                carried = delta + gamma * lam * carried
                following, wanted[b, t] = values[b, t], carried
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(returns, torch.where(mask, wanted + values, 0))


def test_gae_of_long_rows_in_fp32():
    """32768 tokens, a reward of 1 at the end, no discount: the return is 1 everywhere."""
    rewards = torch.zeros(1, 32768)
    rewards[0, -1] = 1
    found, returns = advantages.gae(
        rewards, torch.full_like(rewards, 0.25), torch.ones_like(rewards), gamma=1.0, lam=1.0
    )
    torch.testing.assert_close(found, torch.full_like(rewards, 0.75))
    torch.testing.assert_close(returns, torch.ones_like(rewards))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_discounted_returns_against_a_loop(gamma):
    rewards, _, mask = random_rows()
    wanted = torch.zeros_like(rewards)
    for b in range(6):
        carried = 0.0
        for t in reversed(range(37)):
            if mask[b, t]:
                wanted[b, t] = carried = rewards[b, t] + gamma * carried
    torch.testing.assert_close(advantages.discounted_returns(rewards, mask, gamma=gamma), wanted)


def test_reinforce_plus_plus_is_whitened_returns():
    rewards, _, mask = random_rows()
    found = advantages.reinforce_plus_plus(rewards, mask)
    assert found[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert found[mask].std(correction=0).item() == pytest.approx(1)
    assert found[~mask].eq(0).all()


def test_groups_do_not_see_each_other():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [5.0, 5.0, 5.0, 5.0], [100.0, 0.0, 0.0, 100.0]])
    found = advantages.group_normalised(rewards)
    torch.testing.assert_close(found[0], found[2], atol=1e-5, rtol=0)
    assert found[1].eq(0).all()


@pytest.mark.parametrize("k", range(2, 17))
def test_equal_rewards_give_exactly_nothing(k):
    """Over a deviation of 0 + 1e-6 the rounding of a mean in FP32 would be an advantage of up to 15."""
    rewards = (100 * torch.rand(500, 1, generator=torch.Generator().manual_seed(k))).expand(-1, k).contiguous()
    for found in (
        *(advantages.group_normalised(rewards, correction=c) for c in (None, 0, 1)),
        advantages.rloo(rewards),
        torch.stack([advantages.reinforce_plus_plus(row, torch.ones(k, 1)) for row in rewards[:50, :, None]]),
    ):
        assert found.dtype == torch.float32 and found.eq(0).all()


def test_rloo_against_a_loop():
    rewards = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.stack([
        torch.stack([row[i] - (row.sum() - row[i]) / 4 for i in range(5)]) for row in rewards
    ])  # fmt: skip
    torch.testing.assert_close(advantages.rloo(rewards), wanted)


def test_whitening_keeps_the_mean_on_request_and_survives_a_large_one():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1)) + 1e4
    mask = torch.ones_like(values)
    white = advantages.whiten(values, mask)
    assert white.mean().item() == pytest.approx(0, abs=1e-3) and white.std().item() == pytest.approx(1, rel=2e-3)
    kept = advantages.whiten(values, mask, shift_mean=False)
    torch.testing.assert_close(kept - white, torch.full_like(values, values.mean().item()))
    assert advantages.whiten(values, torch.zeros_like(values)).eq(0).all()


def test_overlong_penalty_dapo_eq_13():
    """20480 tokens of which the last 4096 are the buffer."""
    lengths = torch.tensor([1, 16384, 18432, 20480, 30000])
    found = advantages.overlong_penalty(lengths, max_tokens=20480, buffer_tokens=4096)
    assert found.tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]


def test_adaptive_kl_follows_its_target():
    """Within a fifth of the target the change is proportional; at it there is none."""
    controller = advantages.AdaptiveKL(coefficient=0.1, target=5.0, horizon=100.0)
    assert controller.update(5.0, 10) == 0.1
    assert controller.update(5.5, 10) == pytest.approx(0.1 * 1.01)
    assert controller.update(50.0, 10) == pytest.approx(0.1 * 1.01 * 1.02)
    before = controller.coefficient
    assert controller.update(0.0, 1000) == pytest.approx(0.8 * before), "samples beyond the horizon change no more"


def test_nothing_has_a_gradient():
    rewards, values, mask = torch.rand(2, 4, requires_grad=True), torch.rand(2, 4, requires_grad=True), torch.ones(2, 4)
    results = [
        *advantages.gae(rewards, values, mask, gamma=1.0, lam=0.9), advantages.group_normalised(rewards),
        advantages.rloo(rewards), advantages.whiten(rewards, mask), advantages.reinforce_plus_plus(rewards, mask),
    ]  # fmt: skip
    assert not any(x.requires_grad for x in results)
