"""One GPU computes what the CPU does, on torch's layers and on Transformer Engine's, in every precision."""

import math

import pytest
import torch
from support import oracle
from support.batches import samples
from support.gpu import NOT_HERE
from support.parity import GPT2, MOE, UNTIED, relative

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

TRAIN = "support.training:train"
BF16 = {"precision.bf16": True}
TOLERANCE = 1e-4
"""Relative, FP32, 20 steps: sums in another order differ by about 1e-7, and the steps carry that on."""


def test_initial_weights_are_those_of_the_cpu(ranks, gpu_ranks, backend):
    """To the last bit: they are drawn on the host; in BF16, too."""
    for precision in ({}, BF16):
        on_cpu = ranks(1, "support.training:initial_weights", overrides=precision)[0]
        on_gpu = gpu_ranks(1, "support.training:initial_weights", overrides={**precision, **backend})[0]
        assert on_cpu.keys() == on_gpu.keys()
        assert all(torch.equal(weight, on_gpu[name]) for name, weight in on_cpu.items())


@pytest.mark.parametrize("model", ["llama", "untied", "gpt2", "moe"])
def test_fp32_equals_the_cpu(ranks, gpu_ranks, backend, model):
    """Losses of 20 steps and the first gradient norm; TF32 is off."""
    overrides = {"llama": {}, "untied": UNTIED, "gpt2": GPT2, "moe": MOE}[model]
    on_cpu = ranks(1, TRAIN, overrides=overrides)[0]
    on_gpu = gpu_ranks(1, TRAIN, overrides={**overrides, **backend})[0]
    assert relative(on_gpu["grad_norm"][0], on_cpu["grad_norm"][0]) < TOLERANCE
    assert max(map(relative, on_gpu["loss"], on_cpu["loss"])) < TOLERANCE


@pytest.mark.parametrize("masks", ["ragged", "documents"])
def test_masks(ranks, gpu_ranks, masks):
    """Places that do not count, and documents that do not see each other; torch's layers."""
    on_cpu = ranks(1, TRAIN, overrides={}, masks=masks)[0]
    on_gpu = gpu_ranks(1, TRAIN, overrides={"model.backend": "torch"}, masks=masks)[0]
    assert max(map(relative, on_gpu["loss"], on_cpu["loss"])) < TOLERANCE


def test_compiled_ops_are_the_same(gpu_ranks):
    """Triton's kernels in place of torch's."""
    plain = gpu_ranks(1, TRAIN, overrides={"model.backend": "torch"})[0]
    compiled = gpu_ranks(1, TRAIN, overrides={"model.backend": "torch", "model.compile_ops": True})[0]
    assert max(map(relative, compiled["loss"], plain["loss"])) < TOLERANCE


@pytest.mark.parametrize("overrides", [{}, GPT2, BF16, {**BF16, "model.compile_ops": True}],
                         ids=["llama", "gpt2", "bf16", "compiled"])  # fmt: skip
def test_cuda_graphs_are_the_same(gpu_ranks, overrides):
    """The same kernels, launched at once. Also in evaluations between, of which no graph is, and in a step of another
    shape."""
    plain, graphed = (
        gpu_ranks(1, "support.graphs:train", overrides=overrides, steps=10, replayed=replayed, on_gpu=True)[0]
        for replayed in (False, True)
    )
    assert graphed["graphed"] and not plain["graphed"]
    tolerance = 3e-3 if "precision.bf16" in overrides else TOLERANCE
    for what in ("loss", "grad_norm", "evaluated"):
        assert max(map(relative, graphed[what], plain[what])) < tolerance, what
    assert relative(graphed["another_shape"], plain["another_shape"]) < tolerance
    assert graphed["loss"][-1] < graphed["loss"][0]


@pytest.mark.parametrize("model", ["llama", "gpt2", "moe"])
def test_equals_plain_pytorch(gpu_ranks, backend, model):
    """The oracle of tests/engine/test_oracle.py, on the CPU."""
    overrides, shape = {
        "llama": ({}, oracle.Shape()),
        "gpt2": (GPT2, oracle.Shape(style="gpt2", groups=4)),
        "moe": (MOE, oracle.Shape(layers=2, experts=4, aux_loss_coeff=0.01)),
    }[model]
    engine = gpu_ranks(1, TRAIN, overrides={**overrides, **backend}, weights=True)[0]
    weights = oracle.from_engine(engine["before"], shape)
    losses, norms = oracle.train(weights, shape, [samples(step) for step in range(20)], engine["learning_rate"])
    assert relative(engine["grad_norm"][0], norms[0]) < TOLERANCE
    assert max(map(relative, engine["loss"], losses)) < TOLERANCE


def test_optimizer_step(ranks, gpu_ranks, backend):
    """The weights after 3 steps of AdamW with clipping, whichever kernels make them, and of SGD."""
    for overrides in ({}, {"optim.optimizer": "sgd", "optim.lr": 0.1}):
        on_cpu = ranks(1, TRAIN, overrides=overrides, steps=3, weights=True)[0]["after"]
        on_gpu = gpu_ranks(1, TRAIN, overrides={**overrides, **backend}, steps=3, weights=True)[0]["after"]
        # Adam divides small gradients by themselves, so a rounding shows in a step of the learning rate
        for name, weight in on_cpu.items():
            assert (weight - on_gpu[name]).norm() <= 1e-3 * weight.norm(), name


