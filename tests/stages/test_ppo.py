"""Whole runs of PPO: the same numbers wherever the roles lie, and what is refused."""

import json
import shutil

import pytest
from support.policy_words import words
from support.runs import latest, rows
from support.slow import slow_but

from scale_llm.config.errors import UserError
from scale_llm.launch.plan_table import print_plan
from scale_llm.launch.runs import compose_run

TP2 = "parallel.tensor_model_parallel_size=2"
PP2 = "parallel.pipeline_model_parallel_size=2"
RANKS4 = "cluster.nproc_per_node=4"
FIVE = ["stage=ppo", "train.train_iters=5", "train.eval_interval=5", "train.eval_iters=1", "stage.ppo_epochs=2",
        "stage.ppo_mini_batch_size=4", "optim.lr=3e-4"]  # fmt: skip


@pytest.fixture(scope="session")
def judge(runs, base, digits, tmp_path_factory):
    """Checkpoints of a reward model of another shape than the policy, with the policy's tokenizer."""
    pairs = digits.with_name("digit_pairs.jsonl")
    with open(pairs, "w") as file:
        for line in digits.read_text().splitlines():
            row = json.loads(line)
            file.write(json.dumps({"prompt": row["prompt"], "chosen": row["label"], "rejected": "No idea"}) + "\n")
    (tokenizer,) = base.glob("iter_*/tokenizer")
    small = tmp_path_factory.mktemp("judge")
    model = ["model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=96"]
    alone = [f"tokenizer.path={tokenizer}", "train.train_iters=2", "train.eval_iters=0"]
    assert runs(small / "base", *model, *alone) == []
    said = ["stage=reward", "model=from_checkpoint", f"checkpoint.load={small / 'base' / 'checkpoints'}",
            f"data.path={pairs}", "train.train_iters=10", "train.eval_iters=0", "optim.lr=1e-3", *model]  # fmt: skip
    assert runs(small / "run", *said) == []
    return small / "run" / "checkpoints"


@pytest.fixture(scope="session")
def judged_by(judge):
    """A reward that differs between any two answers, from a model and a function."""
    return [f"reward.load={judge}", "reward.load_weight=0.5"]


@pytest.fixture(scope="session")
def single(runs, beginner, digits, judged_by, tmp_path_factory):
    """One process. The critic begins as the reward model, so its shape is not the actor's."""
    path = tmp_path_factory.mktemp("ppo") / "single"
    assert runs(path, *words(beginner, digits, *FIVE, *judged_by)) == []
    return path


def assert_close(run, other, tolerance=1e-5):
    """Every metric of training and validation, relative to 1 or the value."""
    found, wanted = rows(run), rows(other)
    assert [row.keys() for row in found] == [row.keys() for row in wanted]
    for row, like in zip(found, wanted, strict=True):
        for key, value in like.items():
            if key.startswith("rollout/log_prob_diff"):  # rounding itself
                assert row[key] < 1e-5
            else:
                limit = tolerance * max(1.0, abs(value))
                assert abs(row[key] - value) <= limit, (row["iteration"], key, row[key], value)


LAYOUTS = {
    "colocated_tp2": [RANKS4, TP2],
    "split": [RANKS4, TP2, "layout=split", "layout.critic.tensor_model_parallel_size=1"],
    "split_pp2": [
        RANKS4, "layout=split", "layout.actor.pipeline_model_parallel_size=2",
        "parallel.use_distributed_optimizer=true",
    ],
    "hybrid_offloaded": [RANKS4, TP2, "layout=hybrid", "layout.checksum=true", "layout.bucket_megabytes=0.05"],
    "rollout_elsewhere": [
        RANKS4, "layout.actor.ranks=0-1", "layout.actor.tensor_model_parallel_size=2", "layout.rollout.ranks=2-3",
        "layout.reference.ranks=2-3", "layout.critic.offload=true",
    ],
    "context_parallel": ["cluster.nproc_per_node=2", "parallel.context_parallel_size=2"],
}  # fmt: skip


