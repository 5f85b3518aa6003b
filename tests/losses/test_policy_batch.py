"""The losses of a micro-batch of answers against the formulas, whole and cut over ranks; estimates from scores."""

import math

import pytest
import torch
from support.policy_batch import ANSWERS, CASES, OPTIONS, VOCABULARY, by_hand, example

from scale_llm.config.policy import AdvEstimator, GrpoConfig, LossAggregation, PpoConfig
from scale_llm.losses.policy_batch import answer_token_values, policy_batch_loss, value_batch_loss
from scale_llm.stages.policy.estimate import estimate, groups_without_signal, token_weights, with_length

TOKENS = sum(count for _, count in ANSWERS)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("axis", "world_size"), [("tp", 1), ("tp", 2), ("tp", 4), ("cp", 2), ("cp", 4)])
def test_policy_loss_on_every_layout(ranks, case, axis, world_size):
    """Loss, divisor, every metric, and each rank's part of the gradient; log-probabilities by their cells.

    With the vocabulary cut, every rank has the whole numbers. With the sequence cut, the ranks' loss sums add up to the
    whole, for a token lies on one rank; GSPO's ratio is of tokens on all of them, and its gradient, eq. 14's, is the
    token's own, so that no rank needs the others' gradients.
    """
    results = ranks(world_size, "support.policy_batch:on_ranks", case=case, axis=axis)
    for result in results:
        assert result["names"]
        assert result["value_error"] < 2e-6 and result["look_error"] < 2e-6
        assert result["gradient_error"] < 1e-6 and result["largest_gradient"] > 0.05
        assert len(result["cells"]) == result["tokens_here"]
    if axis == "tp":
        assert all(result["cells"] == list(range(100, 100 + TOKENS)) for result in results)
    else:
        assert sorted(cell for result in results for cell in result["cells"]) == list(range(100, 100 + TOKENS))


def test_the_cases_clip():
    """Else the comparison would say nothing of clipping."""
    for case, names in {"dual_clip": ("pg_clipfrac", "pg_clipfrac_lower"), "gspo": ("pg_clipfrac",)}.items():
        metrics = by_hand(*example(), **CASES[case])[2]
        assert all(0 < metrics[f"actor/{name}"][0] < TOKENS for name in names)


def loss_of(logits, batch, **options):
    return policy_batch_loss(logits, batch, None, None, VOCABULARY, **{**OPTIONS, **options})


