"""What a run does about numbers that are none, spikes, and ranks that compute wrong or slowly. A run that leaves out
samples ends as one that was told to: bit for bit."""

import math
from pathlib import Path

import pytest
from support.runs import PP2, RANKS2, TP2, latest, rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scale_llm.config import timeline
from scale_llm.config.health import HealthConfig
from scale_llm.engine.engine import StepResult
from scale_llm.stages.health.steps import GoBack, judge
from scale_llm.stages.progress import Progress

WORDS = ["train.train_iters=12", "model.num_layers=2", "checkpoint.save_interval=4", "train.eval_interval=null",
         "model.hidden_dropout=0.1"]  # fmt: skip
DISTOPT = ["parallel.use_distributed_optimizer=true", "parallel.overlap_grad_reduce=true",
           "parallel.overlap_param_gather=true"]  # fmt: skip
LAYOUTS = {"dp2_overlapped": [RANKS2, *DISTOPT], "tp2": [TP2], "pp2_bf16": [PP2, "precision=bf16"]}


def events(run_dir: Path, *kinds: str) -> list[dict]:
    return [event for event in timeline.read(run_dir) if event["event"] in kinds]


def tensorboard_tags(run_dir: Path) -> list[str]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return events.Tags()["tensors"]


def assert_same_weights(runs, run_dir: Path, other: Path) -> None:
    different = {name: d for name, d in runs.differences(run_dir, other, 12).items() if d}
    assert not different, different


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_is_no_number(runs, tmp_path, layout):
    """One is left out where it is. Three in a row (7 to 9) send the run back to the checkpoint of 4 and on without 5
    to 9. Then it stops and goes on, which changes nothing."""
    words = [*WORDS, *LAYOUTS[layout]]
    drill, told = tmp_path / "drill", tmp_path / "told"
    assert runs(told, *words, "train.iterations_to_skip=[2,5,6,7,8,9]") == []
    nans = "health.drill_nan_gradients=[2,7,8,9]"
    assert runs(drill, *words, nans, "train.exit_interval=10") == []
    assert latest(drill) == 10
    assert runs(drill, *words, nans) == []
    assert_same_weights(runs, drill, told)
    assert [event["iteration"] for event in events(drill, "nan")] == [2, 7, 8]
    (rewind,) = events(drill, "rewind")
    assert (rewind["to"], rewind["leave_out"], rewind["kind"]) == (4, [5, 9], "nan")
    assert "grad norm nan" in rewind["reason"]
    assert "timeline/text_summary" in tensorboard_tags(drill), "the same in TensorBoard"
    found = [row for row in rows(drill) if "lm loss" in row]
    assert [row["iteration"] for row in found] == [1, 3, 4, 10, 11, 12], "rows of what was given up are dropped"
    assert found[-1]["nan-iterations"] == 1 and all(map(math.isfinite, (row["grad-norm"] for row in found)))


def test_what_was_left_out_stays_out(runs, tmp_path):
    """Killed after it went back and before it saved, a run leaves out the same samples again."""
    killed, told = tmp_path / "killed", tmp_path / "told"
    assert runs(told, *WORDS, "train.iterations_to_skip=[5,6,7]") == []
    assert runs(killed, *WORDS, "train.exit_interval=4") == []
    timeline.append(killed, "rewind", iteration=7, to=4, leave_out=[5, 7])
    assert runs(killed, *WORDS) == []
    assert_same_weights(runs, killed, told)


def test_a_run_that_gets_nowhere_ends(runs, tmp_path):
    """No checkpoint gives a number: each is tried, the older after the newer, and then the reason is told."""
    drill = f"health.drill_nan_gradients={list(range(9, 200))}"
    (problem,) = runs(tmp_path, *WORDS, "train.train_iters=60", drill.replace(" ", ""))
    assert "grad norm nan" in problem and "no checkpoint from before" in problem
    assert [event["to"] for event in events(tmp_path, "rewind")] == [8, 4]
    assert latest(tmp_path) == 4 and (tmp_path / "checkpoints" / "iter_0000008").is_dir(), "nothing is removed"
    other = tmp_path / "limit"
    (problem,) = runs(other, *WORDS, "train.train_iters=60", drill.replace(" ", ""), "health.max_rewinds=1")
    assert "health.max_rewinds=1" in problem and "has gone back 1 times" in problem


def step_of(loss: float) -> StepResult:
    return StepResult({"lm loss": loss}, 1.0, None, 1e-3, 1.0, skipped=False)


def test_spikes():
    """High is judged by recent losses that were not; falling ones and one alone are no reason to go back."""
    health = HealthConfig(loss_spike_sigmas=6.0, loss_spike_window=20, loss_spike_steps=2)
    progress = Progress()

    def found(loss: float):
        progress.iteration += 1
        return judge(health, progress, step_of(loss))

    noise = [3 - i / 100 + 0.05 * math.sin(i * i) for i in range(40)]
    assert all(found(loss).remark is None for loss in (9.0, *noise)), "no judgement before the window is full"
    assert "1 in a row, 2 send the run back" in found(5.0).remark
    assert found(2.6).remark is None and progress.high_losses == 0
    assert found(5.0).back is None
    back = found(6.0).back
    assert isinstance(back, GoBack) and (back.first_bad, back.until, back.leave_out) == (44, 45, True)
    assert "loss 6.0000 is above" in back.reason
    assert max(progress.recent_losses) < 4, "what is high widens nothing"


