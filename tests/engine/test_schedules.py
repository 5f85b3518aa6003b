"""Learning-rate schedules against their formulas, and batch ramp-up against Megatron's own arithmetic."""

import math

import pytest

from scale_llm.config.batch import global_batch_size, samples_after, total_iterations, total_samples
from scale_llm.config.train import TrainConfig

STEPS, WARMUP, HIGH, LOW = 40, 8, 1e-2, 1e-3


def warmed(step: int, rate: float) -> float:
    """Linear from 0 over the warm-up; step counts the updates made before."""
    return HIGH * step / WARMUP if step <= WARMUP else rate


def share(step: int) -> float:
    """How much of the decay is done."""
    return (step - WARMUP) / (STEPS - WARMUP)


def wsd(step: int) -> float:
    """Stable until the last 10 steps, then linear to the lowest."""
    return HIGH if step <= STEPS - 10 else LOW + (HIGH - LOW) * (STEPS - step) / 10


FORMULAS = {
    "cosine": lambda step: LOW + (HIGH - LOW) * (1 + math.cos(math.pi * share(step))) / 2,
    "linear": lambda step: LOW + (HIGH - LOW) * (1 - share(step)),
    "constant": lambda step: HIGH,
    "inverse-square-root": lambda step: max(LOW, HIGH * math.sqrt(WARMUP / max(step, 1))),
    "WSD": wsd,
}


@pytest.mark.parametrize("style", FORMULAS)
def test_schedule_follows_its_formula(ranks, style):
    """Every update of a run, and that the rate stays at the lowest after the decay."""
    overrides = {"optim.lr_decay_style": style, "optim.lr": HIGH, "optim.min_lr": LOW, "optim.lr_warmup_iters": WARMUP,
                 "optim.lr_wsd_decay_iters": 10, "train.train_iters": STEPS}  # fmt: skip
    rates = ranks(1, "support.training:learning_rates", overrides=overrides, steps=STEPS + 3)[0]
    for step in range(STEPS):
        assert rates[step] == pytest.approx(warmed(step, FORMULAS[style](step)), rel=1e-9), step
    assert rates[STEPS + 1 :] == [HIGH if style == "constant" else LOW] * 2


def test_warmup_by_samples_and_by_fraction_and_its_start(ranks):
    common = {"optim.lr": HIGH, "optim.min_lr": LOW, "train.train_iters": STEPS, "optim.lr_decay_style": "linear"}
    rates = {
        key: ranks(1, "support.training:learning_rates", overrides={**common, key: value}, steps=STEPS)[0]
        for key, value in (
            ("optim.lr_warmup_iters", WARMUP),
            ("optim.lr_warmup_samples", 4 * WARMUP),
            ("optim.lr_warmup_fraction", 0.2),
        )
    }  # fmt: skip
    first, *others = rates.values()
    assert all(other == first for other in others)
    start = {**common, "optim.lr_warmup_iters": WARMUP, "optim.lr_warmup_init": 4e-3}
    assert ranks(1, "support.training:learning_rates", overrides=start, steps=5)[0][4] == pytest.approx(7e-3)


RAMPS = [[4, 4, 60], [8, 8, 100], [4, 12, 1000]]


@pytest.mark.parametrize("ramp", RAMPS)
def test_ramp_up_is_megatrons(ranks, ramp):
    """The size of every step is what megatron-core's calculator says for the samples consumed so far."""
    ours = TrainConfig(global_batch_size=64, rampup_batch_size=ramp, train_iters=40)
    theirs = ranks(1, "support.training:megatron_batch_sizes", ramp=ramp, global_batch_size=64, steps=40)[0]
    consumed, sizes = 0, []
    for _ in range(40):
        sizes.append(global_batch_size(ours, consumed))
        consumed += sizes[-1]
    assert sizes == theirs
    assert total_samples(ours) == consumed == samples_after(ours, 40)


def test_train_samples_are_whole_batches():
    assert total_iterations(TrainConfig(global_batch_size=8, train_samples=47)) == 5
    ramp = TrainConfig(global_batch_size=16, rampup_batch_size=[4, 4, 24], train_samples=100)
    consumed = iterations = 0
    while consumed + global_batch_size(ramp, consumed) <= 100:
        consumed += global_batch_size(ramp, consumed)
        iterations += 1
    assert total_iterations(ramp) == iterations
