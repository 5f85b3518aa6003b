"""Updates of real runs of PPO, GRPO and GSPO equal an oracle in plain PyTorch: see support/policy_oracle.py.

The rollout is the run's: its prompts and sampled answers are recorded. Rewards, log-probabilities, values, advantages,
losses, gradient norms and new weights are the oracle's own, from the checkpoints that the run starts from.

optim.adam_eps is 1e-3: AdamW's first step is lr * g / (|g| + eps), which for |g| far above eps is the sign of g. Where
a gradient is 0 but for rounding, that sign is chance, and the weight goes either way by lr. With eps of the size of a
usual gradient, steps follow their gradients, and weights can be compared one by one.
"""

import pytest
from support import policy, policy_oracle
from support.policy_oracle import Rules
from support.stage import checkpoint_tensors

TOLERANCE = 1e-5

FOUR_STEPS = ["stage.ppo_epochs=2", "stage.ppo_mini_batch_size=4"]
OPTIM = ["optim.lr=2e-3", "optim.lr_decay_style=linear", "optim.adam_eps=1e-3"]
PPO = ["stage=ppo", "stage.temperature=0.7", "stage.gamma=0.98", "stage.lam=0.9", "stage.kl_coef=0.3",
       "stage.entropy_coeff=0.02", "stage.clip_ratio=0.015", "stage.clip_ratio_high=0.02", "stage.clip_ratio_c=1.03",
       "stage.cliprange_value=0.03", "stage.critic_lr=1e-3"]  # fmt: skip
GRPO = ["stage=grpo", "stage.temperature=0.8", "stage.num_generations_per_prompt=4", "stage.kl_loss_coef=0.2",
        "stage.clip_ratio=0.015", *FOUR_STEPS]  # fmt: skip
GSPO = ["stage=grpo", "stage.policy_loss=gspo", "stage.num_generations_per_prompt=4", "stage.kl_loss_coef=0",
        "stage.loss_agg_mode=seq_mean_token_mean", "stage.clip_ratio=0.002", "stage.clip_ratio_high=0.003",
        *FOUR_STEPS]  # fmt: skip

LAYOUTS = {
    "colocated": ["parallel.tensor_model_parallel_size=2", "layout.critic.tensor_model_parallel_size=1",
                  "layout.critic.pipeline_model_parallel_size=2"],
    "split": ["layout.actor.ranks=first_half", "layout.actor.tensor_model_parallel_size=2",
              "layout.rollout.ranks=second_half", "layout.reference.ranks=second_half",
              "layout.critic.ranks=second_half", "layout.reward.ranks=second_half"],
}  # fmt: skip
"""colocated: the actor TP2 x DP2, the critic PP2 x DP2, all on four ranks, the actor answers itself. split: the actor
TP2 on two, the critic DP2 on the others, where rollout and reference are, too."""


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return policy.write_prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl")


@pytest.fixture(scope="module")
def judge(runs, base, pairs, tmp_path_factory):
    """Checkpoints of a reward model."""
    run = tmp_path_factory.mktemp("judge") / "run"
    words = ["stage=reward", "model=from_checkpoint", "model.seq_length=96", "data.split='100,0,0'",
             f"data.path={pairs}", f"checkpoint.load={base}", "train.global_batch_size=8", "train.train_iters=6",
             "train.eval_interval=null", "train.eval_iters=0", "optim.lr_warmup_iters=0"]  # fmt: skip
    assert runs(run, *words) == []
    return run / "checkpoints"


def tensors(checkpoints, iteration):
    return checkpoint_tensors(str(checkpoints / f"iter_{iteration:07d}"))


def compare(run, rules, seen, base, critic, scores):
    """The run's numbers and weights with the oracle's; returns the oracle's iteration."""
    start = tensors(base, 20)
    actor, reference = policy_oracle.model(start), None
    if rules.kl_in_reward or rules.kl_in_loss:
        reference = policy_oracle.model(start)
    models = {"": actor} | ({"critic.": critic} if critic is not None else {})
    before = {prefix: {name: w.detach().clone() for name, w in model.items()} for prefix, model in models.items()}
    wanted = policy_oracle.iterate(rules, seen["answers"][0], scores, actor, critic, reference)
    for name, rows in [*wanted.tables.items(), ("sampled_log_probs", wanted.tables["old_log_probs"])]:
        for row, found in zip(rows, seen["tables"][0][name], strict=True):
            assert (row - found[: len(row)]).abs().max() < TOLERANCE * max(1.0, row.abs().max()), name
    for role, steps in wanted.steps.items():
        assert len(seen["steps"][role]) == len(steps) == rules.epochs * len(scores) // rules.mini_batch
        for number, (ours, theirs) in enumerate(zip(seen["steps"][role], steps, strict=True)):
            for name in ("grad_norm", "learning_rate"):
                assert ours[name] == pytest.approx(theirs[name], rel=TOLERANCE), (role, number, name)
            for name, value in theirs["metrics"].items():
                found = ours["metrics"][f"{role}/{name}"]
                assert found == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), (role, number, name)
    after = tensors(run / "checkpoints", 1)
    for prefix, model in models.items():
        found = policy_oracle.model(after, prefix)
        assert found.keys() == model.keys()
        for name, theirs in model.items():
            apart, scale = (found[name] - theirs).abs().max(), theirs.abs().max()
            moved = (theirs - before[prefix][name]).abs().max()
            assert apart < TOLERANCE * scale, (prefix, name)
            # Weights move by a hundredth, so the same of the movement; an FP32 weight is rounded in every step
            assert moved > 0 and apart < 3e-4 * moved + 3e-7 * scale, (prefix, name)
    return wanted