@pytest.mark.parametrize("layout", slow_but(LAYOUTS, "colocated_tp2", "split_pp2", "hybrid_offloaded"))
def test_roles_anywhere_give_the_same_run(runs, beginner, digits, judged_by, single, tmp_path, layout):
    """Five iterations of four optimizer steps each: every reward, loss, norm and ratio; samples are the same texts."""
    assert runs(tmp_path / "run", *words(beginner, digits, *FIVE, *judged_by, *LAYOUTS[layout])) == []
    assert_close(tmp_path / "run", single)
    texts = [(tmp_path / "run" / "transcripts.jsonl"), single / "transcripts.jsonl"]
    said, wanted = ([json.loads(line)["response"] for line in text.read_text().splitlines()] for text in texts)
    assert said == wanted


def test_it_was_a_run_worth_comparing(single):
    """Answers differ in length and worth, something was clipped, the critic moved."""
    last = [row for row in rows(single) if "actor/pg_loss" in row][-1]
    assert last["critic/score/max"] > last["critic/score/min"] and last["response_length/max"] > 1
    assert last["actor/ratio"] != 1 and last["critic/vf_loss"] > 0 and last["actor/reference_kl"] != 0


def test_roles_are_away_while_others_work(runs, beginner, digits, judged_by, tmp_path):
    """layout=hybrid on one rank: the model that is trained is on the device, and no other; weights are moved."""
    said = words(beginner, digits, *FIVE, *judged_by, "layout=hybrid", "train.train_iters=1", "train.eval_iters=0",
                 TP2, "cluster.nproc_per_node=2")  # fmt: skip
    for rank in runs.on_ranks("support.policy:run", tmp_path / "run", *said):
        assert [sorted(name for name, away in each.items() if not away) for each in rank["away"]] == [
            ["critic"],
            ["actor"],
        ]
        assert rank["away"][0].keys() == {"actor", "rollout", "reference", "critic", "reward"}
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert row["perf/weights_bytes_per_second"] > 0 and row["timing_s/weights"] > 0


def test_a_critic_that_diverges_is_named(runs, beginner, digits, tmp_path):
    """On every rank, also of the half that has no part of it; nothing of the broken iteration is saved."""
    said = words(beginner, digits, *FIVE, "stage.critic_lr=1e30", "layout=split", "cluster.nproc_per_node=2")
    problems = runs(tmp_path / "run", *said)
    assert len(problems) == 1 and ": critic: " in problems[0] and "stage.critic_lr=1e+30" in problems[0], problems


def test_a_layout_resumes_another_bit_for_bit(runs, beginner, digits, judged_by, tmp_path):
    """Of one layout to the last bit, of another to rounding; the checkpoint has every role that is trained."""
    said = words(beginner, digits, *FIVE, *judged_by, RANKS4, TP2, "layout=hybrid", "logging.log_params_norm=true")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert runs(whole, *said) == []
    assert runs(resumed, *said, "train.exit_interval=3") == []
    assert latest(resumed) == 3
    shutil.copytree(resumed, tmp_path / "other")
    assert runs(resumed, *said) == []
    assert rows(resumed) == rows(whole)
    assert (resumed / "transcripts.jsonl").read_text() == (whole / "transcripts.jsonl").read_text()
    found = runs.differences(resumed, whole, iteration=5)
    assert not {name: d for name, d in found.items() if d}
    assert any(name.startswith("critic.decoder") for name in found)
    assert any(name.startswith("critic.optimizer.state.exp_avg.") for name in found)
    other = words(beginner, digits, *FIVE, *judged_by, "logging.log_params_norm=true")
    assert runs(tmp_path / "other", *other, "cluster.nproc_per_node=2", "layout=split") == []
    assert_close(tmp_path / "other", whole)


def test_critic_warm_up(runs, beginner, digits, tmp_path):
    """The critic learns alone at first; the actor's weights are those of its start."""
    said = words(beginner, digits, *FIVE, "stage.critic_warmup=2", "train.train_iters=3")
    assert runs(tmp_path / "run", *said) == []
    found = [row for row in rows(tmp_path / "run") if "critic/vf_loss" in row]
    assert ["actor/pg_loss" in row for row in found] == [False, False, True]
    assert all(abs(row["actor/reference_kl"]) < 1e-6 for row in found)


