"""PPO and GRPO learn from a reward alone, three seeds out of three; every estimator and option does what it says.

The task: say the digit that the prompt has. The beginner's answers are digits, one in about five of them right.
"""

import json
import math

import pytest
from support.runs import rows
from support.slow import slow_but

WORDS = ["model=from_checkpoint", "data.split='80,20,0'", "train.eval_interval=null", "train.micro_batch_size=32",
         "optim.lr=2e-3", "optim.lr_decay_style=constant", "optim.lr_warmup_iters=0", "stage.max_new_tokens=4",
         "stage.generation_batch_size=128", "reward.function=exact_match"]  # fmt: skip

STAGES = {
    "ppo": ["stage=ppo", "train.global_batch_size=96", "stage.ppo_mini_batch_size=32", "stage.critic_warmup=2",
            "stage.critic_lr=2e-3", "optim.lr=1e-3", "train.train_iters=16"],
    "grpo": ["stage=grpo", "train.global_batch_size=16", "stage.num_generations_per_prompt=8",
             "train.train_iters=18"],
}  # fmt: skip
"""The critic learns alone first: its values begin anywhere from -1 to 2, and by such advantages a policy may learn to
say nothing to a digit, for good."""


@pytest.mark.parametrize("seed", slow_but([1, 2, 3], 1))
@pytest.mark.parametrize("stage", STAGES)
def test_reward_rises_above_nine_tenths(runs, tmp_path, beginner, digits, stage, seed):
    """From under 0.3 in the first iteration; of prompts that are held out, the likeliest answers are right too."""
    words = [*WORDS, *STAGES[stage], f"checkpoint.load={beginner}", f"data.path={digits}", f"train.seed={seed}",
             "train.eval_iters=1"]  # fmt: skip
    assert runs(tmp_path / "run", *words) == []
    found = rows(tmp_path / "run")
    rewards = [row["critic/score/mean"] for row in found if "critic/score/mean" in row]
    assert rewards[0] < 0.3, rewards
    assert sum(rewards[-4:]) / 4 > 0.9, rewards
    assert found[-1]["critic/score/mean validation"] > 0.8


class Variant:
    """A short run of GRPO from the beginner, without KL; all runs give the same answers in their first iteration."""

    def __init__(self, runs, directory, beginner, digits):
        self._runs, self._directory = runs, directory
        self._words = [*WORDS, f"checkpoint.load={beginner}", f"data.path={digits}", "stage=grpo", "train.seed=1",
                       "train.global_batch_size=8", "stage.num_generations_per_prompt=8",
                       "stage.kl_loss_coef=0", "stage.num_samples=8", "train.eval_iters=0"]  # fmt: skip

    def __call__(self, *words, iterations=1):
        """Rows of the metrics, and the transcripts: the first answer to each prompt of every iteration."""
        run = self._directory / str(len(list(self._directory.iterdir())))
        assert self._runs(run, *self._words, f"train.train_iters={iterations}", *words) == []
        said = [json.loads(line) for line in (run / "transcripts.jsonl").read_text().splitlines()]
        return rows(run), said


@pytest.fixture(scope="module")
def variant(runs, beginner, digits, tmp_path_factory):
    return Variant(runs, tmp_path_factory.mktemp("variants"), beginner, digits)


TWICE = ["stage.ppo_epochs=2", "stage.ppo_mini_batch_size=4", "stage.clip_ratio=0.05"]
"""Four optimizer steps: the policy moves away from the one that answered."""


@pytest.fixture(scope="module")
def plain(variant):
    """GRPO; so little KL in the loss that it is only measured."""
    return variant("stage.kl_loss_coef=1e-9", iterations=3)


@pytest.fixture(scope="module")
def leave_one_out(variant):
    return variant("stage.adv_estimator=rloo")


@pytest.fixture(scope="module")
def twice(variant):
    return variant(*TWICE)


def assert_whole(values):
    """Whole numbers but for the rounding of FP32, and not all of them 0."""
    assert all(abs(value - round(value)) < 1e-4 for value in values) and any(map(round, values)), values


def close(value, wanted):
    return math.isclose(value, wanted, rel_tol=1e-4)


def test_grpo_divides_by_the_deviation(plain):
    """Of c right answers among 8 a right one has (1 - c/8) / sqrt(c (8 - c) / 56): r = c/8, N - 1 = 7."""
    possible = {0.0}
    for right in range(1, 8):
        deviation = math.sqrt(right * (8 - right) / 56)
        possible |= {(1 - right / 8) / deviation, -right / 8 / deviation}
    found = [row["advantage"] for row in plain[1]]
    assert all(min(abs(value - one) for one in possible) < 1e-4 for value in found)
    assert plain[0][0]["actor/ppo_kl"] == pytest.approx(0, abs=1e-6), "one step: the policy has not moved"


def test_leave_one_out(leave_one_out, plain):
    """The others' mean is a number of sevenths."""
    rows_of_run, said = leave_one_out
    assert [row["response"] for row in said] == [row["response"] for row in plain[1][:8]]
    assert_whole([7 * row["advantage"] for row in said])
    assert abs(rows_of_run[0]["critic/advantages/max"]) <= 1


def test_dr_grpo(variant, leave_one_out):
    """No deviation: r - c/8, which is 7/8 of leave-one-out; and sums over answers divided by max_new_tokens in place
    of all tokens, so that the gradient is leave-one-out's times 7/8 and tokens / (4 x answers)."""
    found, said = variant("stage.norm_adv_by_std_in_grpo=false", "stage.loss_agg_mode=seq_mean_token_sum_norm")
    assert_whole([8 * row["advantage"] for row in said])
    other = leave_one_out[0][0]
    assert close(found[0]["grad-norm"], other["grad-norm"] * 7 / 8 * other["response_length/mean"] / 4)


