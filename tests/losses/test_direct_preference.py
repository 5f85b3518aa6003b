"""Losses of batches of answers: what a row's weight does."""

from functools import partial

import pytest
import torch

from scale_llm.losses.direct_preference import pair_loss, unpaired_loss

PLACES, VOCABULARY = 3, 7

LOSSES = {
    **{
        name: partial(
            pair_loss, name=name, options={"beta": 0.5}, length_normalised=False, sft_coeff=0.3, tp_group=None,
            cp_group=None, vocab_size=VOCABULARY,
        )
        for name in ("dpo", "ipo", "simpo", "orpo")
    },
    "kto": partial(
        unpaired_loss, beta=0.5, desirable_weight=1.0, undesirable_weight=2.0, tp_group=None, cp_group=None,
        vocab_size=VOCABULARY,
    ),
}  # fmt: skip


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def found(loss, logits, answers, weights):
    """Of some of six answers, PLACES tokens each in a row of its own. logits: of all, [s, 6, v]."""
    answers, weights = torch.tensor(list(answers)), torch.tensor(weights)
    count = len(answers)
    batch = {
        "labels": torch.arange(6 * PLACES).view(6, PLACES)[answers] % VOCABULARY,
        "loss_mask": weights[:, None].expand(count, PLACES).float(),
        "segments": torch.arange(count)[:, None].expand(count, PLACES),
        "numbers": answers, "sequence_weights": weights, "reference": random(6, seed=1)[answers],
        "desirable": (answers % 3 == 0), "kl": torch.tensor(0.1),
    }  # fmt: skip
    return loss(logits[:, answers], batch)


@pytest.mark.parametrize("name", LOSSES)
def test_a_weight_counts_as_so_many(name):
    """Pairs of weights 2, 0 and 1 are the first one twice and the last one, in loss, count and gradient. Other metrics
    see both once. Of weights 0 alone there is nothing to learn."""
    loss, logits = LOSSES[name], random(PLACES, 6, VOCABULARY, seed=0).requires_grad_()
    weighted, count, metrics = found(loss, logits, range(6), [2.0, 2.0, 0.0, 0.0, 1.0, 1.0])
    again, number, _ = found(loss, logits, [0, 1, 0, 1, 4, 5], [1.0] * 6)
    _, items, once = found(loss, logits, [0, 1, 4, 5], [1.0] * 4)
    assert count == number == 1.5 * items
    torch.testing.assert_close(weighted, again)
    torch.testing.assert_close(torch.autograd.grad(weighted, logits), torch.autograd.grad(again, logits))
    assert metrics.pop("dpo loss")[1] == count and once.pop("dpo loss")[1] == items
    torch.testing.assert_close(metrics, once)
    nothing, none, _ = found(loss, logits, [0, 1], [0.0, 0.0])
    assert nothing == none == 0 and not torch.autograd.grad(nothing, logits)[0].any()


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "orpo"])
def test_metrics_are_of_what_the_loss_compares(name):
    """Losses of means judge an answer of three tokens and one of a single, less likely one by the mean of each, under
    which the chosen one is better; sums have it the other way round."""
    logits = torch.zeros(PLACES, 2, 2, dtype=torch.float64)
    logits[0, 1, 0] = -1.0
    log_ps = torch.log_softmax(logits, -1)
    batch = {
        "labels": torch.zeros(2, PLACES, dtype=torch.int64), "loss_mask": torch.tensor([[1.0, 1, 1], [1, 0, 0]]),
        "segments": torch.arange(2)[:, None].expand(2, PLACES), "numbers": torch.arange(2),
        "sequence_weights": torch.ones(2), "reference": torch.zeros(2),
    }  # fmt: skip
    loss = partial(pair_loss, tp_group=None, cp_group=None, vocab_size=2, length_normalised=False, sft_coeff=0.0)
    _, _, metrics = loss(logits, batch, name=name, options={"beta": 0.5})
    chosen, rejected = log_ps[:, 0, 0].sum(), log_ps[0, 1, 0]
    if name != "dpo":
        chosen = chosen / 3
    wanted = {
        "logps/chosen": chosen,
        "rewards/margins": 0.5 * (chosen - rejected),
        "rewards/accuracies": chosen > rejected,
    }
    assert (chosen > rejected) == (name != "dpo")
    for key, value in wanted.items():
        torch.testing.assert_close(metrics[key][0].double(), value.double())
