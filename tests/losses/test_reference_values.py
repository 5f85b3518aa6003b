"""Closed-form values of the losses, 1 to 11, and the mistakes that such losses are known for, traps 1 to 10.

1  normalising per micro-batch        here, test_policy_batch, stages/test_policy_traps
2  a logit belongs to the next token  stages/test_policy_traps, stages/test_policy_oracle
3  the end of an answer, if it pads   stages/test_policy_traps
4  where an answer's reward lies      here, stages/test_policy_traps
5  temperature in training            test_vocabulary, stages/test_policy_traps
6  dropout                            stages/test_policy_traps
7  the first ratio                    stages/test_policy_traps
8  whitening over ranks               here, stages/test_policy_traps
9  a rank without anything            here, test_policy_batch, stages/test_policy_traps
10 before the first update            here, stages/test_policy_traps
"""

import math

import pytest
import torch

from scale_llm.losses import advantages, policy, preference, reward, sequences
from scale_llm.losses.policy_batch import policy_batch_loss


def near(values, tolerance=1e-6):
    return pytest.approx(values, rel=0, abs=tolerance)


def pairs(chosen, rejected, reference_chosen, reference_rejected, tokens=1.0):
    return preference.Pairs(*(torch.tensor([float(x)]) for x in (
        chosen, rejected, reference_chosen, reference_rejected, tokens, tokens
    )))  # fmt: skip


def test_value_1_clipped_policy_loss_with_dual_clip():
    ratio, weights = torch.tensor([2.0, 2.0, 0.5]), torch.tensor([2.0, -2.0, 2.0])
    loss = policy.clipped_policy_loss(ratio.log(), weights, clip_low=0.2, clip_high=0.2, dual_clip=1.5)
    assert loss.tolist() == near([-2.4, 3.0, -1.0])


def test_value_2_gae():
    found, returns = advantages.gae(
        torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.7]]), torch.ones(1, 3), gamma=0.99, lam=0.95
    )
    assert found[0].tolist() == near([0.446829, 0.37515, 0.3])
    assert returns[0].tolist() == near([0.946829, 0.97515, 1.0])


def test_value_3_gae_carries_over_masked_tokens():
    found, returns = advantages.gae(
        torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.0, 100.0]]), torch.tensor([[1, 1, 0]]),
        gamma=1.0, lam=0.95,
    )  # fmt: skip
    assert found[0].tolist() == near([0.95, 1.0, 0.0])
    assert returns[0].tolist() == near([0.95, 1.0, 0.0])


@pytest.mark.parametrize(("d", "wanted"), [(0.1, (0.1, 0.005, 0.00483742)), (-0.5, (-0.5, 0.125, 0.148721))])
def test_value_4_kl_estimators(d, wanted):
    """Gradients in d: 1, d, 1 - exp(-d)."""
    for name, value, slope in zip(("k1", "k2", "k3"), wanted, (1.0, d, 1 - math.exp(-d)), strict=True):
        x = torch.tensor(d, requires_grad=True)
        found = policy.KL_ESTIMATORS[name](x)
        (gradient,) = torch.autograd.grad(found, x)
        assert found.item() == near(value) and gradient.item() == near(slope)


@pytest.mark.parametrize(("kl", "wanted"), [(12.0, 0.201024), (3.0, 0.198976)])
def test_value_5_adaptive_kl(kl, wanted):
    controller = advantages.AdaptiveKL(coefficient=0.2, target=6.0, horizon=1e4)
    assert controller.update(kl, 256) == near(wanted)
    assert controller.coefficient == near(wanted)


def test_value_6_token_mean_over_ranks(ranks):
    """{1, 2} and {3 .. 7} on two ranks: 4, where the mean of means is 3.25. Under the mask: infinity and nan."""
    assert ranks(2, "support.losses:token_mean") == [4.0, 4.0]


def test_value_6_and_trap_1_token_mean_over_micro_batches():
    micro_batches = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0, 6.0, 7.0])
    sums = [sequences.masked_sum(x, torch.ones_like(x)) for x in micro_batches]
    assert (sum(s for s, _ in sums) / sum(n for _, n in sums)).item() == 4.0


