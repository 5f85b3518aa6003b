"""A wrong table is caught: each test makes one classic mistake on purpose and sees the parity of logits break."""

import json
import shutil

import pytest
import torch
from support import families
from support.ranks import RanksFailed

from scale_llm.checkpoint.huggingface import HuggingFaceModel
from scale_llm.config.errors import UserError

OUTPUT = "support.conversion:output"
MISTAKES = ["plain_qkv", "up_above_gate", "swapped_norms", "no_rope_scaling", "other_rope_scaling", "padding_first"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_logits_show_a_mistake(models, ranks, mistake):
    """100 times the tolerance of the parity tests, on the same text and model that passes them without the mistake."""
    tokens = families.tokens(2, 97)
    # A run from the directory itself would refuse another rope; its conversion is loaded as it is.
    directory = models.imported("llama3") if "rope" in mistake else models.original("llama3")
    arguments = {"directory": str(directory), "data": models.saved("tokens", tokens), "layout": {}}
    with torch.no_grad():
        wanted = families.build("llama3")(tokens[:, :-1]).logits
    right, wrong = (ranks(1, OUTPUT, mistake=m, **arguments)[0] for m in (None, mistake))
    assert (right - wanted).abs().max() < 1e-4
    assert (wrong - wanted).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [("llama3", "rope_scaling_factor", 2.0), ("qwen2", "add_qkv_bias", False), ("llama3", "norm_epsilon", 1e-3),
     ("mistral", "window_size", None), ("llama3", "untie_embeddings_and_output_weights", False),
     ("qwen3_moe", "moe_router_topk", 1)],
)  # fmt: skip
def test_a_run_of_another_function_is_refused(models, ranks, name, field, value):
    """Weights of the same shapes load into another model only where that is said."""
    arguments = {"directory": str(models.original(name)), "data": models.saved("tokens", families.tokens(2, 97))}
    with pytest.raises(RanksFailed, match=rf"model.{field}={value}: checkpoint.load=.* has"):
        ranks(1, OUTPUT, layout={f"model.{field}": value}, **arguments)


@pytest.mark.parametrize(("name", "tied"), [("llama3", True), ("qwen2", False)])
def test_tied_embeddings_that_are_not(models, tmp_path, name, tied):
    """config.json says the opposite of the weights: an output table too many, or one too few."""
    directory = tmp_path / "model"
    shutil.copytree(models.original(name), directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    with pytest.raises(UserError, match="lm_head.weight is " + ("not a tensor" if tied else "missing")):
        HuggingFaceModel(directory)


def test_a_saved_copy_of_a_tied_table_is_accepted(models, tmp_path):
    """Some checkpoints hold lm_head.weight although it is tied; where it is the table's copy, nothing is lost."""
    from safetensors.torch import load_file, save_file

    directory = tmp_path / "model"
    shutil.copytree(models.original("qwen2"), directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, directory / "model.safetensors")
    HuggingFaceModel(directory)
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError, match="lm_head.weight"):
        HuggingFaceModel(directory)
