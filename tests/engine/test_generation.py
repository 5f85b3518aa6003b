"""Generation equals transformers' greedy search on the same weights, and itself on every layout and batch."""

import functools

import pytest
import torch
from support import families
from support.generation import prompts
from support.parity import CP2, EP2, OVERLAP, PP2, SP, TP2, VPP2
from support.slow import slow_but

GENERATE = "support.generation:generate"
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.9}
SAMPLED_FROM = {"all": SAMPLED, "some": {**SAMPLED, "top_k": 40, "top_p": 0.9}}
"""Tokens that may be drawn."""


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
@pytest.mark.parametrize("params", slow_but(SAMPLED_FROM, "all"))
def test_samples_do_not_depend_on_the_layout(ranks, saved, case, params):
    name, world_size, layout = LAYOUTS[case]
    sampled = {"params": SAMPLED_FROM[params], "batch": 3}
    single = ranks(1, GENERATE, directory=saved(name), layout={}, **sampled)[0]
    found = ranks(world_size, GENERATE, directory=saved(name), layout=layout, **sampled)
    for rank in found:
        assert_same(rank, single)


@pytest.mark.parametrize("case", ["one", "tp2", "pp2", "mixtral"])
@pytest.mark.parametrize("params", [{"temperature": 0.7}, {"temperature": 1.3, "top_k": 5}, GREEDY])
def test_log_probabilities_are_those_of_a_training_forward_pass(ranks, saved, case, params):
    """Of the full distribution at the temperature, top_k or not; at temperature 1 for greedy text."""
    name = case if case in families.FAMILIES else "qwen2"
    world_size, layout = {"tp2": (2, SP), "pp2": (2, PP2)}.get(case, (1, {}))
    found = ranks(world_size, "support.generation:log_probs", directory=saved(name), layout=layout, params=params)
    for ours, theirs in found[-1]:
        assert len(ours) == 20
        assert ours == pytest.approx(theirs, abs=1e-5)


ADAPTERS = {
    "lora": (1, {}, {"peft.method": "lora", "peft.rank": 4}),
    "lora_tp2_sp": (2, SP, {"peft.method": "lora", "peft.rank": 4}),
    "dora": (1, {}, {"peft.method": "dora", "peft.rank": 4}),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(ranks, case):
    world_size, layout, peft = ADAPTERS[case]
    plain = ranks(world_size, "support.generation:adapted", layout=layout, peft=peft | {"optim.lr": 0.0})
    moved = ranks(world_size, "support.generation:adapted", layout=layout, peft=peft | {"optim.lr": 0.1})
    for found in (plain, moved):
        assert all(ours == theirs for rank in found for ours, theirs in rank)
    assert moved[0] != plain[0], "the adapters must matter"


@pytest.mark.parametrize("case", ["dense", "experts"])
def test_replicas_may_have_other_numbers_of_prompts(ranks, saved, case):
    """Experts are shared by the replicas: one that is done runs passes of padding for the other's tokens."""
    name, layout = ("llama3", {}) if case == "dense" else ("mixtral", EP2)
    single = ranks(1, GENERATE, directory=saved(name), layout={}, params=SAMPLED, batch=3)[0]
    found = ranks(2, "support.generation:uneven", directory=saved(name), layout=layout, counts=[0, 5])
    assert found[0] == []
    assert_same(found[1], single[:5])


@pytest.mark.parametrize("case", ["one", "dp2_overlap"])
def test_generation_between_steps_of_training(ranks, case):
    """It follows the weights, and leaves training as it was; parameters that are gathered late are whole for it."""
    world_size, layout = (1, {}) if case == "one" else (2, OVERLAP)
    found = ranks(world_size, "support.generation:training_between", overrides=layout)
    alone = ranks(world_size, "support.training:train", overrides=layout, steps=3)
    for rank, plain in zip(found, alone, strict=True):
        assert rank["losses"] == plain["loss"]
        assert all(ours == theirs for ours, theirs in rank["texts"])


def test_stop_token(ranks, saved):
    """A sample ends with the stop token, which it includes; the others go on."""
    whole = transformers_greedy("llama3")
    stop = whole[2][3]
    options = {"directory": saved("llama3"), "layout": {}, "batch": 3}
    found = ranks(1, GENERATE, params={**GREEDY, "stop": [stop]}, **options)[0]
    for completion, tokens in zip(found, whole, strict=True):
        assert completion.finished == (stop in tokens)
        assert completion.tokens == (tokens[: tokens.index(stop) + 1] if stop in tokens else tokens)
        assert len(completion.log_probs) == len(completion.tokens)
    assert 0 < sum(completion.finished for completion in found) < 8


def test_stop_strings(ranks, saved):
    """One that spans two tokens ends a sample with the second of them; one that never occurs does nothing."""
    decode = families.tokenizer().decode
    whole = transformers_greedy("llama3")
    tokens, place, stop = next(
        (tokens, place, first[-1] + second[0])
        for tokens in whole
        for place in range(2, 18)
        for first, second in [(decode(tokens[place : place + 1]), decode(tokens[place + 1 : place + 2]))]
        if first.isascii() and second.isascii() and first and second and first != second
        and (first[-1] + second[0]) in decode(tokens[: place + 2])
        and (first[-1] + second[0]) not in decode(tokens[: place + 1])
        and (first[-1] + second[0]) not in first + "|" + second
    )  # fmt: skip
    options = {"directory": saved("llama3"), "layout": {}, "batch": 3}
    found = ranks(1, GENERATE, params={**GREEDY, "stop_strings": [stop]}, **options)[0]
    completion = found[whole.index(tokens)]
    assert completion.finished and completion.tokens == tokens[: place + 2]
    never = ranks(1, GENERATE, params={**GREEDY, "stop_strings": ["no such text"]}, **options)[0]
    assert [completion.tokens for completion in never] == whole
    assert not any(completion.finished for completion in never)


def test_what_cannot_be_is_said(ranks, saved):
    said = ranks(1, "support.generation:problems", directory=saved("gpt2"))[0]
    assert said == [
        "1 seeds for 2 prompts: give one for each",
        "prompt 0 has 13 tokens, and with max_new_tokens=4 more than max_seq_length=16: give at most 12, or raise "
        "max_seq_length",
        "prompt 1 is empty: begin it with a token at least",
        "temperature=-1.0: must be 0 (the likeliest token) or larger; 1 is usual",
        "top_k=-1: give 0 for all tokens, or how many of the likeliest",
        "top_p=0.0: is a share of probability; give a number above 0 and at most 1",
        "max_new_tokens=0: must be at least 1; give a larger number",
        "stop_strings: holds an empty text, which every text contains; leave it out",
        "stop_strings=('x',): the Generator was made without `decode`, which turns tokens into text; give it the "
        "tokenizer's",
        "max_seq_length=129: the model has learnt 128 positions; give at most 128",
    ]


@pytest.mark.parametrize("layout", [{}, TP2, PP2], ids=["1", "tp2", "pp2"])
def test_tokens_are_seen_as_they_come_and_may_end_a_sample(ranks, saved, layout):
    """On every rank alike; a sample that is ended leaves its slot to the next."""
    for found in ranks(len(layout) + 1, "support.generation:seen", directory=saved("llama3"), layout=layout):
        assert [found["told"][number] for number in range(3)] == [completion.tokens for completion in found["whole"]]
        wanted = [completion.tokens for completion in found["whole"]]
        wanted[1] = wanted[1][:3]
        assert [completion.tokens for completion in found["halted"]] == wanted
        assert not any(completion.finished for completion in found["halted"])