@pytest.mark.parametrize("mode", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"])
def test_trap_1_any_split_of_a_policy_loss_has_one_gradient(mode):
    """Sums and divisors of two micro-batches, whose answers differ in length, are those of one."""
    logits = torch.randn(12, 1, 8, generator=torch.Generator().manual_seed(2), requires_grad=True)
    mask = torch.tensor([[1.0] * 2 + [0.0] + [1.0] * 7 + [0.0] * 2])
    answers = torch.tensor([0] * 3 + [1] * 9)
    lengths = torch.tensor([2.0, 7.0])[answers][None]
    weights = {"token_mean": mask, "seq_mean_token_mean": mask / lengths, "seq_mean_token_sum_norm": mask / 9}[mode]
    batch = {
        "labels": torch.arange(12)[None] % 8, "loss_mask": mask, "segments": answers[None],
        "numbers": torch.arange(2), "old_log_probs": torch.full((1, 12), -2.0),
        "advantages": torch.linspace(-1, 1, 12)[None], "weights": weights,
        "shares": mask if mode == "token_mean" else mask / lengths,
    }  # fmt: skip

    def gradient(*parts):
        sums, divisors = [], []
        for part in parts:
            cut = {name: x[:, part] if x.dim() == 2 else x for name, x in batch.items()}
            loss, divisor, _ = policy_batch_loss(
                logits[part], cut, None, None, 8, temperature=1.0, clip_low=0.2, clip_high=0.2, dual_clip=None,
                of_sequences=False, entropy_coeff=0.01, kl=None, kl_coef=0.0, importance_cap=None,
            )  # fmt: skip
            sums.append(loss), divisors.append(divisor)
        return torch.autograd.grad(sum(sums), logits)[0] / sum(divisors)

    torch.testing.assert_close(gradient(slice(0, 3), slice(3, 12)), gradient(slice(0, 12)), rtol=1e-5, atol=1e-8)


def test_value_7_group_rewards():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
    for found, size in (
        (advantages.group_normalised(rewards), 0.86602),
        (advantages.group_normalised(rewards, correction=0), 1.0),
        (advantages.group_normalised(rewards, correction=None), 0.5),
        (advantages.rloo(rewards), 0.66667),
    ):
        assert (found[0] * signs).tolist() == near([size] * 4, tolerance=6e-6)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("logits", "token", "log_prob", "entropy"),
    [([1, 2, 3, 4], 3, -0.4401897, 0.9475370), ([4, 1, 0.5, 2], 0, -0.1950072, 0.6275869)],
)
def test_value_8_every_vocabulary_split(ranks, world_size, logits, token, log_prob, entropy):
    """Padding, which would win every softmax, is excluded."""
    for found in ranks(world_size, "support.losses:four_logits", logits=logits, token=token):
        assert found == near((log_prob, entropy))


def test_value_9_preference_losses():
    same, moved = pairs(-10, -12, -10, -12), pairs(-10, -12, -11, -12)
    assert preference.dpo(same, beta=0.1).item() == near(math.log(2))
    assert preference.dpo(moved, beta=0.1).item() == near(0.644397)
    assert preference.cdpo(moved, beta=0.1, label_smoothing=0.1).item() == near(0.654397)
    assert preference.ipo(moved, beta=0.1).item() == near(16.0, tolerance=1e-5)


def test_value_9_which_losses_take_means_over_tokens():
    """Twice the tokens and twice the sums change DPO and the hinge, not the losses of means."""
    once, twice = pairs(-4, -6, -5, -5.5, tokens=3), pairs(-8, -12, -10, -11, tokens=6)
    equal = {name for name in preference.PAIR_LOSSES if torch.allclose(
        preference.preference_loss(name, once), preference.preference_loss(name, twice)
    )}  # fmt: skip
    assert equal == {"ipo", "simpo", "orpo"}


def test_value_10_equal_scores_and_sequence_ratio():
    score = torch.tensor([0.7])
    assert reward.bradley_terry(score, score).item() == near(math.log(2))
    log_ratio = torch.tensor([0.1, -0.2, 0.4])[:, None]
    found = policy.sequence_log_ratio(log_ratio, torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.long), 1)
    assert found.exp().item() == near(1.105171)


def test_value_11_clipped_value_loss():
    found = policy.clipped_value_loss(torch.tensor(1.0), torch.tensor(0.2), torch.tensor(0.0), clip=0.2)
    assert found.item() == near(0.5)


def test_trap_4_terminal_reward_sits_on_the_last_trainable_token():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]])
    placed = advantages.reward_on_last_token(torch.tensor([1.0, 2.0, 3.0, 4.0]), mask)
    assert placed.tolist() == [[0, 0, 1, 0], [0, 0, 0, 2], [0, 0, 0, 0], [0, 0, 4, 0]]


@pytest.mark.parametrize("empty_rank", [None, 1])
def test_traps_8_and_9_whitening_is_the_whole_batchs_and_an_empty_rank_joins(ranks, empty_rank):
    results = ranks(2, "support.losses:whitening", empty_rank=empty_rank)
    for result in results:
        assert result["error"] < 1e-9 and result["reinforce_error"] < 1e-12
    assert (results[1]["tokens_here"] == 0) is (empty_rank == 1)


def test_trap_10_first_update():
    """Where the policy is its reference and its sampler, the KL and its gradient are 0 and every ratio is 1."""
    log_probs = torch.randn(50, requires_grad=True)
    log_ratio = log_probs - log_probs.detach()
    for name in ("k1", "k2", "k3"):
        assert policy.KL_ESTIMATORS[name](log_ratio).abs().max() == 0
    (gradient,) = torch.autograd.grad(policy.kl_k2(log_ratio).sum() + policy.kl_k3(log_ratio).sum(), log_probs)
    assert gradient.abs().max() == 0
    assert policy.truncated_importance_weights(log_probs, log_probs).eq(1).all()
    assert policy.clipped_policy_loss(log_ratio, torch.ones(50)).eq(-1).all()


def test_value_4_k1_as_a_loss_has_the_wrong_expected_gradient():
    """Expectations over all four tokens, written out: k1 gives 0, k2 the gradient of KL(p, q), k3 that of KL(q, p)."""
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    log_p = logits.log_softmax(0)
    p = log_p.exp()

    def gradient(x):
        return torch.autograd.grad(x, logits, retain_graph=True)[0]

    expected = {name: gradient((p.detach() * f(log_p - q.log())).sum()) for name, f in policy.KL_ESTIMATORS.items()}
    assert expected["k1"].abs().max() < 1e-12
    torch.testing.assert_close(expected["k2"], gradient((p * (log_p - q.log())).sum()))
    torch.testing.assert_close(expected["k3"], gradient((q * (q.log() - log_p)).sum()))
