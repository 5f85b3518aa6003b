"""Whole runs of GRPO: what it writes, what it refuses, how it goes on after an interruption."""

import json

import pytest
from support.policy_words import SHORT, words
from support.runs import TP2, latest, rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scale_llm.config import timeline
from scale_llm.config.errors import UserError
from scale_llm.config.policy import GrpoConfig
from scale_llm.stages.policy.experience import Experience


@pytest.fixture(scope="module")
def run(runs, beginner, digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("grpo") / "run"
    assert runs(path, "stage=grpo", *words(beginner, digits), *SHORT) == []
    return path


def test_metrics_have_the_names_that_the_field_gives_them(run):
    first = rows(run)[1]
    wanted = [f"actor/{name}" for name in ("pg_loss", "pg_clipfrac", "ppo_kl", "entropy", "kl_loss", "grad_norm", "lr")]
    wanted += [f"critic/{name}/{kind}" for name in ("score", "rewards", "advantages", "returns")
               for kind in ("mean", "max", "min")]  # fmt: skip
    wanted += [f"response_length/{name}" for name in ("mean", "max", "min", "clip_ratio")]
    assert set(wanted) <= first.keys()
    whole = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    times = {f"timing_s/{name}" for name in ("gen", "reward", "old_log_prob", "ref", "adv", "update_actor", "step")}
    assert times <= whole.keys() and whole["perf/throughput"] > 0
    assert sum(whole[name] for name in times - {"timing_s/step"}) <= whole["timing_s/step"] * 1.05


def test_before_the_first_update_policy_and_reference_are_one(run):
    """Trap 10, and the sampler's log-probabilities are those of training."""
    first = rows(run)[1]
    assert abs(first["actor/reference_kl"]) < 1e-6 and first["actor/ppo_kl"] == 0 and first["actor/ratio"] == 1
    assert all(row["rollout/log_prob_diff/max"] < 1e-5 for row in rows(run) if "rollout/log_prob_diff/max" in row)


def test_transcripts(run):
    """The answers that were scored, with what they got."""
    found = [json.loads(line) for line in (run / "transcripts.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in found] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    for row in found:
        digit = next(char for char in reversed(row["prompt"]) if char.isdigit())
        assert row["score"] == row["scores"]["exact_match"] == float(row["response"].strip() == digit)
        assert row["finished"] == (row["tokens"] < 8) or row["tokens"] == 8
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    texts = events.Tensors("transcripts/text_summary")
    assert [event.step for event in texts] == [1, 2, 3, 4]
    assert found[0]["response"] in texts[0].tensor_proto.string_val[0].decode()


def test_resume_is_bit_for_bit(runs, beginner, digits, run, tmp_path):
    """Sampler position, optimizer, KL coefficient: the second half is that of the whole run, transcripts too."""
    resumed, said = tmp_path / "resumed", ["stage=grpo", *words(beginner, digits), *SHORT]
    assert runs(resumed, *said, "train.exit_interval=2") == []
    assert latest(resumed) == 2
    assert runs(resumed, *said) == []
    assert rows(resumed) == rows(run)
    assert (resumed / "transcripts.jsonl").read_text() == (run / "transcripts.jsonl").read_text()
    assert not {name: d for name, d in runs.differences(resumed, run, iteration=4).items() if d}


GOING_BACK = {
    "hybrid": [TP2, "layout=hybrid"],
    "adapters_offloaded": ["peft=lora", "peft.rank=4", "layout.actor.offload=true"],
}


@pytest.mark.parametrize("way", GOING_BACK)
def test_a_run_goes_back(runs, beginner, digits, run, tmp_path, way):
    """From a gradient that is no number, with the actor in host memory. It ends as one that is told what to leave out,
    and iteration 4 is of the prompts that it would have had anyway."""
    drill, told = tmp_path / "drill", tmp_path / "told"
    said = ["stage=grpo", *words(beginner, digits), *SHORT, *GOING_BACK[way]]
    once = ["health.drill_nan_gradients=[3]", "health.max_nan_steps=1", "checkpoint.save_interval=1"]
    assert runs(drill, *said, *once) == []
    (event,) = [event for event in timeline.read(drill) if event["event"] == "rewind"]
    assert event["to"] == 2 and event["leave_out"] == [3, 3]
    assert runs(told, *said, "train.iterations_to_skip=[3]") == []
    assert not {name: d for name, d in runs.differences(drill, told, iteration=4).items() if d}
    texts = [(path / "transcripts.jsonl").read_text() for path in (drill, told, run)]
    assert texts[0] == texts[1]
    prompts = [[(row["iteration"], row["prompt"]) for row in map(json.loads, text.splitlines())] for text in texts[1:]]
    assert prompts[0] == [pair for pair in prompts[1] if pair[0] != 3]


def test_what_is_left_out_may_have_drawn_several_batches():
    """With filter_groups as many as max_num_gen_batches: going back must not find the same prompts again."""
    for filters, wanted in ((False, 8), (True, 24)):
        experience = Experience(GrpoConfig(filter_groups=filters, max_num_gen_batches=3), None, None, None)
        experience.leave_out(8)
        assert experience.drawn == wanted


def test_prompts_without_signal_are_drawn_again(runs, beginner, digits, tmp_path):
    """DAPO's dynamic sampling: every answer of the step has another's reward beside it that differs, and the drawn
    prompts beyond the batch are remembered."""
    said = ["stage=grpo", *words(beginner, digits), *SHORT, "stage.filter_groups=true", "stage.num_samples=100"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert runs(whole, *said) == []
    assert runs(resumed, *said, "train.exit_interval=2") == []
    assert runs(resumed, *said) == []
    assert rows(resumed) == rows(whole)
    for row in rows(whole):
        assert row.get("critic/score/max", 1) == 1 and row.get("critic/score/min", 0) == 0


def test_a_reward_without_signal_is_named(runs, beginner, digits, tmp_path, capsys):
    """Nothing is learnt from answers that are all worth the same: nothing moves, and the log says why; with
    filter_groups the run ends with the reason."""
    same = tmp_path / "same.py"
    same.write_text("def score(data_source, solution_str, ground_truth, extra_info=None):\n    return 1.0\n")
    said = ["stage=grpo", *words(beginner, digits), *SHORT, f"reward.function={same}:score", "stage.kl_loss_coef=0"]
    (tmp_path / "run").mkdir()
    assert runs(tmp_path / "run", *said) == []
    assert all(row["grad-norm"] == 0 for row in rows(tmp_path / "run") if "grad-norm" in row)
    assert runs(tmp_path / "plain", *said, "stage.adv_estimator=reinforce_plus_plus") == []
    assert all(row["grad-norm"] == 0 for row in rows(tmp_path / "plain") if "grad-norm" in row)
    assert len({row["actor/entropy"] for row in rows(tmp_path / "run") if "actor/entropy" in row}) <= 1
    (problem,) = runs(tmp_path / "filtered", *said, "stage.filter_groups=true", "stage.max_num_gen_batches=2")
    assert "of 2 batches of 8 prompts none has answers of different rewards" in problem
    assert not list((tmp_path / "filtered").glob("checkpoints/latest*")), "nothing has been trained"


def test_a_signal_that_ends_leaves_what_was_learnt(runs, beginner, digits, tmp_path):
    """With filter_groups: the state is saved, then the run ends with the reason."""
    tells = tmp_path / "tells"
    fading = tmp_path / "fading.py"
    fading.write_text(
        "import os\ndef score(data_source, solution_str, ground_truth, extra_info=None):\n"
        f"    return float(sum(map(ord, solution_str))) if os.path.exists({str(tells)!r}) else 1.0\n"
    )
    said = ["stage=grpo", *words(beginner, digits), *SHORT, f"reward.function={fading}:score",
            "stage.filter_groups=true", "stage.max_num_gen_batches=2"]  # fmt: skip
    tells.touch()
    assert runs(tmp_path / "run", *said, "train.exit_interval=2") == []
    tells.unlink()
    (problem,) = runs(tmp_path / "run", *said)
    assert "none has answers of different rewards" in problem
    assert latest(tmp_path / "run") == 3


def test_a_reward_that_raises_scores_the_default(runs, beginner, digits, tmp_path):
    """Counted, and the others go on."""
    own = tmp_path / "own.py"
    own.write_text(
        "def score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    if ground_truth in '01234':\n        raise KeyError('no such digit')\n"
        "    return float(solution_str.strip() == ground_truth)\n"
    )
    said = ["stage=grpo", *words(beginner, digits), *SHORT, f"reward.function={own}:score", "reward.default=-2"]
    assert runs(tmp_path / "run", *said, "train.train_iters=1") == []
    row = rows(tmp_path / "run")[1]
    assert row["reward/failed"] > 0 and row["critic/score/min"] == -2


def test_guards(runs, beginner, digits, tmp_path):
    """Warn, lower the rate, or stop."""
    said = [
        "stage=grpo",
        *words(beginner, digits),
        *SHORT,
        "optim.lr_decay_style=constant",
        "stage.guard.min_entropy=99",
    ]
    assert runs(tmp_path / "warn", *said) == []
    assert {row["learning-rate"] for row in rows(tmp_path / "warn") if "learning-rate" in row} == {1e-3}
    assert runs(tmp_path / "lower", *said, "stage.guard.action=lower_lr") == []
    rates = [row["learning-rate"] for row in rows(tmp_path / "lower") if "learning-rate" in row]
    assert rates == [1e-3, 5e-4, 5e-4, 5e-4], "halved when the limit was crossed, not while it stays so"
    assert runs(tmp_path / "resumed", *said, "stage.guard.action=lower_lr", "train.exit_interval=2") == []
    assert runs(tmp_path / "resumed", *said, "stage.guard.action=lower_lr") == []
    assert rows(tmp_path / "resumed") == rows(tmp_path / "lower")
    (problem,) = runs(tmp_path / "stop", *said, "stage.guard.action=stop")
    assert "actor/entropy" in problem and "stage.guard.min_entropy=99" in problem
    assert latest(tmp_path / "stop") == 1 and rows(tmp_path / "stop")[-1]["actor/entropy"] < 99


def test_adapters_alone_learn(runs, beginner, digits, run, tmp_path):
    """peft=lora: the policy begins as its base, the reference too; a checkpoint has adapters alone, and resumes."""
    said = ["stage=grpo", *words(beginner, digits), *SHORT, "peft=lora", "peft.rank=4"]
    assert runs(tmp_path / "whole", *said) == []
    assert runs(tmp_path / "resumed", *said, "train.exit_interval=2") == []
    assert runs(tmp_path / "resumed", *said) == []
    found = rows(tmp_path / "whole")
    assert found[1]["critic/score/mean"] == rows(run)[1]["critic/score/mean"] and found[-2]["actor/grad_norm"] > 0
    assert found == rows(tmp_path / "resumed")
    names = runs.differences(tmp_path / "whole", tmp_path / "resumed", iteration=4)
    assert all("adapter" in name for name in names) and not any(names.values())


def test_adapters_that_cannot_be(runs, beginner, digits, tmp_path):
    said = ["stage=grpo", *words(beginner, digits), *SHORT]
    with pytest.raises(UserError, match="peft.method=prompt_tuning: is for stage=sft"):
        runs(tmp_path / "no", *said, "peft=prompt_tuning")
    with pytest.raises(UserError, match="layout.rollout: adapters"):
        runs(tmp_path / "no", *said, "peft=lora", "layout=hybrid", "parallel=tp2", "cluster.nproc_per_node=2")


def test_what_the_terminal_says(runs, beginner, digits, tmp_path):
    """A stop string that never occurs and a reward without signal are named; an iteration's line has the reward."""
    same = tmp_path / "same.py"
    same.write_text("def score(data_source, solution_str, ground_truth, extra_info=None):\n    return 1.0\n")
    said = ["stage=grpo", *words(beginner, digits), *SHORT, f"reward.function={same}:score", "train.train_iters=1"]
    output = runs.command(tmp_path / "run", *said, "stage.stop_strings=[zzyzx]", "stage.guard.min_entropy=99")
    assert "is beyond stage.guard.min_entropy=99" in output
    assert "stage.stop_strings=['zzyzx']: none of them has ended any of the first 32 answers" in output
    assert "all 4 answers to each of 8 prompts have the same reward" in output
    (line,) = [line for line in output.splitlines() if "iteration        1/" in line]
    assert "critic/score/mean: 1.000000E+00" in line and "tokens per second" in line and len(line) < 700
