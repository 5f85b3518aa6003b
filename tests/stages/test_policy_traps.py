"""The mistakes that systems for PPO and GRPO are known for, in running stages; losses/test_reference_values.py has the
list. Whole updates against an oracle: test_policy_oracle.py."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import policy
from support.runs import rows
from support.stage import checkpoint_tensors

from scale_llm.config.errors import UserError
from scale_llm.config.precision import PrecisionConfig
from scale_llm.data.chat.prompts import Prompt
from scale_llm.engine.generation.samples import Completion
from scale_llm.stages.policy.answers import Answers
from scale_llm.stages.policy.batches import rows_of_role, with_tables
from scale_llm.stages.policy.invariants import check_first_ratio, check_reference, limit_of

TOLERANCE = 1e-5
PPO = [*policy.WORDS, "stage=ppo", "stage.temperature=0.7", "stage.gamma=0.5", "stage.lam=1", "stage.kl_coef=0",
       "stage.kl_loss_coef=0.1", "stage.entropy_coeff=0.01", "optim.lr=1e-3", "optim.adam_eps=1e-3",
       "stage.ppo_mini_batch_size=4", "stage.num_generations_per_prompt=2"]  # fmt: skip


@pytest.fixture(scope="module")
def run(runs, base, tmp_path_factory):
    """Runs of two steps whose answers are the same, by name: (directory, what the ranks saw)."""
    prompts = policy.write_prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl")

    def start(name, *more, fault=None):
        directory = tmp_path_factory.mktemp("traps") / name
        words = [*PPO, f"checkpoint.load={base}", f"data.path={prompts}", *more]
        return directory, runs.on_ranks("support.policy:run", directory, *words, fault=fault)

    return start


@pytest.fixture(scope="module")
def single(run):
    """One rank, all answers of a step in one row."""
    return run("single", "stage.max_tokens_per_micro_batch=1024")


def weights(directory):
    found = checkpoint_tensors(str(directory / "checkpoints" / "iter_0000001"))
    return {name: tensor for name, tensor in found.items() if "optimizer" not in name}


def assert_same_update(one, other) -> None:
    """All metrics, tables and weights, but timings."""
    (directory, ranks), (like, expected) = one, other
    seen, wanted = policy.merged(ranks), policy.merged(expected)
    texts = [[answer["tokens"] for answer in found["answers"][0]] for found in (seen, wanted)]
    assert texts[0] == texts[1]
    for name, table in wanted["tables"][0].items():
        torch.testing.assert_close(seen["tables"][0][name], table, rtol=TOLERANCE, atol=TOLERANCE)
    for role, steps in wanted["steps"].items():
        for ours, theirs in zip(seen["steps"][role], steps, strict=True):
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=TOLERANCE)
            assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=TOLERANCE, abs=TOLERANCE)
    (row,), (expected_row,) = rows(directory), rows(like)
    measured = ("timing_s/", "perf/", "rollout/log_prob_diff")
    assert row.keys() - expected_row.keys() <= {"perf/weights_bytes_per_second"}
    kept = [key for key in expected_row if not key.startswith(measured)]
    assert {key: row[key] for key in kept} == pytest.approx(
        {key: expected_row[key] for key in kept}, rel=TOLERANCE, abs=TOLERANCE
    )
    after = weights(directory)
    for name, tensor in weights(like).items():
        assert (after[name] - tensor).abs().max() < TOLERANCE * tensor.abs().max(), name


WAYS = {
    "small_rows": (["stage.max_tokens_per_micro_batch=64"], 4),
    "dp2": (["cluster.nproc_per_node=2", "stage.max_tokens_per_micro_batch=128"], 1),
}


@pytest.fixture(scope="module")
def split(run):
    """The same runs in WAYS."""
    return functools.cache(lambda way: run(way, *WAYS[way][0]))


@pytest.mark.parametrize("way", WAYS)
def test_trap_1_the_same_update_for_any_split(split, single, way):
    """A loss is a sum, divided once: by the tokens of all micro-batches and ranks. Lengths differ, so that the mean of
    means of rows or of ranks would be another number."""
    found = split(way)
    assert_same_update(found, single)
    for rank in found[1]:
        assert all(len(step["answers"]) >= WAYS[way][1] for step in rank["steps"]["actor"])
    assert [len(step["answers"]) for step in single[1][0]["steps"]["actor"]] == [1, 1]


def test_traps_2_and_5_rollout_and_training_see_the_same_distribution(single):
    """Sampled one by one at temperature 0.7 and looked at again packed, eight answers in a row: the log-probabilities
    are the same to 1e-5. They would not be, were logits taken one place off, labels rolled over the end of a sequence
    or the temperature left out of training."""
    seen = single[1][0]
    tables, mask = seen["tables"][0], seen["tables"][0]["weights"] != 0
    assert (tables["old_log_probs"] - tables["sampled_log_probs"])[mask].abs().max() < TOLERANCE
    steps = seen["looks"]["actor"][0]
    assert [[sorted(row) for row in step] for step in steps] == [[list(range(8))], [list(range(8, 16))]]


def role_of_one_rank():
    sizes = SimpleNamespace(pp=1, vpp=None, dp=1, cp=1, tp=1)
    cfg = SimpleNamespace(parallel=SimpleNamespace(sequence_parallel=False), precision=PrecisionConfig())
    return SimpleNamespace(cfg=cfg, run=SimpleNamespace(mesh=SimpleNamespace(sizes=sizes, dp_rank=0)))


def test_trap_3_the_end_of_an_answer_is_trained_on_even_where_it_is_the_padding():
    """Rows are filled up with token 0, which here ends answers, too, and stands inside of one. What counts is where
    answers lie, never which token is there; that an answer was cut off is a fact of its own."""
    end = 0
    answers = Answers(
        [Prompt([7, 8], {})] * 3,
        [Completion([5, 6, end], [-1.0] * 3, True), Completion([end], [-1.0], True),
         Completion([5, end, 6, 9], [-1.0] * 4, False)],
        [0, 0, 0],
    )  # fmt: skip
    assert answers.mask().sum(-1).tolist() == [3, 1, 4]
    (batch,) = rows_of_role(role_of_one_rank(), answers, [0, 1, 2], 64)
    table = torch.arange(12.0).view(3, 4)
    (batch,) = with_tables([batch], {"table": table})
    kept = batch["loss_mask"] != 0
    said = {}
    for segment, number in enumerate(batch["numbers"].tolist()):
        here = kept & (batch["segments"] == segment)
        said[number] = batch["labels"][here].tolist()
        assert batch["table"][here].tolist() == table[number, : len(said[number])].tolist()
    assert said == {0: [5, 6, end], 1: [end], 2: [5, end, 6, 9]}
    assert batch["tokens"].numel() > int(kept.sum()) and batch["cells"][~kept].eq(-1).all()


def test_trap_3_answers_of_a_run_keep_what_ended_them(single):
    """Here the first e, and an answer without one is cut off after twelve tokens: every token of either is trained on,
    and the share of those cut off is reported."""
    (row,), answers = rows(single[0]), single[1][0]["answers"][0]
    finished = [answer["finished"] for answer in answers]
    assert 0 < sum(finished) < len(finished)
    assert all(len(answer["tokens"]) == 12 for answer in answers if not answer["finished"])
    weights = single[1][0]["tables"][0]["weights"]
    assert weights.sum(-1).tolist() == [len(answer["tokens"]) for answer in answers]
    assert row["response_length/clip_ratio"] == pytest.approx(1 - np.mean(finished))


def test_trap_4_the_reward_lies_on_the_last_token(single):
    """With lambda 1 and no KL in rewards the returns are rewards alone: gamma^(tokens until the last) * score."""
    seen = single[1][0]
    for answer, score, returns in zip(
        seen["answers"][0], seen["scores"][0]["total"].tolist(), seen["tables"][0]["returns"], strict=True
    ):
        count = len(answer["tokens"])
        wanted = [score * 0.5 ** (count - 1 - t) for t in range(count)]
        assert returns[:count].tolist() == pytest.approx(wanted, abs=1e-6) and returns[count:].eq(0).all()


def test_trap_5_a_temperature_that_training_forgets_is_found(run):
    """Old log-probabilities at temperature 1, the update at 0.7: the first ratio is not 1, and the run ends. Without a
    reference, which would have told before."""
    _, (rank,) = run("forgotten", "stage.kl_loss_coef=0", fault="old policy without temperature")
    assert "in the first step of an iteration the ratio of new to old policy is" in rank["problems"][0]


def test_trap_6_no_dropout_when_a_model_is_looked_at(ranks):
    """Log-probabilities of an engine with dropout 0.5 are those of one without; in training it is on. An actor has
    none at all: the noise would be in the ratio."""
    (found,) = ranks(1, "support.policy:with_dropout")
    assert torch.equal(found["with"][0], found["without"][0]) and torch.equal(found["with"][0], found["with"][1])
    assert found["loss with"] != found["loss without"]


def test_trap_6_an_actor_with_dropout_is_refused(run):
    with pytest.raises(UserError, match="noise in the ratio of new to old policy"):
        run("dropout", "model=tiny", "model.hidden_dropout=0.1")


@pytest.mark.parametrize("way", ["single", *WAYS])
def test_trap_7_the_first_ratio_is_1_to_the_last_bit(single, split, way):
    """The passes before the update and the update see the same rows, mini-batch by mini-batch: the same arithmetic.
    The second step's ratio is another, for the first has moved the policy."""
    ranks = single[1] if way == "single" else split(way)[1]
    for rank in ranks:
        assert rank["looks"]["actor"][0] == [step["answers"] for step in rank["steps"]["actor"]]
        first, second = (step["metrics"] for step in rank["steps"]["actor"])
        assert first["actor/ratio"] == 1.0 and first["actor/ppo_kl"] == 0.0
        assert second["actor/ratio"] != 1.0


