"""The preference and reward losses against Hugging Face's TRL: values, and gradients by tokens' log-probabilities.

TRL's own methods run, from the tokens to the scalar that it runs backward on, in FP64: on trainers with only the
attributes that these methods read, and on a model that looks log-probabilities up in a table. Where conventions differ:

- All: TRL's loss is the mean over a micro-batch. Ours is one value a pair or answer; the test takes the mean.
- cDPO: TRL 1.16's DPOTrainer smoothes no labels of "sigmoid". Its CPOTrainer.cpo_loss does, without a reference: it
  gets log-ratios in place of log-probabilities.
- IPO: TRL counts an answer's tokens before the shift by one. That is the number predicted, as ours, unless an answer
  begins at a sequence's first token, which nothing predicts: then it is one more.
- SimPO: TRL subtracts gamma / beta inside of beta (...), so its simpo_gamma is the paper's gamma, and our margin.
- ORPO: TRL's NLL is a mean over all chosen tokens of a micro-batch, prompts included; ours is of answers alone, a mean
  for each. They are one where prompts have one token and chosen answers one length; elsewhere the test swaps them.
  TRL rounds mean log-probabilities to FP32 before it takes odds; here `Tensor.float` is made to give FP64.
- KTO: TRL's z0 is the mean over ranks of their means, ours one mean over all answers. On one rank they are one.
- Reward: TRL scores a sequence at its last token, ours is a mean where loss_mask is not 0. Both are given the scores.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from scale_llm.losses import preference
from scale_llm.losses.preference import Pairs
from scale_llm.losses.reward import bradley_terry
from scale_llm.losses.sequences import segment_sums

# The oldest with these private methods that was tried
trl = pytest.importorskip("trl", minversion="1.16", reason="the oracle is trl, of the dev extra")

ROWS, LENGTH, BETA, SMOOTHING, MARGIN = 16, 14, 0.3, 0.2, 0.7
OF_DPO = {"dpo": "sigmoid", "robust_dpo": "robust", "hinge": "hinge", "ipo": "ipo"}
"""Our losses that DPOTrainer has, and its names."""


def tokens(prompts=(1, 5), chosen=(1, 9), first_id=0):
    """Ids [b, s], what is no padding, what is answer; chosen, then rejected. Lengths: from, to (exclusive).

    No id occurs twice: it is the token's place in a table of log-probabilities.
    """
    generator, half, place = torch.Generator().manual_seed(6), ROWS // 2, torch.arange(LENGTH)
    prompt = torch.randint(*prompts, (ROWS, 1), generator=generator)
    answer = torch.cat([torch.randint(*lengths, (half, 1), generator=generator) for lengths in (chosen, (1, 9))])
    kept = place < prompt + answer
    return torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) + first_id, kept.long(), (kept & (place >= prompt)).long()


def table(seed):
    """Log-probabilities between -2 and -0.1 of the tokens of two batches, [t]."""
    values = torch.rand(2 * ROWS * LENGTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (-0.1 - 1.9 * values).requires_grad_()


def sums(table, batch):
    """Log-probabilities of the answers, [b], and how many tokens were predicted: all but a sequence's first."""
    ids, _, answer = (x[:, 1:] for x in batch)
    return segment_sums(table[ids], answer, torch.arange(ROWS)[:, None].expand_as(ids), ROWS)


def pairs(policy, reference, batch) -> Pairs:
    (log_probs, count), (of_reference, _) = sums(policy, batch), sums(reference.detach(), batch)
    return Pairs(*log_probs.chunk(2), *of_reference.chunk(2), *count.chunk(2))


def model(table):
    """What TRL calls. logits: log p at the next token's id, log(1 - p) at the last id, which no token has."""

    def call(input_ids, labels=None, **_):
        log_probs = table[input_ids[:, 1:]]
        none = torch.zeros_like(log_probs).detach()
        if labels is not None:
            kept = log_probs.masked_fill(labels[:, 1:] == -100, 0)
            return SimpleNamespace(log_probs=kept, entropy=none, mean_logits=none, is_top1=none.bool())
        places = torch.stack([input_ids[:, 1:], torch.full_like(input_ids[:, 1:], len(table))], dim=-1)
        both = torch.stack([log_probs, torch.log(-torch.expm1(log_probs))], dim=-1)
        logits = log_probs.new_full((*none.shape, len(table) + 1), -1e3).scatter(-1, places, both)
        return SimpleNamespace(logits=F.pad(logits, (0, 0, 0, 1)))

    return call