def scored(seen, judge) -> list[float]:
    """reward.function=length with six tokens wished for, and the reward model's."""
    answers = seen["answers"][0]
    lengths = [max(0.0, 1 - abs(len(answer["tokens"]) - 6) / 6) for answer in answers]
    found = [length + policy_oracle.score(judge, answer) for length, answer in zip(lengths, answers, strict=True)]
    assert seen["scores"][0]["total"].tolist() == pytest.approx(found, abs=TOLERANCE)
    return found


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ppo(runs, base, judge, prompts, tmp_path, layout, steps):
    """Eight prompts with two answers each, scored by a function and a reward model, from which the critic starts."""
    several = steps == 4
    words = [*policy.WORDS, *PPO, *OPTIM, *LAYOUTS[layout], "cluster.nproc_per_node=4", f"checkpoint.load={base}",
             f"data.path={prompts}", f"reward.load={judge}", "stage.num_generations_per_prompt=2",
             *(FOUR_STEPS if several else [])]  # fmt: skip
    seen = policy.merged(runs.on_ranks("support.policy:run", tmp_path / "run", *words))
    answers = seen["answers"][0]
    assert len({len(answer["tokens"]) for answer in answers}) > 3, "unequal lengths"
    rules = Rules(each=2, temperature=0.7, gamma=0.98, lam=0.9, kl_in_reward=0.3, entropy=0.02, clip_low=0.015,
                  clip_high=0.02, dual_clip=1.03, clip_value=0.03, has_critic=True, epochs=2 if several else 1,
                  mini_batch=8 if several else 16, lr=2e-3, critic_lr=1e-3, adam_eps=1e-3)  # fmt: skip
    critic = policy_oracle.model(tensors(judge, 6))
    scores = scored(seen, critic)
    wanted = compare(tmp_path / "run", rules, seen, base, critic, scores)
    last = {role: found[-1]["metrics"] for role, found in wanted.steps.items()}
    if several:
        assert last["actor"]["pg_clipfrac"] and last["actor"]["pg_clipfrac_lower"] and last["critic"]["vf_clipfrac"]
    else:
        assert last["actor"]["ratio"] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_without_a_critic(runs, base, judge, prompts, tmp_path, name):
    """Four steps, the actor TP2 x DP2. GRPO: mean over tokens, k3 in the loss. GSPO: mean over answers (eq. 5).

    A reward model scores, too: where a reward is its group's mean but for rounding, the sign of its advantage is
    chance, and so is on which side it counts as clipped.
    """
    words = {"grpo": GRPO, "gspo": GSPO}[name]
    said = [*policy.WORDS, *words, *OPTIM, "parallel.tensor_model_parallel_size=2", "cluster.nproc_per_node=4",
            f"checkpoint.load={base}", f"data.path={prompts}", f"reward.load={judge}"]  # fmt: skip
    seen = policy.merged(runs.on_ranks("support.policy:run", tmp_path / "run", *said))
    scores = scored(seen, policy_oracle.model(tensors(judge, 6)))
    common = dict(each=4, dual_clip=None, has_critic=False, epochs=2, mini_batch=16, lr=2e-3, adam_eps=1e-3)
    if name == "grpo":
        rules = Rules(temperature=0.8, clip_low=0.015, clip_high=0.015, kl_in_loss=0.2, **common)
    else:
        rules = Rules(temperature=1.0, clip_low=0.002, clip_high=0.003, of_sequences=True, **common)
    wanted = compare(tmp_path / "run", rules, seen, base, None, scores)
    assert 0 < wanted.steps["actor"][-1]["metrics"]["pg_clipfrac"] < 1
