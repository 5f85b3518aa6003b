"""Draws follow the softmax that numpy computes, filtered as asked, on one rank and on four that share it."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from scale_llm.engine.generation.noise import gumbel, id_words, token_keys
from scale_llm.engine.generation.samples import SamplingParams
from scale_llm.engine.generation.sampling import Sampler

DRAWS = 40_000
VOCABULARY = 21


@pytest.fixture(scope="module")
def alone():
    """A group of this process."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def logits() -> torch.Tensor:
    """[v] of very unequal tokens."""
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3)) * 2


def oracle(temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities [v] in FP64: temperature, then top_k, then top_p of what is left."""
    values = logits().double().numpy() / temperature
    probability = np.exp(values - values.max())
    order = np.argsort(-probability)
    if top_k:
        probability[order[top_k:]] = 0
    probability /= probability.sum()
    before = np.cumsum(probability[order]) - probability[order]
    probability[order[before >= top_p]] = 0
    return probability / probability.sum()


FILTERS = [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 4, 1.0), (1.0, 0, 0.8), (1.5, 6, 0.7), (1.0, 0, 0.05), (1.0, 100, 1.0)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), FILTERS)
def test_frequencies(alone, temperature, top_k, top_p):
    """Chi-square over the tokens that can be drawn: below its 99.99% point, for fixed seeds; others never are."""
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=1)
    keys = token_keys(list(range(DRAWS)), [5] * DRAWS)
    rows = torch.nn.functional.pad(logits(), (0, 11), value=50.0).expand(DRAWS, -1)  # padding must never win
    tokens, log_probs = Sampler(params, alone, VOCABULARY)(rows, keys)
    wanted = oracle(temperature, top_k, top_p)
    counts = np.bincount(tokens.numpy(), minlength=VOCABULARY)
    possible = wanted > 0
    assert counts[~possible].sum() == 0
    chi = ((counts - DRAWS * wanted)[possible] ** 2 / (DRAWS * wanted[possible])).sum()
    freedom = possible.sum() - 1
    assert chi < freedom + 4 * np.sqrt(2 * freedom) + 8, (chi, freedom)
    full = torch.log_softmax(logits().double() / temperature, dim=0)
    assert torch.allclose(log_probs.double(), full[tokens], atol=1e-6)


def test_every_step_and_seed_has_noise_of_its_own():
    """Means, variances and correlations of neighbouring seeds, steps and ids are those of independent Gumbel noise."""
    ids = id_words(0, 4096, torch.device("cpu"))
    by_step = gumbel(ids, token_keys([11] * 64, list(range(64)))).double()
    by_seed = gumbel(ids, token_keys(list(range(64)), [11] * 64)).double()
    for noise in (by_step, by_seed, by_step.T, by_seed.T):
        assert abs(float(noise.mean()) - 0.5772) < 0.02
        assert abs(float(noise.var()) - np.pi**2 / 6) < 0.03
        deviation = noise - noise.mean()
        assert abs(float((deviation[1:] * deviation[:-1]).mean())) < 0.02
    assert by_step.flatten().unique().numel() > 0.99 * by_step.numel()
    assert by_step.min() > -4 and by_step.max() < 23


def test_noise_does_not_depend_on_how_the_vocabulary_is_cut():
    keys = token_keys([3, -1, 2**63], [0, 1, 2])
    whole = gumbel(id_words(0, 100, torch.device("cpu")), keys)
    parts = [gumbel(id_words(first, 25, torch.device("cpu")), keys) for first in range(0, 100, 25)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [*FILTERS, (0.0, 0, 1.0)])
def test_four_ranks_draw_what_one_draws(alone, ranks, temperature, top_k, top_p):
    """21 tokens over four shards of 8: the last holds padding alone."""
    values = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    keys = token_keys(list(range(200)), [1] * 200)
    params = SamplingParams(**values, max_new_tokens=1)
    rows = torch.nn.functional.pad(logits(), (0, 11), value=50.0).expand(200, -1)
    tokens, log_probs = Sampler(params, alone, VOCABULARY)(rows, keys)
    for found in ranks(4, "support.generation:drawn", logits=rows[0].tolist(), count=200, params=values):
        assert found[0] == tokens.tolist()
        assert found[1] == pytest.approx(log_probs.tolist(), abs=1e-6)


def test_a_nucleus_beyond_the_first_candidates(alone):
    """3,000 tokens of nearly one probability, of which 0.9 needs more than are looked at first."""
    params = SamplingParams(top_p=0.9, max_new_tokens=1)
    rows = torch.linspace(0, 1e-3, 3000).expand(2000, -1)
    tokens, _ = Sampler(params, alone, 3000)(rows, token_keys(list(range(2000)), [0] * 2000))
    assert 299 <= int(tokens.min()) < 330 and int(tokens.max()) > 2950
    assert abs(float(tokens.double().mean()) - 1650) < 60