@pytest.fixture(scope="module")
def trainer():
    """Makes a trainer of TRL's, uninitialised but for what its loss reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        from trl import DPOTrainer, KTOTrainer, RewardTrainer
        from trl.experimental.cpo import CPOTrainer
        from trl.experimental.orpo import ORPOTrainer
    classes = {"dpo": DPOTrainer, "kto": KTOTrainer, "reward": RewardTrainer, "cpo": CPOTrainer, "orpo": ORPOTrainer}
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)

    def make(kind, **attributes):
        made = object.__new__(classes[kind])
        made.accelerator, made.model, made.beta = accelerator, SimpleNamespace(training=True), BETA
        made.precompute_ref_logps, made.aux_loss_enabled, made.is_encoder_decoder = True, False, False
        made.pad_token_id = made.padding_value = made._total_train_tokens = 0
        made._tp_size, made._metrics = 1, defaultdict(lambda: defaultdict(list))
        vars(made).update(attributes)
        return made

    return make


def concatenated_loss(made, policy, batch):
    """Of CPOTrainer and ORPOTrainer, which take chosen and rejected apart."""
    ids, kept, answer = batch
    inputs = {}
    for name, value in {"input_ids": ids, "attention_mask": kept, "labels": ids.masked_fill(answer == 0, -100)}.items():
        inputs[f"chosen_{name}"], inputs[f"rejected_{name}"] = value.chunk(2)
    return made.get_batch_loss_metrics(model(policy), inputs)[0]


def assert_same(ours, theirs, leaf):
    """Values and gradients. Tokens that do not count have 0; where TRL takes logits, p - p, which is not quite 0."""
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=0)
    found, wanted = (torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (ours, theirs))
    assert wanted.abs().max() > 1e-4
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("name", OF_DPO)
def test_losses_of_dpo_trainer(trainer, name, prompts=(1, 5), extra_tokens=0):
    policy, batch = table(0), tokens(prompts)
    ours = pairs(policy, table(1), batch)
    made = trainer("dpo", loss_types=[OF_DPO[name]], loss_weights=[1.0], label_smoothing=SMOOTHING,
                   f_divergence_type="reverse_kl", ld_alpha=None, use_weighting=False)  # fmt: skip
    inputs = dict(zip(("input_ids", "attention_mask", "completion_mask"), batch, strict=True))
    inputs |= {"ref_chosen_logps": ours.reference_chosen, "ref_rejected_logps": ours.reference_rejected}
    counts = {key: getattr(ours, key) + extra_tokens for key in ("chosen_tokens", "rejected_tokens")}
    options = {"label_smoothing": SMOOTHING} if name == "robust_dpo" else {}
    losses = preference.preference_loss(name, ours._replace(**counts), beta=BETA, **options)
    assert name != "hinge" or 0 < (losses > 0).sum() < len(losses)  # both of its sides
    assert_same(losses.mean(), made._compute_loss(model(policy), inputs, False), policy)


def test_ipo_counts_a_first_token(trainer):
    test_losses_of_dpo_trainer(trainer, "ipo", prompts=(0, 1), extra_tokens=1)


def test_cdpo(trainer):
    policy = table(0)
    ours = pairs(policy, table(1), tokens())
    made = trainer("cpo", loss_type="sigmoid", label_smoothing=SMOOTHING, alpha=0.0)
    theirs = made.cpo_loss(ours.chosen - ours.reference_chosen, ours.rejected - ours.reference_rejected)[0]
    assert_same(preference.cdpo(ours, beta=BETA, label_smoothing=SMOOTHING).mean(), theirs.mean(), policy)


def test_simpo(trainer):
    policy, batch = table(0), tokens()
    made = trainer("cpo", loss_type="simpo", simpo_gamma=MARGIN, label_smoothing=0.0, alpha=0.0, cpo_alpha=0.0)
    ours = preference.simpo(pairs(policy, policy, batch), beta=BETA, margin=MARGIN)
    assert_same(ours.mean(), concatenated_loss(made, policy, batch), policy)


@pytest.mark.parametrize("same_mean", [True, False])
def test_orpo(trainer, monkeypatch, same_mean):
    policy, batch = table(0), tokens(prompts=(1, 2), chosen=(5, 6)) if same_mean else tokens()
    ours = pairs(policy, policy, batch)
    loss = preference.orpo(ours, beta=BETA).mean()
    if not same_mean:
        ids, kept, _ = (x[: ROWS // 2, 1:] for x in batch)
        loss = loss - preference.chosen_nll(ours).mean() - policy[ids[kept.bool()]].mean()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    assert_same(loss, concatenated_loss(trainer("orpo"), policy, batch), policy)


@pytest.mark.parametrize("seeds", [(0, 1), (1, 0)], ids=["z0 above 0", "z0 clamped"])
def test_kto(trainer, seeds):
    policy, reference = map(table, seeds)
    batch, others, desirable = tokens(), tokens(first_id=ROWS * LENGTH), torch.arange(ROWS) % 3 == 0
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.8}
    made = trainer("kto", loss_type="kto", calculate_KL=True, **weights)
    inputs, log_ratios = {"label": desirable}, []
    for prefix, part in (("", batch), ("KL_", others)):
        names = [prefix + name for name in ("input_ids", "attention_mask", "completion_mask")]
        inputs |= dict(zip(names, part, strict=True)) | {f"ref_{prefix}logps": sums(reference.detach(), part)[0]}
        log_ratios.append(sums(policy, part)[0] - inputs[f"ref_{prefix}logps"])
    z0 = preference.kto_reference_point(log_ratios[1].sum(), torch.tensor(ROWS))
    assert (z0 > 0) == (seeds == (0, 1))
    ours = preference.kto(log_ratios[0], desirable, z0, beta=BETA, **weights)
    assert_same(ours.mean(), made._compute_loss(model(policy), inputs, False), policy)


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("centring", [None, 0.01])
def test_bradley_terry(trainer, margin, centring):
    scores = table(2)[:ROWS, None]
    chosen, rejected = scores[:, 0].chunk(2)
    margins = -table(3)[: ROWS // 2].detach() if margin else 0.0
    ours = bradley_terry(chosen, rejected, margin=margins, centring=centring or 0.0)
    made = trainer("reward", args=SimpleNamespace(center_rewards_coefficient=centring))
    inputs = {"attention_mask": torch.ones(ROWS, 1)} | ({"margin": margins} if margin else {})
    theirs = made.compute_loss(lambda **_: SimpleNamespace(logits=scores), inputs)
    assert_same(ours.mean(), theirs, scores)
