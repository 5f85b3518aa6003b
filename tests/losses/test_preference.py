"""The preference losses against their papers' formulas, written out in float64 one pair at a time."""

import math

import pytest
import torch

from scale_llm.losses import preference
from scale_llm.losses.preference import PAIR_LOSSES, REFERENCE_FREE, Pairs, preference_loss

BETA, SMOOTHING, MARGIN = 0.3, 0.2, 0.7


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def random_pairs(n=7, reference=True) -> Pairs:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, 9, (2, n), generator=generator).double()
    # Log-probabilities a token between -2 and -0.1, so that sums and means differ and odds are finite
    sums = -(torch.rand(2, 2, n, generator=generator, dtype=torch.float64) * 1.9 + 0.1) * tokens
    return Pairs(*sums[0], *(sums[1] if reference else (None, None)), *tokens)


def h(w, l, rw, rl):  # noqa: E741
    return math.log(math.exp(w) / math.exp(rw)) - math.log(math.exp(l) / math.exp(rl))


def dpo_eq_7(w, l, rw, rl, nw, nl):  # noqa: E741
    return -math.log(sigmoid(BETA * h(w, l, rw, rl)))


def cdpo_eq_3(*pair):
    w, l, rw, rl, nw, nl = pair  # noqa: E741
    return (1 - SMOOTHING) * dpo_eq_7(*pair) + SMOOTHING * dpo_eq_7(l, w, rl, rw, nl, nw)


def robust_dpo_section_3(*pair):
    w, l, rw, rl, nw, nl = pair  # noqa: E741
    swapped = dpo_eq_7(l, w, rl, rw, nl, nw)
    return ((1 - SMOOTHING) * dpo_eq_7(*pair) - SMOOTHING * swapped) / (1 - 2 * SMOOTHING)


def ipo_eq_17(w, l, rw, rl, nw, nl):  # noqa: E741
    return (h(w / nw, l / nl, rw / nw, rl / nl) - 1 / (2 * BETA)) ** 2


def hinge_norm(w, l, rw, rl, nw, nl):  # noqa: E741
    return max(0.0, 1 - BETA * h(w, l, rw, rl))


def simpo_eq_6(w, l, rw, rl, nw, nl):  # noqa: E741
    return -math.log(sigmoid(BETA / nw * w - BETA / nl * l - MARGIN))


def orpo_eq_6_and_7(w, l, rw, rl, nw, nl):  # noqa: E741
    pw, pl = math.exp(w / nw), math.exp(l / nl)
    odds_ratio = (pw / (1 - pw)) / (pl / (1 - pl))
    return -w / nw + BETA * -math.log(sigmoid(math.log(odds_ratio)))


FORMULAS = {
    "dpo": (dpo_eq_7, {}),
    "cdpo": (cdpo_eq_3, {"label_smoothing": SMOOTHING}),
    "robust_dpo": (robust_dpo_section_3, {"label_smoothing": SMOOTHING}),
    "ipo": (ipo_eq_17, {}),
    "hinge": (hinge_norm, {}),
    "simpo": (simpo_eq_6, {"margin": MARGIN}),
    "orpo": (orpo_eq_6_and_7, {}),
}


def test_every_loss_has_a_formula():
    assert FORMULAS.keys() == PAIR_LOSSES.keys()


@pytest.mark.parametrize("name", FORMULAS)
def test_value(name):
    formula, options = FORMULAS[name]
    pairs = random_pairs()
    wanted = [formula(*(x.item() for x in pair)) for pair in zip(*pairs, strict=True)]
    assert preference_loss(name, pairs, beta=BETA, **options).tolist() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
def test_gradient(name):
    options = FORMULAS[name][1]
    chosen, rejected, *rest = random_pairs()

    def loss(chosen, rejected):
        return preference_loss(name, Pairs(chosen, rejected, *rest), beta=BETA, **options)

    assert torch.autograd.gradcheck(loss, (chosen.requires_grad_(), rejected.requires_grad_()))


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_who_needs_a_reference(name):
    if name in REFERENCE_FREE:
        assert preference_loss(name, random_pairs(reference=False)).shape == (7,)
    else:
        with pytest.raises(AssertionError, match="no reference"):
            preference_loss(name, random_pairs(reference=False))


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("chosen", [0.0, -2000.0])
def test_extremes_are_finite(name, chosen):
    """An answer of probability one, which has infinite odds, and one of exp(-2000), in FP32."""
    value = torch.tensor([chosen], requires_grad=True)
    rejected = torch.tensor([-2000.0 - chosen], requires_grad=True)
    reference = torch.tensor([-10.0])
    loss = preference_loss(name, Pairs(value, rejected, reference, reference, torch.ones(1), torch.ones(1)))
    loss.sum().backward()
    assert loss.isfinite().all() and value.grad.isfinite().all() and rejected.grad.isfinite().all()


