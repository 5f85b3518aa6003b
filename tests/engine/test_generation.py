"""Generation equals transformers' greedy search on the same weights, and itself on every layout and batch."""

import functools

import pytest
import torch
from support import families
from support.generation import prompts
from support.parity import CP2, EP2, PP2, SP, TP2, VPP2

GENERATE = "support.generation:generate"
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.9}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Directory of a family's model as transformers saves it."""

    @functools.cache
    def save(name: str) -> str:
        return str(families.save(name, tmp_path_factory.mktemp(name)))

    return save


@functools.cache
def transformers_greedy(name: str) -> list[list[int]]:
    """20 tokens after each prompt, one prompt at a time, so that nothing is padded."""
    model, found = families.build(name), []
    for prompt in prompts(8):
        tokens = torch.tensor([prompt])
        out = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=20, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
        found.append(out[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("name", families.FAMILIES)
def test_greedy_equals_transformers(ranks, saved, name):
    """Eight prompts of 1 to 23 tokens in three slots: each slot is used again. Scaled RoPE, windows, grouped queries,
    QK norm, biases, learned positions and experts are among the families."""
    found = ranks(1, GENERATE, directory=saved(name), layout={}, params=GREEDY, batch=3)[0]
    assert [completion.tokens for completion in found] == transformers_greedy(name)
    assert not any(completion.finished for completion in found)


@pytest.mark.parametrize("backend", ["local"])
def test_other_layers_have_the_same_pass(ranks, saved, backend):
    found = ranks(1, "support.generation:with_backend", directory=saved("llama3"), backend=backend)[0]
    assert [completion.tokens for completion in found] == transformers_greedy("llama3")


BATCHES = {"1": {"batch": 1}, "3": {"batch": 3}, "8": {"batch": 8},
           "8_in_another_order": {"batch": 8, "order": [5, 2, 7, 0, 1, 6, 3, 4]}}  # fmt: skip


def assert_same(found, wanted, order=None) -> None:
    """Tokens exactly, log-probabilities to 1e-5."""
    wanted = wanted if order is None else [wanted[i] for i in order]
    assert [completion.tokens for completion in found] == [completion.tokens for completion in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-5)


@pytest.mark.parametrize("batch", BATCHES)
def test_samples_do_not_depend_on_the_batch(ranks, saved, batch):
    alone = ranks(1, GENERATE, directory=saved("llama3"), layout={}, params=SAMPLED, batch=2)[0]
    assert len({tuple(completion.tokens) for completion in alone}) == 8
    options = BATCHES[batch]
    found = ranks(1, GENERATE, directory=saved("llama3"), layout={}, params=SAMPLED, **options)[0]
    assert_same(found, alone, options.get("order"))


LAYOUTS = {
    "tp2": ("llama3", 2, TP2),
    "tp2_sp": ("llama3", 2, SP),
    "pp2": ("llama3", 2, PP2),
    "tp2_pp2": ("llama3", 4, {**TP2, **PP2}),
    "tp2_sp_pp2": ("llama3", 4, {**SP, **PP2}),
    "pp2_vpp2": ("llama3", 2, VPP2),
    "cp2": ("llama3", 2, CP2),
    "tp2_sp_cp2": ("llama3", 4, {**SP, **CP2}),
    "qk_norm_tp2_sp": ("qwen3", 2, SP),
    "gpt2_pp2": ("gpt2", 2, PP2),
    "gpt2_tp2_sp": ("gpt2", 2, SP),
    "moe_ep2": ("mixtral", 2, EP2),
    "moe_pp2": ("mixtral", 2, PP2),
    "moe_tp2_sp": ("mixtral", 2, SP),
    "moe_tp2_sp_ep2": ("mixtral", 2, {**SP, **EP2, "parallel.expert_tensor_parallel_size": 1}),
    "moe_cp2_ep2": ("mixtral", 2, {**CP2, **EP2}),
}


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("params", [SAMPLED, {**SAMPLED, "top_k": 40, "top_p": 0.9}], ids=["all", "some"])
def test_samples_do_not_depend_on_the_layout(ranks, saved, case, params):
    name, world_size, layout = LAYOUTS[case]
    single = ranks(1, GENERATE, directory=saved(name), layout={}, params=params, batch=3)[0]
    found = ranks(world_size, GENERATE, directory=saved(name), layout=layout, params=params, batch=3)
    for rank in found:
        assert_same(rank, single)
