"""Whole runs of reward models, from a base model that a run has pretrained; and from a Hugging Face directory."""

import math

import pytest
import torch
from support import families
from support.runs import latest, rows

from scale_llm.checkpoint.huggingface import export_huggingface
from scale_llm.stages.interval import wilson_interval

TP2 = "parallel.tensor_model_parallel_size=2"
RANKS2 = "cluster.nproc_per_node=2"
WORDS = ["stage=reward", "model=from_checkpoint", "model.seq_length=96", "data.split='80,20,0'", "optim.lr=1e-3",
         "train.global_batch_size=4", "train.micro_batch_size=1", "train.train_iters=12", "train.eval_interval=6",
         "optim.lr_warmup_iters=0"]  # fmt: skip


def words(base, pairs, *more):
    return [*WORDS, f"data.path={pairs}", f"checkpoint.load={base}", *more]


@pytest.fixture(scope="session")
def single(runs, base, pairs, tmp_path_factory):
    run = tmp_path_factory.mktemp("reward") / "single"
    assert runs(run, *words(base, pairs, "stage.batching=padded")) == []
    return run


def test_learns(single):
    found = [row for row in rows(single) if "reward loss" in row]
    assert found[-1]["reward loss"] < 0.5 * found[0]["reward loss"]
    assert found[-1]["rewards/accuracies"] == 1.0
    (last,) = [row for row in rows(single) if row["iteration"] == 12 and "reward loss validation" in row]
    low, high = (last[f"rewards/accuracies validation 95% {end}"] for end in ("low", "high"))
    assert low < last["rewards/accuracies validation"] <= high <= 1.0
    assert low > 0.5, "six pairs, all right, are better than chance at 95%"


WAYS = {
    "padded_by_two": ["stage.batching=padded", "train.micro_batch_size=2"],
    "budget_dp2": ["stage.batching=token_budget", RANKS2],
    "padded_tp2_sp": ["stage.batching=padded", TP2, "parallel.sequence_parallel=true"],
    "budget_pp2": ["stage.batching=token_budget", "parallel.pipeline_model_parallel_size=2"],
    "budget_cp2": ["stage.batching=token_budget", "parallel.context_parallel_size=2"],
}


@pytest.mark.parametrize("way", WAYS)
def test_layouts_and_splits_agree(runs, tmp_path, base, pairs, single, way):
    """Every loss and reward; of gradient norms the first, of equal weights: AdamW's first steps are of one size
    for every weight, however small its gradient, so rounding moves later ones by more than another order of sums."""
    run = tmp_path / "run"
    assert runs(run, *words(base, pairs, *WAYS[way])) == []
    found, wanted = rows(run), rows(single)
    assert abs(found[0]["grad-norm"] / wanted[0]["grad-norm"] - 1) < 1e-5
    for row, like in zip(found, wanted, strict=True):
        for key in like.keys() - {"grad-norm"}:
            assert abs(row[key] - like[key]) <= 3e-5 * max(1.0, abs(like[key])), (row["iteration"], key)


def test_resume_is_bit_for_bit(runs, tmp_path, base, pairs):
    resumed, whole = tmp_path / "resumed", tmp_path / "whole"
    said = words(base, pairs, "stage.center_rewards_coefficient=0.01")
    assert runs(resumed, *said, "train.exit_interval=6") == []
    assert latest(resumed) == 6
    assert runs(resumed, *said) == []
    assert runs(whole, *said) == []
    assert rows(resumed) == rows(whole)
    assert not {name: d for name, d in runs.differences(resumed, whole, iteration=12).items() if d}


def test_exports_as_a_classifier_that_scores_the_same(runs, tmp_path, pairs):
    """From a Hugging Face language model to AutoModelForSequenceClassification: the last answer's score there is the
    reward here."""
    from transformers import AutoModelForSequenceClassification

    from scale_llm.config.io import load_config
    from scale_llm.data.chat.preferences import load_preferences
    from scale_llm.data.of_stage import prepare_run

    directory, run = families.save("llama3", tmp_path / "model"), tmp_path / "run"
    (directory / "chat_template.jinja").unlink()
    sizes = ["model.ffn_hidden_size=112", "model.num_attention_heads=8", "model.num_query_groups=4"]
    said = words(directory, pairs, f"tokenizer.path={directory}", "tokenizer.eod_token='</s>'", *sizes)
    said += ["model.seq_length=128", "train.train_iters=1", "optim.lr=1e-9", "optim.min_lr=0", "data.split='50,50,0'",
             "train.eval_iters=100"]  # fmt: skip
    assert runs(run, *said) == []
    (row,) = [row for row in rows(run) if "reward loss validation" in row]
    export_huggingface(run / "checkpoints", tmp_path / "exported", lambda total: lambda done: None)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported", dtype=torch.float32).eval()
    assert model.config.num_labels == 1
    cfg = load_config(run)
    preferences = load_preferences(prepare_run(cfg))
    from scale_llm.data.chat.examples import split_indices

    held_out = split_indices(len(preferences), cfg.data.split, "validation")
    with torch.no_grad():
        chosen = [_score(model, preferences.sequences[int(preferences.groups[i])]) for i in held_out]
    assert math.isclose(sum(chosen) / len(chosen), row["rewards/chosen validation"], abs_tol=1e-4)


def _score(model, example) -> float:
    """transformers' score of the tokens up to the last that counts, which is the end of the answer's turn."""
    last = int(example.trained.nonzero()[0][-1])
    tokens = torch.from_numpy(example.tokens[: last + 1])[None]
    return model.score(model.model(tokens).last_hidden_state)[0, -1, 0].item()


def test_interval_of_a_share():
    """Wilson 1927: 8 of 10 is 0.490 to 0.943, which holds chance."""
    low, high = wilson_interval(8, 10)
    assert math.isclose(low, 0.4902, abs_tol=1e-4) and math.isclose(high, 0.9433, abs_tol=1e-4)