def test_trap_8_advantages_are_whitened_over_the_whole_batch(split):
    """Their mean is 0 and their variance 1 over both data-parallel ranks' answers; those of one rank's are not."""
    _, ranks = split("dp2")
    for rank in ranks:
        tables = rank["tables"][0]
        mask = tables["weights"] != 0
        white = tables["advantages"][mask].double()
        assert white.mean().abs() < 1e-6 and white.std(correction=0).item() == pytest.approx(1, abs=1e-5)
        mine = sorted(number for step in rank["steps"]["actor"] for row in step["answers"] for number in row)
        assert 0 < len(mine) < len(mask)
        assert tables["advantages"][mine][mask[mine]].mean().abs() > 1e-3


def test_trap_9_ranks_without_an_answer(run):
    """One prompt, two answers, four data-parallel replicas of every role: rows, answers and prompts for two of them at
    most. All join every collective, and the numbers are those of one rank."""
    words = ["train.global_batch_size=1", "stage.ppo_mini_batch_size=null"]
    one, four = run("one", *words), run("four", *words, "cluster.nproc_per_node=4")
    assert_same_update(four, one)
    for role in ("actor", "critic"):
        empty = [not any(row for row in rank["steps"][role][0]["answers"]) for rank in four[1]]
        assert 2 <= sum(empty) < 4