def test_a_spike_in_a_run(runs, tmp_path):
    """With a limit that noise crosses: it ends as one that is told which samples to leave out, and looks for none."""
    spikes = ["health.loss_spike_sigmas=0.5", "health.loss_spike_window=4", "health.loss_spike_steps=1"]
    words = [*WORDS, "train.train_iters=24", "optim.lr=1e-5", "health.max_rewinds=20"]
    found, told = tmp_path / "found", tmp_path / "told"
    assert runs(found, *words, *spikes) == []
    rewinds = events(found, "rewind")
    assert rewinds and all(event["kind"] == "spike" and "is above" in event["reason"] for event in rewinds)
    left_out = sorted({i for event in rewinds for i in range(event["leave_out"][0], event["leave_out"][1] + 1)})
    assert runs(told, *words, f"train.iterations_to_skip={left_out}".replace(" ", "")) == []
    different = {name: d for name, d in runs.differences(found, told, 24).items() if d}
    assert not different, different


def test_a_replica_that_differs(runs, tmp_path):
    """A bit of rank 1 flips before iteration 7: found at 8, before the save; the run ends as if it had not been. A
    second time it is the hardware."""
    words = [*WORDS, RANKS2, "health.check_weight_hash_across_dp_replicas_interval=2"]
    whole, flipped, twice = tmp_path / "whole", tmp_path / "flipped", tmp_path / "twice"
    assert runs(whole, *words) == []
    found = runs.on_ranks("support.health:run_with_flipped_bits", flipped, *words, iterations=[7], rank=1)
    assert found == [{"problems": [], "error": None}] * 2
    runs.assert_same_bits(flipped, whole, 12)
    (event,) = events(flipped, "corruption")
    assert event["iteration"] == 8 and event["ranks"] == [0, 1], "of two nobody knows which"
    assert events(flipped, "rewind")[0]["to"] == 4
    found = runs.on_ranks("support.health:run_with_flipped_bits", twice, *words, iterations=[7, 7], rank=1)
    assert all("SilentCorruption: iteration 8: the weights of rank 0" in rank["error"] for rank in found), found


def test_the_odd_one_of_four_is_named(runs, tmp_path):
    words = [*WORDS, "cluster.nproc_per_node=4", "train.micro_batch_size=1",
             "health.check_weight_hash_across_dp_replicas_interval=1", "train.train_iters=6"]  # fmt: skip
    runs.on_ranks("support.health:run_with_flipped_bits", tmp_path, *words, iterations=[6], rank=2)
    (event,) = events(tmp_path, "corruption")
    assert event["ranks"] == [2] and "embedding" in event["reason"]


def test_a_slow_rank_is_named(runs, tmp_path):
    words = [*WORDS, RANKS2, "health.straggler_interval=4", "health.straggler_factor=3"]
    assert runs.on_ranks("support.health:run_with_slow_rank", tmp_path, *words, rank=1) == [[], []]
    found = [event for event in events(tmp_path, "straggler") if event["than"] == "the median"]
    assert [(event["iteration"], event["rank"]) for event in found] == [(12, 1)], "the second time"
    assert all(event["times"] > 3 and event["host"] for event in found)


def test_kernels_are_compared_with_the_fastest_ranks(ranks):
    """By a stand-in for CUPTI; where it does not start on one rank the run goes on, and no rank is compared."""
    pytest.importorskip("nvidia_resiliency_ext.straggler")
    (times, lowest), _ = ranks(2, "support.health:kernels_reported", fails=False)
    taken = {(rank, than): round(value, 3) for rank, than, value in times}
    assert taken[1, "the fastest rank's kernels"] == 2.0 and taken[0, "the fastest rank's kernels"] == 1.0
    assert (lowest["kernels_relative"], lowest["kernels_relative_rank"]) == (0.5, 1)
    (times, lowest), _ = ranks(2, "support.health:kernels_reported", fails=True)
    assert "the fastest rank's kernels" not in {than for _, than, _ in times} and "kernels_relative" not in lowest


def test_the_report_of_nvidias_package_compares_a_rank_with_its_own_best(runs, tmp_path):
    """The rank that becomes slow, and its score beside the other's."""
    pytest.importorskip("nvidia_resiliency_ext.straggler")
    words = [*WORDS, RANKS2, "health.straggler_interval=4", "health.straggler_factor=3"]
    assert runs.on_ranks("support.health:run_with_slow_rank", tmp_path, *words, rank=1) == [[], []]
    found = [event for event in events(tmp_path, "straggler") if event["than"] == "at its own best"]
    assert [(event["iteration"], event["rank"]) for event in found] == [(12, 1)]
    first, second, third = events(tmp_path, "straggler report")
    assert first["individual"] == 1.0, "nothing is known yet"
    for report in (second, third):
        assert report["relative_rank"] == report["individual_rank"] == 1
        assert report["relative"] < 1 / 3 and report["individual"] < 1 / 3
        assert "kernels_relative" not in report, "CUPTI has seen none"