def test_bf16_is_near_fp32_and_that_of_the_cpu(ranks, gpu_ranks, backend):
    """The bound of tests/engine/test_precision.py, which has its reason."""
    fp32 = gpu_ranks(1, TRAIN, overrides=backend, steps=5)[0]
    on_cpu = ranks(1, TRAIN, overrides=BF16, steps=5)[0]
    on_gpu = gpu_ranks(1, TRAIN, overrides={**BF16, **backend}, steps=5)[0]
    for other in (fp32, on_cpu):
        assert max(map(relative, on_gpu["loss"], other["loss"])) < 3e-3
        assert relative(on_gpu["grad_norm"][0], other["grad_norm"][0]) < 2e-2
    assert on_gpu["loss"] != fp32["loss"], "BF16 was not used"


def test_fp16_overflow_is_skipped(gpu_ranks, backend):
    """At a scale of 2^22 the first steps overflow and change nothing; later ones learn."""
    fp16 = {"precision.fp16": True, "precision.initial_loss_scale": 2.0**22, "precision.hysteresis": 2}
    run = gpu_ranks(1, TRAIN, overrides={**fp16, **backend}, steps=20)[0]
    assert run["skipped"][0] and not run["skipped"][-1]
    assert run["loss_scale"][-1] < run["loss_scale"][0] == 2.0**22
    assert math.isfinite(run["grad_norm"][-1])


@pytest.mark.parametrize("precision", ["fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "mxfp8"])
def test_fp8_is_near_bf16(gpu_ranks, precision):
    """200 steps, means of 10: within 1%. Products of FP8 keep 3 bits, whose errors mostly cancel in a loss."""
    shape = {"model.hidden_size": 128, "model.kv_channels": 32, "model.ffn_hidden_size": 256,
             "train.train_iters": 200}  # fmt: skip
    low = gpu_ranks(1, "support.gpu:losses", overrides=shape, precision=precision, steps=200)[0]
    if isinstance(low, str):
        assert low.startswith(NOT_HERE)
        pytest.skip(low)
    bf16 = gpu_ranks(1, "support.gpu:losses", overrides=shape, precision="bf16", steps=200)[0]
    assert low != bf16, "FP8 was not used"
    for first in range(0, 200, 10):
        part = slice(first, first + 10)
        assert relative(sum(low[part]), sum(bf16[part])) < 0.01, first


LOGGED = {
    "engine.py: self._tokens = float(count) or 1.0",
    "engine.py: values = totals.tolist()",
    "clip_grads.py: total_norm = total_norm.item() ** (1.0 / norm_type)",
}
"""The number of tokens, the metrics and the gradient norm: the first and last also say by what to divide."""


@pytest.mark.parametrize("compiled", [False, True])
def test_a_steady_step_waits_for_nothing_but_what_is_logged(gpu_ranks, backend, compiled):
    """By torch's sync debug mode, from the fourth step on; each of the three once a step."""
    found = gpu_ranks(1, "support.gpu:waits", overrides={**BF16, **backend, "model.compile_ops": compiled})[0]
    assert set(found) == LOGGED, set(found) ^ LOGGED
    assert len(found) == 2 * len(LOGGED)


def test_packed_sequences(gpu_ranks, backend):
    """Each sequence of a row is as it is alone; BF16, in which alone Transformer Engine packs."""
    found = gpu_ranks(1, "support.gpu:packed", overrides={**BF16, **backend})[0]
    assert len(found) == 4 and max(found) < 2e-2, found


@pytest.mark.parametrize("case", ["fp32", "bf16"])
def test_same_bits_with_memory_away_between_steps(gpu_ranks, backend, case):
    """Offload to pinned memory and back."""
    overrides = {**backend, **({} if case == "fp32" else BF16)}
    kept, away = (gpu_ranks(1, "support.offload:train", overrides=overrides, away=away)[0] for away in (False, True))
    for what in ("loss", "grad_norm", "evaluated"):
        assert kept[what] == away[what]
    assert all(torch.equal(weight, away["model"][name]) for name, weight in kept["model"].items())


def test_generation_equals_whole_passes(gpu_ranks, backend):
    """Greedy text between training steps, by the cache of keys and values and by whole forward passes."""
    found = gpu_ranks(1, "support.generation:training_between", overrides=backend)[0]
    assert all(ours == slow for ours, slow in found["texts"])


@pytest.mark.parametrize("function", ["cross_entropy", "log_probs", "entropy"])
def test_losses(gpu_ranks, function):
    """Values and gradients of tests/losses, FP32 and BF16, more rows than one chunk, compiled."""
    for options in ({}, {"compiled": True}):
        for dtype, gradient_error in (("float32", 1e-6), ("bfloat16", 2.0**-8)):
            result = gpu_ranks(1, f"support.losses:{function}", vocab_size=250, dtype=dtype, **options)[0]
            assert result["value_error"] < 2e-6 and result["gradient_error"] < gradient_error
            assert result["padding_gradient"] == 0.0 and result["logits_unchanged"]


def test_generators(gpu_ranks):
    """Their state brings back what they draw; that of a CPU rank, which they cannot take, is left."""
    assert gpu_ranks(1, "support.gpu:generators")[0]