@pytest.mark.parametrize("fault", ["reference without temperature", "numbers of other tokens"])
def test_trap_10_a_reference_that_is_not_the_policy_is_found(run, fault):
    """Before the first update both are one model: their KL is 0. Not with one of these faults; the second leaves the
    mean of the differences, k1, as it is."""
    _, (rank,) = run("planted", fault=fault)
    assert "before the first update the KL of the actor to the reference is" in rank["error"]
    assert not rank["steps"], "nothing has been learnt from it"


def test_trap_10_invariants_hold_in_a_run(single):
    """Under 1e-6 nats in FP32: of the reference by another pass, of the first step exactly."""
    tables, mask = single[1][0]["tables"][0], single[1][0]["tables"][0]["weights"] != 0
    assert (tables["old_log_probs"] - tables["reference_log_probs"])[mask].abs().max() < 1e-6
    assert single[1][0]["steps"]["actor"][0]["metrics"]["actor/kl_loss"] < 1e-12


def test_trap_10_limits():
    """Of FP32 1e-6, of BF16 what its rounding explains; another reference than the start is not compared."""
    assert limit_of(PrecisionConfig(bf16=False)) == 1e-6 and limit_of(PrecisionConfig(bf16=True)) == 1e-2
    stage = SimpleNamespace(reference_load=None)
    cfg = SimpleNamespace(stage=stage, checkpoint=SimpleNamespace(load="a"), precision=PrecisionConfig(bf16=False))
    mask, apart = torch.ones(1, 4).bool(), torch.full((1, 4), 2e-6)
    tables = {"old_log_probs": apart, "reference_log_probs": torch.zeros(1, 4)}
    with pytest.raises(RuntimeError, match="not the same model"):
        check_reference(cfg, mask, tables)
    tables["old_log_probs"] = torch.tensor([[0.01, -0.01, 0.01, -0.01]])
    with pytest.raises(RuntimeError, match="of other tokens"):
        check_reference(cfg, mask, tables)
    stage.reference_load = "b"
    check_reference(cfg, mask, tables)
    check_first_ratio(cfg, {"actor/ppo_kl": 9e-7, "actor/ratio": 1 - 9e-7})
    for kl, ratio in ((2e-6, 1.0), (0.0, 1 + 2e-6), (-2e-6, 1.0)):
        with pytest.raises(RuntimeError, match="must be 1 and 0"):
            check_first_ratio(cfg, {"actor/ppo_kl": kl, "actor/ratio": ratio})
