"""Whole runs of reward models, from a base model that a run has pretrained; and from a Hugging Face directory."""

import json
import math

import pytest
import torch
from support import families
from support.runs import PADDED, PP2, RANKS2, SPLITS, TP2, assert_close, last_validation, rows, words_from

from scale_llm.checkpoint.huggingface import export_huggingface
from scale_llm.config.errors import UserError
from scale_llm.stages.interval import wilson_interval

WORDS = ["stage=reward", "model=from_checkpoint", "model.seq_length=96", "data.split='80,20,0'", "optim.lr=1e-3",
         "train.global_batch_size=4", "train.micro_batch_size=1", "train.train_iters=12", "train.eval_interval=6",
         "optim.lr_warmup_iters=0"]  # fmt: skip
words = words_from(WORDS)


@pytest.fixture(scope="session")
def single(runs, base, pairs, tmp_path_factory):
    run = tmp_path_factory.mktemp("reward") / "single"
    assert runs(run, *words(base, pairs, PADDED)) == []
    return run


def test_learns(single):
    found = [row for row in rows(single) if "reward loss" in row]
    assert found[-1]["reward loss"] < 0.5 * found[0]["reward loss"]
    assert found[-1]["rewards/accuracies"] == 1.0
    last = last_validation(single)
    low, high = (last[f"rewards/accuracies validation 95% {end}"] for end in ("low", "high"))
    assert low < last["rewards/accuracies validation"] <= high <= 1.0
    assert low > 0.5, "six pairs, all right, are better than chance at 95%"


SGD = ["optim.optimizer=sgd", "optim.lr=0.3", "optim.lr_decay_style=constant", "optim.sgd_momentum=0.9",
       "train.train_iters=6"]  # fmt: skip
"""AdamW's first steps are of one size for every weight, however small its gradient, so that the roundings of another
order of sums grow; of plain gradients everything is to agree, gradient norms too."""


@pytest.fixture(scope="session")
def single_sgd(runs, base, pairs, tmp_path_factory):
    run = tmp_path_factory.mktemp("reward_sgd") / "single"
    assert runs(run, *words(base, pairs, *SGD, PADDED)) == []
    found = [row["reward loss"] for row in rows(run) if "reward loss" in row]
    assert found[-1] < 0.8 * found[0], "training must show"
    return run


@pytest.mark.parametrize("way", SPLITS)
def test_layouts_and_splits_agree(runs, tmp_path, base, pairs, single_sgd, way):
    """Every loss, reward and gradient norm of training and validation."""
    assert runs(tmp_path / "run", *words(base, pairs, *SGD, *SPLITS[way])) == []
    assert_close(tmp_path / "run", single_sgd)


def test_resume_is_bit_for_bit(runs, tmp_path, base, pairs):
    said = words(base, pairs, "stage.center_rewards_coefficient=0.01")
    runs.resumed_and_whole(tmp_path, *said, stop=6, iteration=12)


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
    row = last_validation(run)
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


LISTS = ["stage.loss=plackett_luce"]


def test_ranked_lists_whole(runs, tmp_path, base, ranked):
    """Lists of two to four answers; every split and layout has the same losses, and their order is learnt."""
    one, two, learns = tmp_path / "one", tmp_path / "two", tmp_path / "learns"
    said = words(base, ranked, *LISTS)
    assert runs(one, *said, *SGD, PADDED) == []
    assert runs(two, *said, *SGD, TP2, "stage.batching=token_budget", "stage.max_tokens_per_micro_batch=320") == []
    assert_close(two, one)
    assert runs(learns, *said, "train.train_iters=15", "train.eval_interval=null") == []
    last = last_validation(learns)
    assert last["rewards/accuracies validation"] > 0.85 and last["rewards/margins validation"] > 1.0


def test_a_list_longer_than_the_budget_is_refused(runs, tmp_path, base, ranked):
    budget = ["stage.batching=token_budget", "stage.max_tokens_per_micro_batch=192"]
    (problem,) = runs(tmp_path / "run", *words(base, ranked, *LISTS, *budget))
    assert "stage.max_tokens_per_micro_batch=192" in problem and "a list of answers takes" in problem