def test_layouts_that_cannot_be(runs, beginner, digits, tmp_path):
    """Everything at once, before any rank is started."""

    def problems(*more: str) -> str:
        with pytest.raises(UserError) as caught:
            runs(tmp_path / "no", *words(beginner, digits, *FIVE, RANKS4, *more))
        return "\n".join(caught.value.problems)

    assert "overlap in 1" in problems("layout.actor.ranks=0-1", "layout.critic.ranks=1-3")
    assert "ranks 3 of 4 have no role" in problems("layout.actor.ranks=0-2")
    assert "other ranks than 0 to 3" in problems("layout.critic.ranks=2-4")
    assert "'x' is no rank" in problems("layout.critic.ranks=x")
    found = problems("layout.bucket_megabytes=0", "layout.critic.tensor_model_parallel_size=0")
    assert "layout.bucket_megabytes=0" in found and "layout.critic.tensor_model_parallel_size=0" in found
    found = problems("layout.actor.ranks=0-1", "layout.critic.ranks=2-3", "layout.critic.tensor_model_parallel_size=3")
    assert "layout.critic (checkpoint.load=" in found and "not divisible by tensor 3" in found
    found = problems("layout.actor.ranks=0-1", "layout.actor.pipeline_model_parallel_size=4")
    assert "layout.actor: on 2 ranks" in found


def test_the_plan_names_every_role(runs, beginner, digits, judged_by, tmp_path, capsys, monkeypatch):
    """What --check prints: ranks, sizes and memory of each."""
    said = words(beginner, digits, *FIVE, *judged_by, RANKS4, TP2, "layout=split", "layout.critic.offload=true")
    plan = compose_run(runs.words(tmp_path / "run", *said))
    monkeypatch.setenv("COLUMNS", "200")
    print_plan(plan.cfg)
    found = capsys.readouterr().out
    assert "actor" in found and "ranks 0-1, tensor 2" in found and "the actor itself" in found
    assert "ranks 2-3, tensor 2" in found and "in host memory" in found
    assert "8 prompts, 32 answers of at most 8 tokens" in found and "4, of 4 prompts each" in found


def test_files_that_cannot_be(runs, beginner, digits, judge, tmp_path):
    """A reward function where none is, a language model for a reward model, other tokenizers, prompts without room."""

    def problems(*more: str) -> str:
        with pytest.raises(UserError) as caught:
            runs(tmp_path / "no", *words(beginner, digits, *FIVE, *more))
        return "\n".join(caught.value.problems)

    assert f"{tmp_path / 'none.py'}" in problems(f"reward.function={tmp_path / 'none.py'}:score")
    assert "a language model, which gives no number" in problems(f"reward.load={beginner}")
    shutil.copytree(judge, tmp_path / "judge")
    for file in (tmp_path / "judge").glob("iter_*/tokenizer/tokenizer.json"):
        file.write_text(file.read_text().replace("<|endoftext|>", "<|end|>"))
    found = problems(f"reward.load={tmp_path / 'judge'}")
    assert "another tokenizer" in found and "reward.load" in found and "policy's tokenizer" in found
    assert "leaves no room for a prompt" in problems("stage.max_new_tokens=64")
    assert "more than the 1 that leave room" in problems("stage.max_new_tokens=63", "data.on_too_long=fail")
    assert "needs a critic" in problems("stage=grpo", "stage.adv_estimator=gae", "stage.lam=0.95")


def test_a_critic_of_another_shape_than_its_checkpoint(runs, beginner, digits, judged_by, single, judge, tmp_path):
    """A run whose critic was the reward model's shape goes on with another start of the critic."""
    shutil.copytree(single, tmp_path / "run")
    said = words(beginner, digits, *FIVE, *judged_by, "train.train_iters=6", f"stage.critic_load={beginner}")
    with pytest.raises(UserError, match="has its critic from"):
        runs(tmp_path / "run", *said)
    (tmp_path / "run" / "config.yaml").unlink()  # nothing says then what the run began from
    found = "\n".join(runs(tmp_path / "run", *said))
    assert "critic." in found and "has shape" in found and "the model wants" in found