def test_unsmoothed_variants_are_dpo():
    pairs = random_pairs()
    for loss in (preference.cdpo, preference.robust_dpo):
        torch.testing.assert_close(loss(pairs, beta=BETA), preference.dpo(pairs, beta=BETA))


def test_robust_dpo_is_unbiased():
    """Over labels flipped with probability e its mean is DPO of the right labels."""
    pairs = random_pairs()
    swapped = Pairs(*(pairs[i] for i in (1, 0, 3, 2, 5, 4)))
    options = {"beta": BETA, "label_smoothing": SMOOTHING}
    mean = (1 - SMOOTHING) * preference.robust_dpo(pairs, **options)
    mean += SMOOTHING * preference.robust_dpo(swapped, **options)
    torch.testing.assert_close(mean, preference.dpo(pairs, beta=BETA))


def test_hinge_without_reference_is_slic():
    """SLiC-HF: max(0, delta - log p chosen + log p rejected) with delta = 1 / beta, times beta."""
    pairs = random_pairs()
    zeros = torch.zeros_like(pairs.chosen)
    found = preference.hinge(pairs._replace(reference_chosen=zeros, reference_rejected=zeros), beta=BETA)
    torch.testing.assert_close(found, BETA * torch.relu(1 / BETA - pairs.chosen + pairs.rejected))


def test_length_normalisation_and_sft_term():
    pairs = random_pairs()
    means = preference.per_token(pairs)
    torch.testing.assert_close(means.chosen * pairs.chosen_tokens, pairs.chosen)
    torch.testing.assert_close(means.reference_rejected * pairs.rejected_tokens, pairs.reference_rejected)
    torch.testing.assert_close(preference.chosen_nll(pairs), -pairs.chosen / pairs.chosen_tokens)
    torch.testing.assert_close(preference.per_token(means).chosen, means.chosen)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="'dpp'; there are dpo, cdpo"):
        preference_loss("dpp", random_pairs())


def test_kto_section_4_1():
    """lambda_y - v(x, y), v = lambda_D sigmoid(beta (r - z0)) or lambda_U sigmoid(beta (z0 - r))."""
    log_ratio = torch.tensor([0.4, -1.5, 3.0, 0.0], dtype=torch.float64, requires_grad=True)
    desirable = torch.tensor([True, True, False, False])
    z0 = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    found = preference.kto(log_ratio, desirable, z0, beta=BETA, desirable_weight=1.3, undesirable_weight=0.8)
    wanted = [
        1.3 - 1.3 * sigmoid(BETA * (r - 0.25)) if good else 0.8 - 0.8 * sigmoid(BETA * (0.25 - r))
        for r, good in zip(log_ratio.tolist(), desirable.tolist(), strict=True)
    ]
    assert found.tolist() == pytest.approx(wanted, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: preference.kto(x, desirable, z0, beta=BETA), log_ratio)
    found.sum().backward()
    assert z0.grad is None  # a constant


def test_kto_reference_point():
    """Never negative; of a batch without answers, 0."""
    for total, count, wanted in ((6.0, 4.0, 1.5), (-6.0, 4.0, 0.0), (0.0, 0.0, 0.0)):
        assert preference.kto_reference_point(torch.tensor(total), torch.tensor(count)).item() == wanted


def test_metrics_are_sums_and_counts():
    pairs = Pairs(*torch.tensor([[-1.0, -2, -3, -9], [-2.0, -1, -3, 0], [-1.5, -2, -3, 0], [-2.5, -3, -3, 0]]))
    counts = torch.tensor([1, 1, 1, 0])  # the last is padding
    metrics = preference.preference_metrics(pairs, beta=0.5, counts=counts)
    assert {name: value[0].item() for name, value in metrics.items()} == {
        "rewards/chosen": 0.25,
        "rewards/rejected": 1.25,
        "rewards/accuracies": 0.0,  # equal, wrong, equal
        "rewards/margins": -1.0,
        "logps/chosen": -6.0,
        "logps/rejected": -6.0,
    }
    assert all(value[1].item() == 3 for value in metrics.values())
    whole = preference.preference_metrics(Pairs(pairs.chosen, pairs.rejected), beta=1.0)
    assert whole["rewards/chosen"][0] == -15 and whole["rewards/accuracies"][0] == 1


def test_kto_metrics_count_each_kind():
    desirable = torch.tensor([True, False, False, True])
    counts = torch.tensor([1, 1, 1, 0])
    metrics = preference.kto_metrics(torch.tensor([1.0, 2.0, 4.0, 8.0]), desirable, beta=0.5, counts=counts)
    assert [(s.item(), n.item()) for s, n in metrics.values()] == [(0.5, 1), (3.0, 2)]
