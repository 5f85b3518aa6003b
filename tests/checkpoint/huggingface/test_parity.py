"""An imported model computes what transformers computes, on real text, under every layout."""

import pytest
import torch
import torch.nn.functional as F
from support import families
from support.parity import CP2, EP2, PP2, SP, TP2

LAYOUTS = {"single": (1, {}), "tp2": (2, TP2), "pp2": (2, PP2)}
CASES = [(name, layout) for name in families.FAMILIES for layout in LAYOUTS]
MORE = {
    "mixtral_ep2": ("mixtral", 2, EP2),
    "qwen3_moe_ep2": ("qwen3_moe", 2, EP2),
    "mistral_cp2": ("mistral", 2, CP2),  # its window spans the ranks
    "llama3_tp2_sp": ("llama3", 2, SP),
}
LENGTH = 96  # longer than mistral's window and than llama3's original length


def inputs(models):
    tokens = families.tokens(2, LENGTH + 1)
    return tokens, models.saved("tokens", tokens)


def reference(name, tokens):
    """transformers' logits or scores, a score for every token [b, s, 1]."""
    model = families.build(name)
    with torch.no_grad():
        if hasattr(model, "score") and not hasattr(model, "lm_head"):
            return model.score(model.base_model(tokens[:, :-1]).last_hidden_state)
        return model(tokens[:, :-1]).logits


def check(models, ranks, name, world_size, layout, directory):
    tokens, file = inputs(models)
    wanted = reference(name, tokens)
    assert wanted.std() > 0.1, "constant logits would agree with anything"
    arguments = {"directory": str(directory), "data": file, "layout": layout}
    answers = [x for x in ranks(world_size, "support.conversion:output", **arguments) if x is not None]
    if "parallel.context_parallel_size" in layout:  # rank r holds chunks r and 3 - r
        chunks = [half for x in answers for half in x.chunk(2, dim=1)]
        answers = [torch.cat([chunks[i] for i in (0, 2, 3, 1)], dim=1)]
    assert answers
    for answer in answers:
        assert (answer - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_logits_of_an_imported_model(models, ranks, name, layout):
    world_size, overrides = LAYOUTS[layout]
    check(models, ranks, name, world_size, overrides, models.imported(name))


@pytest.mark.parametrize("case", MORE)
def test_logits_under_other_layouts(models, ranks, case):
    name, world_size, overrides = MORE[case]
    check(models, ranks, name, world_size, overrides, models.imported(name))


@pytest.mark.parametrize("name", ["llama3", "mixtral", "gpt2"])
def test_a_run_starts_from_the_directory_itself(models, ranks, name):
    """checkpoint.load names the Hugging Face directory: nothing is converted first."""
    check(models, ranks, name, 2, TP2, models.original(name))


@pytest.mark.parametrize("name", families.HEADS)
@pytest.mark.parametrize("layout", ["single", "sp"])
def test_scores_of_a_reward_or_value_model(models, ranks, name, layout):
    world_size, overrides = {"single": (1, {}), "sp": (2, SP)}[layout]
    check(models, ranks, name, world_size, overrides, models.imported(name))


TRAINED = {"llama3": TP2, "qwen2": PP2, "gpt2": TP2, "mixtral": EP2, "qwen3_moe": SP, "qwen3": PP2, "mistral": {}}
RATE, STEPS = 0.05, 10


@pytest.mark.parametrize("name", TRAINED)
def test_ten_steps_of_sgd(models, ranks, name):
    """The same weights, batches and steps in transformers: every loss within 1e-4."""
    batches = torch.stack([families.tokens(2, 33, start=i) for i in range(STEPS)])
    model = families.build(name).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    wanted = []
    for tokens in batches:
        logits = model(tokens[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        wanted.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert wanted[0] - wanted[-1] > 0.1, "training must show"
    arguments = {"directory": str(models.original(name)), "data": models.saved("batches", batches), "lr": RATE}
    layout = TRAINED[name]
    world_size = 2 if layout else 1
    for losses in ranks(world_size, "support.conversion:train", layout=layout, **arguments):
        assert max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) < 1e-4, (losses, wanted)