def test_reinforce_plus_plus_and_the_adaptive_penalty(variant):
    """One baseline for all answers: right ones have one advantage, wrong ones another, of mean 0 over tokens. The KL of
    the first iteration, 0, is below its target by more than a fifth: 64 answers take 0.2 x 64 / 640 off kl_coef."""
    found, said = variant(
        "stage.adv_estimator=reinforce_plus_plus", "stage.kl_coef=0.05", "stage.kl_ctrl.type=adaptive",
        "stage.kl_ctrl.horizon=640", iterations=2,
    )  # fmt: skip
    first = found[0]
    by_score = {row["score"]: row["advantage"] for row in said[:8]}
    assert all(abs(row["advantage"] - by_score[row["score"]]) < 1e-3 for row in said[:8])
    assert abs(first["critic/advantages/mean"]) < 1e-5
    high, low = first["critic/advantages/max"], first["critic/advantages/min"]
    assert abs(high * low + 1) < 0.2, "variance 1 of two values: their product is -1 but for answers of unequal lengths"
    assert [row["critic/kl_coef"] for row in found] == pytest.approx([0.05, 0.05 * 0.98])
    assert found[1]["actor/reference_kl"] != 0
    assert found[1]["critic/rewards/mean"] != found[1]["critic/score/mean"], "the penalty is taken from rewards"


def test_reinforce_plus_plus_with_a_baseline(variant):
    """A prompt's own mean is taken off, then all are whitened: right answers differ by prompt."""
    found, said = variant("stage.adv_estimator=reinforce_plus_plus_baseline")
    assert abs(found[0]["critic/advantages/mean"]) < 1e-5
    assert len({(row["score"], round(row["advantage"], 4)) for row in said}) > 2


def test_several_steps_of_an_iteration(twice, plain):
    """The policy moves between them, and some ratios are clipped."""
    first = twice[0][0]
    assert abs(first["actor/ppo_kl"]) > 1e-4 and first["actor/pg_clipfrac"] > 0
    assert plain[0][0]["actor/pg_clipfrac"] == 0


def test_dapo(variant, twice):
    """A higher upper clip lets through what was cut; every prompt has answers of different rewards; answers near the
    limit lose (tokens - 1) / 3 of a point, as the buffer of 3 begins after one of 4 tokens."""
    found, said = variant(*TWICE, "stage.clip_ratio_high=0.6")
    assert [row["response"] for row in said] == [row["response"] for row in twice[1]]
    assert found[0]["actor/pg_clipfrac"] < twice[0][0]["actor/pg_clipfrac"]
    found, said = variant(
        "stage.filter_groups=true", "stage.overlong_buffer_tokens=3", "stage.clip_ratio_high=0.28", iterations=2
    )  # fmt: skip
    assert all(row["advantage"] for row in said)
    for row in found:
        penalty = (row["response_length/mean"] - 1) / 3
        assert close(row["critic/score/mean"], row["reward/exact_match/mean"] - penalty)


def test_gspo(variant, twice):
    """All tokens of an answer have one ratio and are cut together, its end too, of which the policy was certain before
    and after; token by token only digits are cut, half of all tokens."""
    found, said = variant(*TWICE, "stage.policy_loss=gspo")
    first, of_tokens = found[0], twice[0][0]
    assert [row["response"] for row in said] == [row["response"] for row in twice[1]]
    assert first["response_length/min"] == first["response_length/max"] == 2
    answers_cut = first["actor/pg_clipfrac"] * 4 * 32  # four steps of 32 answers
    assert abs(answers_cut - round(answers_cut)) < 1e-4
    assert of_tokens["actor/pg_clipfrac"] < 0.5 and first["actor/pg_clipfrac"] > of_tokens["actor/pg_clipfrac"]


def test_kl_in_the_loss(variant, plain):
    """It has no gradient where policy and reference are one, so that the first step is plain GRPO's; then it holds the
    policy near the reference. k2 and k3 agree to the second order."""
    kinds = {}
    for kind in ("k2", "k3"):
        found, _ = variant("stage.kl_loss_coef=10", f"stage.kl_loss_type={kind}", iterations=3)
        kinds[kind] = [row["actor/kl_loss"] for row in found]
        assert found[0]["grad-norm"] == pytest.approx(plain[0][0]["grad-norm"], rel=1e-5)
        assert abs(kinds[kind][0]) < 1e-9
        assert 0 < kinds[kind][2] < 0.7 * plain[0][2]["actor/kl_loss"]
    assert kinds["k3"][1] == pytest.approx(plain[0][1]["actor/kl_loss"], rel=1e-3)
    assert kinds["k2"][1] != kinds["k3"][1] == pytest.approx(kinds["k2"][1], rel=0.2)


def test_entropy_bonus(variant, plain):
    """The policy stays less certain than without."""
    found, _ = variant("stage.entropy_coeff=0.5", iterations=3)
    assert found[0]["actor/entropy"] == plain[0][0]["actor/entropy"]
    assert found[-1]["actor/entropy"] > plain[0][-1]["actor/entropy"] + 0.02


def test_answers_to_held_out_prompts_may_be_sampled(variant):
    """The same random numbers every time; the beginner's likeliest answers are others."""

    def score(*words):
        return variant("train.eval_iters=4", *words)[0][-1]["critic/score/mean validation"]

    sampled = score("stage.validation_temperature=1.0")
    assert sampled == score("stage.validation_temperature=1.0") != score()


def test_truncated_importance_weights(variant, plain):
    """Both probabilities are the same model's, so that a cap of one half halves every token's weight."""
    found, _ = variant("stage.tis_imp_ratio_cap=0.5")
    assert close(found[0]["grad-norm"], plain[0][0]["grad-norm"] / 2)
