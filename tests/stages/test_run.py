"""What a run writes, when it ends, and what it says when it must."""

import json
import re

import pytest
from support.runs import latest, losses, rows

from scale_llm.data.loader_choice import dali_is_installed

KEYS = {"iteration", "consumed_samples", "lm loss", "learning-rate", "batch-size", "loss-scale", "grad-norm",
        "params-norm",
        "skipped-iterations", "nan-iterations", "iteration-time", "throughput",
        "tokens-per-second"}  # fmt: skip
LINE = re.compile(
    r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?\] iteration +\d+/ +\d+ \| consumed samples: +\d+ \| "
    r"elapsed time per iteration \(ms\): [\d.]+ \| throughput per GPU \(TFLOP/s/GPU\): [\d.]+ \| "
    r"(?:[^|]*\| )*?learning rate: \d\.\d+E[-+]\d\d \| global batch size: +\d+ \| lm loss: \d\.\d+E[-+]\d\d \| "
    r"loss scale: [\d.]+ \| grad norm: [\d.]+ \| (?:num zeros: [\d.]+ \| )?(?:params norm: [\d.]+ \| )?"
    r"number of skipped iterations: +\d+ \| number of nan iterations: +\d+ \|"
)


@pytest.fixture(scope="module")
def logged(runs, tmp_path_factory):
    """(run directory, output) of 6 steps by the command line on two ranks, evaluated at 5 and at the end."""
    directory = tmp_path_factory.mktemp("logged")
    words = ["train.train_iters=6", "parallel.tensor_model_parallel_size=2", "logging.log_params_norm=true"]
    return directory, runs.command(directory, *words)


def test_metrics_jsonl(logged):
    """One row an iteration, with the tags of TensorBoard; floats in full precision, so that runs compare bit
    for bit.
    """
    lines = (logged[0] / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines if '"lm loss"' in line]
    assert [row["iteration"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["consumed_samples"] for row in steps] == [8, 16, 24, 32, 40, 48]
    assert all(set(row) == KEYS for row in steps)
    assert all(any(repr(row["lm loss"]) in line for line in lines) for row in steps)
    evaluations = [json.loads(line) for line in lines if "lm loss validation" in line]
    assert [row["iteration"] for row in evaluations] == [5, 6]
    assert set(evaluations[0]) == {"iteration", "consumed_samples", "lm loss validation", "lm loss validation ppl"}
    # 12 blocks of norm weights at 1: sqrt(9 * 64) plus what the matrices add
    assert 24 < steps[0]["params-norm"] < 60


def test_tensorboard(logged):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logged[0] / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {"lm loss", "learning-rate", "batch-size", "loss-scale", "grad-norm", "params-norm",
                    "iteration-time", "throughput", "lm loss validation", "lm loss validation ppl",
                    "lm loss vs samples", "lm loss validation vs samples",
                    "lm loss validation ppl vs samples"}  # fmt: skip
    assert [event.step for event in events.Scalars("lm loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("lm loss vs samples")] == [8, 16, 24, 32, 40, 48]
    assert [event.value for event in events.Scalars("lm loss")] == pytest.approx(losses(logged[0]), rel=1e-6)


def test_log_line_is_megatrons(logged):
    lines = [line for line in logged[1].splitlines() if "| consumed samples:" in line]
    assert len(lines) == 6
    for line in lines:
        assert LINE.fullmatch(line), line
    assert "iteration        6/       6 | consumed samples:           48 |" in lines[-1]


def test_zeros_in_gradients(runs, tmp_path):
    """Rows of the embedding whose token did not occur have no gradient only where the output layer is another
    matrix.
    """
    words = ["train.train_iters=1", "logging.log_num_zeros_in_grad=true",
             "model.untie_embeddings_and_output_weights=true",
             "train.eval_iters=0"]  # fmt: skip
    assert runs(tmp_path / "one", *words) == []
    assert runs(tmp_path / "two", *words, "parallel.tensor_model_parallel_size=2") == []
    one, two = (rows(tmp_path / name)[0]["num-zeros"] for name in ("one", "two"))
    assert one == two and 64 <= one < 512 * 64


def test_log_interval_reports_means(runs, tmp_path):
    assert runs(tmp_path / "all", "train.train_iters=5", "train.eval_iters=0") == []
    assert runs(tmp_path / "some", "train.train_iters=5", "train.eval_iters=0", "train.log_interval=2") == []
    every, some = losses(tmp_path / "all"), losses(tmp_path / "some")
    wanted = [every[0], every[1], (every[2] + every[3]) / 2, every[4]]  # the first and the last are always logged
    assert some == pytest.approx(wanted, rel=1e-12)


def test_train_samples_with_ramp_up(runs, tmp_path):
    """50 samples: batches of 4, 4, 8, 8, ... and no incomplete one at the end."""
    words = ["train.train_iters=null", "train.train_samples=50", "train.rampup_batch_size=[4,4,8]"]
    assert runs(tmp_path, *words) == []
    steps = [row for row in rows(tmp_path) if "lm loss" in row]
    assert [row["batch-size"] for row in steps] == [4, 4, 8, 8, 8, 8, 8]
    assert steps[-1]["consumed_samples"] == 48
    assert latest(tmp_path) == 7


def test_loss_does_not_depend_on_data_parallel_size(runs, tmp_path):
    """Data order comes from the seed and the consumed samples: two ranks see the same global batches."""
    assert runs(tmp_path / "one", "train.train_iters=5") == []
    assert runs(tmp_path / "two", "train.train_iters=5", "cluster.nproc_per_node=2") == []
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    key = "lm loss validation"
    validation = [[row[key] for row in rows(tmp_path / name) if key in row] for name in ("one", "two")]
    assert validation[0] == pytest.approx(validation[1], rel=1e-5)


def test_time_limit_saves_and_stops(runs, tmp_path):
    """A limit of 60 ms: at least one step is done, the state is saved and the rerun goes on."""
    assert runs(tmp_path, "train.exit_duration_in_mins=0.001", "train.train_iters=500", "train.eval_iters=0") == []
    stopped = latest(tmp_path)
    assert 1 <= stopped < 500
    assert runs(tmp_path, f"train.train_iters={stopped + 2}", "train.eval_iters=0") == []
    assert [row["iteration"] for row in rows(tmp_path)] == list(range(1, stopped + 3))


def test_loss_that_is_no_number_stops_the_run(runs, tmp_path):
    """A learning rate of 1e30 destroys the weights at the first update, and the checkpoint after it has them so: going
    back to it does not help, and there is none before."""
    (problem,) = runs(tmp_path, "optim.lr=1e30", "optim.lr_warmup_iters=0", "checkpoint.save_interval=1")
    assert "iteration 7: " in problem and "nan" in problem and "optim.lr=1e+30" in problem, problem
    assert "no checkpoint from before" in problem
    assert latest(tmp_path) == 1


def test_dali_makes_the_same_run(runs, tmp_path):
    """Bit for bit, on two ranks."""
    if not dali_is_installed():
        pytest.skip("NVIDIA DALI is not installed: pip install '.[dali]'")
    words = ["train.train_iters=4", "train.eval_interval=4", "cluster.nproc_per_node=2"]
    torch, dali = tmp_path / "torch", tmp_path / "dali"
    assert runs(torch, *words, "data.loader=torch", "data.num_workers=1") == []
    assert runs(dali, *words, "data.loader=dali", "data.num_workers=1") == []
    runs.assert_same_bits(torch, dali, 4)