def test_margins_go_with_pairs_alone(runs, tmp_path, base, pairs):
    (problem,) = runs(tmp_path / "run", *words(base, pairs, *LISTS))
    assert "10 rows have one" in problem and "data.fields.margin" in problem


def test_a_reward_for_every_token(runs, tmp_path, base, pairs, single_sgd):
    """The mean over an answer's tokens: learns as well, differs from the last token's; context parallelism agrees."""
    one, two = tmp_path / "one", tmp_path / "two"
    said = words(base, pairs, "stage.score=mean_of_tokens")
    assert runs(one, *said, *SGD, PADDED) == []
    assert runs(two, *said, *SGD, *SPLITS["budget_cp2"]) == []
    assert_close(two, one)
    found = [row for row in rows(one) if "reward loss" in row]
    assert found[-1]["reward loss"] < 0.8 * found[0]["reward loss"]
    assert found[0]["rewards/chosen"] != rows(single_sgd)[0]["rewards/chosen"]


def test_calibration_is_reported(single):
    last = last_validation(single)
    assert 0.0 < last["rewards/calibration error validation"] < 0.5
    assert not [key for key in last if key.startswith("calibration/")]
    assert b"calibration/text_summary" in next((single / "tensorboard").iterdir()).read_bytes()


@pytest.mark.parametrize("way", [[], ["stage.score=mean_of_tokens"]], ids=["last_token", "mean_of_tokens"])
def test_scores_of_a_file(runs, tmp_path, base, pairs, way):
    """The held-out rewards of training again, from the checkpoint and a file of conversations, on every layout."""
    run, answers = tmp_path / "run", tmp_path / "answers.jsonl"
    assert runs(run, *words(base, pairs, *way, "data.split='50,50,0'",
                            "train.train_iters=2", "train.eval_iters=100")) == []  # fmt: skip
    wanted = last_validation(run)
    held_out = _held_out(run)
    with open(answers, "w") as file:
        for kind in ("chosen", "rejected"):
            for row in held_out:
                file.write(json.dumps({"prompt": row["prompt"], "response": row[kind], "id": kind}) + "\n")
    for number, layout in enumerate([[], [TP2], [RANKS2], [PP2]]):
        out = tmp_path / f"scores{number}"
        said = ["stage=score", "model=from_checkpoint", f"checkpoint.load={run / 'checkpoints'}",
                f"data.path={answers}"]  # fmt: skip
        assert runs(out, *said, *layout) == []
        scored = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
        assert [row["response"] for row in scored] == [row[kind] for kind in ("chosen", "rejected") for row in held_out]
        for kind in ("chosen", "rejected"):
            mean = sum(row["score"] for row in scored if row["id"] == kind) / len(held_out)
            assert abs(mean - wanted[f"rewards/{kind} validation"]) < 3e-5, (layout, kind)


def _held_out(run) -> list[dict]:
    """The rows that a run evaluates on, as its file has them."""
    from scale_llm.config.io import load_config
    from scale_llm.data.chat.examples import split_indices
    from scale_llm.data.chat.preferences import load_preferences
    from scale_llm.data.of_stage import prepare_run

    cfg = load_config(run)
    preferences = load_preferences(prepare_run(cfg))
    places = [preferences.where(int(i)) for i in split_indices(len(preferences), cfg.data.split, "validation")]
    lines = open(cfg.data.path).read().splitlines()
    return [json.loads(lines[int(place.rsplit(":", 1)[1]) - 1]) for place in places]


def test_a_language_model_scores_nothing(runs, tmp_path, base, pairs):
    with pytest.raises(UserError, match="model.head=language_model: has no number for an answer"):
        runs(tmp_path / "run", "stage=score", "model=from_checkpoint", f"checkpoint.load={base}", f"data.path={pairs}")


def test_interval_of_a_share():
    """Wilson 1927: 8 of 10 is 0.490 to 0.943, which holds chance."""
    low, high = wilson_interval(8, 10)
    assert math.isclose(low, 0.4902, abs_tol=1e-4) and math.isclose(high, 0.9433, abs_tol=1e-4)