def test_gspo_gradient_is_that_of_sequences():
    """With one advantage for an answer, eq. 14 summed over its tokens is eq. 5 times their number: d/dx of
    |y| s A, s = exp(mean of log-ratios), is sum_t s A d(log p_t)/dx."""
    logits, batch = example()
    logits, mask = logits[..., :VOCABULARY].clone().requires_grad_(), batch["loss_mask"] != 0
    of_answer = torch.tensor([0.5, -1.0, 2.0, 0.0])
    batch["advantages"] = of_answer[batch["segments"]]
    batch["weights"] = batch["shares"] = mask.float()
    loss, _, _ = loss_of(logits, batch, of_sequences=True, clip_low=0.999, clip_high=1e3)
    (found,) = torch.autograd.grad(loss, logits)
    log_p = (logits[:, 0] / OPTIONS["temperature"]).log_softmax(-1).gather(-1, batch["labels"].t())[:, 0]
    wanted = torch.zeros(())
    for number, (first, count) in enumerate(ANSWERS):
        s = (log_p - batch["old_log_probs"][0])[first : first + count].mean().exp()
        wanted = wanted - count * s * of_answer[number]
    torch.testing.assert_close(found, torch.autograd.grad(wanted, logits)[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(loss, wanted)


def test_importance_cap_weighs_the_policy_term_alone():
    """Entropy and KL are of the trained policy, whoever sampled. Where sampler and trainer agree the weight is 1."""
    logits, batch = example()
    options = {"kl": "k3", "kl_coef": 0.3, "entropy_coeff": 0.1}
    plain = loss_of(logits, batch, **options)
    agreeing = {**batch, "sampled_log_probs": batch["old_log_probs"]}
    assert torch.equal(loss_of(logits, agreeing, importance_cap=2.0, **options)[0], plain[0])
    twice = {**batch, "sampled_log_probs": batch["old_log_probs"] - math.log(2)}
    capped = loss_of(logits, twice, importance_cap=1.5, **options)
    for name, factor in (("actor/pg_loss", 1.5), ("actor/kl_loss", 1.0), ("actor/entropy", 1.0)):
        torch.testing.assert_close(capped[2][name][0], factor * plain[2][name][0])
    torch.testing.assert_close(capped[0] - plain[0], 0.5 * plain[2]["actor/pg_loss"][0])


def test_a_micro_batch_without_answers():
    """Trap 9: an empty rank has a loss of 0 that a backward goes through, and divides by nothing."""
    logits, batch = example()
    logits.requires_grad_()
    batch = {**batch, "loss_mask": torch.zeros_like(batch["loss_mask"]), "numbers": batch["numbers"][:0],
             "segments": torch.full_like(batch["segments"], -1)}  # fmt: skip
    for of_sequences in (False, True):
        loss, divisor, metrics = loss_of(logits, batch, of_sequences=of_sequences, entropy_coeff=0.1, kl="k3")
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss == 0 and divisor == 0 and gradient.eq(0).all()
        assert all(total == 0 and count == 0 for total, count in metrics.values())


def test_value_loss():
    """Against the formula, token by token; what lies under the mask may be nan."""
    _, batch = example()
    generator = torch.Generator().manual_seed(8)
    values, old, returns = (torch.randn(24, generator=generator) for _ in range(3))
    mask = batch["loss_mask"][0] != 0
    junk = [torch.where(mask, x, torch.nan) for x in (values, old, returns)]
    found = value_batch_loss(
        junk[0][:, None, None].requires_grad_(),
        {"loss_mask": batch["loss_mask"], "old_values": junk[1][None], "returns": junk[2][None]}, clip=0.2,
    )  # fmt: skip
    loss = clipped = 0.0
    for v, o, r in ((x[i].item() for x in (values, old, returns)) for i in mask.nonzero()[:, 0]):
        near = min(max(v, o - 0.2), o + 0.2)
        loss += 0.5 * max((v - r) ** 2, (near - r) ** 2)
        clipped += abs(near - r) > abs(v - r)
    assert found[0].item() == pytest.approx(loss, rel=1e-6) and found[1] == TOKENS
    assert found[2]["critic/vf_loss"][0].item() == pytest.approx(loss, rel=1e-6)
    assert [x.item() for x in found[2]["critic/vf_clipfrac"]] == [clipped, TOKENS]
    cells, looked = answer_token_values(values[:, None, None], batch)
    assert cells.tolist() == list(range(100, 100 + TOKENS)) and torch.equal(looked, values[mask])


MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
"""Answers of 4, 1, 2 and 3 tokens."""


@pytest.mark.parametrize(("mode", "wanted"), [
    ("token_mean", (4 * 1.0 + 1 * 2.0 + 2 * 3.0 + 3 * 5.0) / 10),
    ("seq_mean_token_mean", (1.0 + 2.0 + 3.0 + 5.0) / 4),
    ("seq_mean_token_sum_norm", (4 * 1.0 + 1 * 2.0 + 2 * 3.0 + 3 * 5.0) / 8 / 4),
])  # fmt: skip
def test_aggregations(mode, wanted):
    """Of losses that are 1, 2, 3 and 5 on all tokens of the four answers: DAPO's mean over tokens, GRPO's over answers
    of means over their tokens, Dr. GRPO's over answers of sums over a constant, max_new_tokens (8 here)."""
    stage = GrpoConfig(loss_agg_mode=LossAggregation(mode), max_new_tokens=8)
    weights, shares = token_weights(stage, MASK)
    losses = torch.tensor([1.0, 2.0, 3.0, 5.0])[:, None].expand(4, 4)
    assert ((losses * weights).sum() / shares.sum()).item() == pytest.approx(wanted)
    assert weights[~MASK].eq(0).all() and shares[~MASK].eq(0).all()


@pytest.mark.parametrize("mode", LossAggregation)
def test_aggregations_do_not_depend_on_the_split(mode):
    """Trap 1: sums and divisors of any two parts add up, even where an answer is cut in two (context parallelism)."""
    weights, shares = token_weights(GrpoConfig(loss_agg_mode=mode, max_new_tokens=8), MASK)
    losses = torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
    whole = (losses * weights).sum() / shares.sum()
    for part in (slice(0, 1), slice(0, 3)):
        for dim in (0, 1):
            one = torch.zeros(4, 4)
            one.transpose(0, dim)[part] = 1
            sums = sum((losses * weights * half).sum() for half in (one, 1 - one))
            torch.testing.assert_close(sums / sum((shares * half).sum() for half in (one, 1 - one)), whole)


LOG_PROBS = torch.tensor([[-1.0, -2.0, -1.5, -0.5], [-1.0, 0, 0, 0], [-3.0, -1.0, 0, 0], [-0.5, -0.5, -0.5, 0]])
SCORES = torch.tensor([1.0, 0.0, 0.5, 2.0])


def of(stage, **options):
    return estimate(stage, SCORES, MASK, LOG_PROBS, **{"reference": None, "values": None, "kl_coef": 0.0, **options})


def over_tokens(*answers):
    return torch.where(MASK, torch.tensor(answers)[:, None], 0)


def test_estimate_grpo_and_dr_grpo():
    """Two answers each: deviations from .5 and 1.25 are +-.5 and +-.75, over deviations of .70711 and 1.06066."""
    found = of(GrpoConfig(num_generations_per_prompt=2))
    torch.testing.assert_close(found.advantages, over_tokens(0.70711, -0.70711, -0.70711, 0.70711), atol=1e-5, rtol=0)
    found = of(GrpoConfig(num_generations_per_prompt=2, norm_adv_by_std_in_grpo=False))
    torch.testing.assert_close(found.advantages, over_tokens(0.5, -0.5, -0.75, 0.75))


def test_estimate_rloo():
    """Each less the other's."""
    found = of(GrpoConfig(num_generations_per_prompt=2, adv_estimator=AdvEstimator.rloo))
    torch.testing.assert_close(found.advantages, over_tokens(1.0, -1.0, -1.5, 1.5))


def white(x):
    kept = x[MASK].double()
    return torch.where(MASK, (x - kept.mean()) / kept.std(correction=0), 0).float()


def test_estimate_reinforce_plus_plus():
    """Discounted returns, whitened over the ten tokens; of 4 tokens and gamma .5 they are 1/8, 1/4, 1/2, 1 times the
    score. With a baseline the scores are +-.5 and +-.75 first."""
    powers = torch.tensor([[0.125, 0.25, 0.5, 1], [1, 0, 0, 0], [0.5, 1, 0, 0], [0.25, 0.5, 1, 0]])
    stage = PpoConfig(adv_estimator=AdvEstimator.reinforce_plus_plus, gamma=0.5, num_generations_per_prompt=2)
    torch.testing.assert_close(of(stage).advantages, white(powers * SCORES[:, None]))
    torch.testing.assert_close(of(stage).returns, powers * SCORES[:, None])
    stage.adv_estimator = AdvEstimator.reinforce_plus_plus_baseline
    centred = torch.tensor([0.5, -0.5, -0.75, 0.75])
    torch.testing.assert_close(of(stage).advantages, white(powers * centred[:, None]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("estimator", [AdvEstimator.grpo, AdvEstimator.rloo, AdvEstimator.reinforce_plus_plus_baseline])
@pytest.mark.parametrize("score", [0.7, 50.3])
def test_estimate_of_groups_without_signal_is_nothing(estimator, score):
    """Exactly: eight equal rewards of 50.3 less their mean in FP32 are 3.8e-6, which both a group's deviation and
    whitening would divide by next to nothing."""
    stage = GrpoConfig(num_generations_per_prompt=8, adv_estimator=estimator)
    mask = torch.arange(5) < torch.tensor([5, 1, 2, 3, 4, 5, 1, 2])[:, None]
    found = estimate(stage, torch.full((8,), score), mask, torch.zeros(8, 5), reference=None, values=None, kl_coef=0.0)
    assert found.advantages.eq(0).all()


def test_estimate_gae():
    """Value 2 on one answer, the KL to the reference taken from every token's reward: -coef * (log p - log ref)."""
    stage = PpoConfig(gamma=0.99, lam=0.95, whiten_advantages=False)
    mask, log_probs = torch.tensor([[True, True, True]]), torch.tensor([[-1.0, -1.0, -1.0]])
    values = torch.tensor([[0.5, 0.6, 0.7]])
    found = estimate(stage, torch.ones(1), mask, log_probs, reference=log_probs, values=values, kl_coef=0.1)
    assert found.advantages[0].tolist() == pytest.approx([0.446829, 0.37515, 0.3], abs=1e-6)
    assert found.returns[0].tolist() == pytest.approx([0.946829, 0.97515, 1.0], abs=1e-6)
    moved = estimate(stage, torch.ones(1), mask, log_probs, reference=log_probs - 0.5, values=values, kl_coef=0.1)
    assert moved.rewards[0].tolist() == pytest.approx([-0.05, -0.05, 0.95])
    stage.whiten_advantages = True
    whitened = estimate(stage, torch.ones(1), mask, log_probs, reference=log_probs, values=values, kl_coef=0.1)
    plain = found.advantages
    torch.testing.assert_close(whitened.advantages, (plain - plain.mean()) / plain.std(correction=0))
    assert torch.equal(whitened.returns, found.returns), "returns are of the advantages before whitening"


def test_estimate_kl_in_the_reward_of_groups():
    """GRPO with kl_coef: an answer's reward is its score less the KL summed over its tokens."""
    reference = torch.where(MASK, LOG_PROBS - 0.1, 7.0)
    found = of(
        GrpoConfig(num_generations_per_prompt=2, norm_adv_by_std_in_grpo=False), reference=reference, kl_coef=1.0
    )
    totals = SCORES - 0.1 * torch.tensor([4, 1, 2, 3])
    torch.testing.assert_close(found.rewards.sum(-1), totals)
    half = (totals[0::2] - totals[1::2]) / 2
    torch.testing.assert_close(found.advantages, over_tokens(half[0], -half[0], half[1], -half[1]))


def test_with_length_dapo_eq_13():
    """L_max 12, L_cache 4: nothing up to 8 tokens, (8 - |y|) / 4 up to 12, -1 beyond; times the factor."""
    lengths = torch.tensor([1, 8, 9, 11, 12])
    stage = GrpoConfig(max_new_tokens=12, overlong_buffer_tokens=4)
    assert with_length(stage, torch.ones(5), lengths).tolist() == [1.0, 1.0, 0.75, 0.25, 0.0]
    stage.overlong_penalty_factor = 0.5
    assert with_length(stage, torch.ones(5), lengths).tolist() == [1.0, 1.0, 0.875, 0.625, 0.5]
    stage.overlong_buffer_tokens = 0
    assert with_length(stage, torch.ones(5), lengths).eq(1).all()


def test_groups_without_signal():
    scores = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.5])
    assert groups_without_signal(scores, 3).tolist() == [True, True, False]
    assert groups_without_signal(scores[:8], 2).tolist() == [True, False, True, True]
